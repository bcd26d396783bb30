"""The planner from Python: as its page shows it, without torch, and as the command line does it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moeserve import placement
from moeserve.errors import PlacementError
from moeserve.placement.plan import load
from moeserve.placement.routing import Routing, Workload

PAGE = Path(__file__).resolve().parents[2] / "docs" / "planner_library.md"
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
QUICK = placement.Budget(seconds=None)


def test_the_page_prints_what_it_says_without_torch(tmp_path: Path) -> None:
    blocks = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    code = [text for language, text in blocks if language == "python"]
    code.append("import sys\nassert 'torch' not in sys.modules\n")
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code)],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = "".join(text for language, text in blocks if language == "text")
    assert done.stdout.splitlines() == said.splitlines()


def test_the_package_has_what_it_names_and_nothing_else() -> None:
    for name in placement.__all__:
        shown = getattr(placement, name)
        assert shown.__doc__
        assert shown.__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'solved'"):
        _ = placement.solved


def test_solvers_that_need_tokens_are_refused_beside_those_that_do_not(tmp_path: Path) -> None:
    load_LE = np.random.default_rng(2).integers(1, 99, (2, 8)).astype(float)
    counts = Routing((Workload("counts", load_LE),), (0, 1))
    cluster = placement.Cluster(4)
    found = placement.compare(counts, cluster, ("contiguous", "moetuner"), budget=QUICK)
    assert found["contiguous"].keys() == {"fitted"}
    assert "per-token routing" in found["moetuner"]["refused"]
    with pytest.raises(PlacementError, match="per-token routing"):
        placement.compare(counts, cluster, ("moetuner",), budget=QUICK)
    with pytest.raises(PlacementError, match="'best': expected one of auto, balance"):
        placement.solve(counts, cluster, solver="best")


def test_a_plan_that_is_written_is_the_plan(tmp_path: Path, routing: Routing) -> None:
    cluster = placement.Cluster(4)
    plan = placement.solve(routing, cluster, slots=20, budget=QUICK)
    back = load(placement.export(plan, tmp_path / "plan.json"))
    assert back.expert_LS.tolist() == plan.expert_LS.tolist()
    assert placement.evaluate(back, routing) == placement.evaluate(plan, routing, cluster)
    again = placement.solve(routing, cluster, slots=20, budget=QUICK)
    assert again.expert_LS.tolist() == plan.expert_LS.tolist()
