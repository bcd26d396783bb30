"""``moeserve place`` from outside: figures as JSON, exit codes, nothing written on bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeserve.placement import cli
from moeserve.placement.cluster import Dataflow, Phase
from moeserve.placement.solvers.portfolio import Solver

FIGURES = {
    "imbalance", "copies_per_token_layer", "cross_node_copies_per_token_layer", "objective",
    "bound", "gap", "seconds",
}  # fmt: skip


@pytest.fixture
def trace(tmp_path: Path, topk) -> Path:
    path = tmp_path / "trace.npz"
    ids = topk(tokens=200, layers=2, experts=16, k=3)
    np.savez(path, topk_ids=ids.astype(np.uint8), seq_lens=np.full(20, 10))
    return path


@pytest.fixture
def counts(tmp_path: Path) -> Path:
    path = tmp_path / "counts.json"
    load = np.random.default_rng(3).integers(1, 1000, (3, 16))
    path.write_text(json.dumps({"logical_count": load.tolist()}))
    return path


def place(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any]]:
    status = cli.main(["place", *map(str, words), "--json"])
    out = capsys.readouterr().out.strip().splitlines()
    return status, json.loads(out[-1]) if out else {}


SMALL = ("--time-limit", "1", "--threads", "1")


@pytest.mark.parametrize("flow", cli.DATAFLOWS)
def test_solve_and_evaluate_print_the_same_figures(capsys, tmp_path, trace, flow: str) -> None:
    plan = tmp_path / "plan.json"
    status, solved = place(
        capsys, "solve", "--routing", trace, "--devices", 4, "--nodes", 2, "--dataflow", flow,
        "--out", plan, *SMALL,
    )  # fmt: skip
    assert status == 0
    assert solved.keys() >= FIGURES | {"held_out"}
    assert solved["gap"] is None or solved["gap"] >= 0
    status, evaluated = place(capsys, "evaluate", "--plan", plan, "--routing", trace)
    assert status == 0
    assert evaluated.keys() >= FIGURES
    for key in FIGURES - {"seconds"}:
        assert evaluated[key] == solved[key]


def test_counts_are_enough_for_balance(capsys, tmp_path, counts) -> None:
    plan = tmp_path / "plan.json"
    status, solved = place(
        capsys, "solve", "--routing", counts, "--devices", 4, "--slots", 20, "--out", plan, *SMALL
    )
    assert status == 0
    assert solved["copies_per_token_layer"] is None
    assert 1 <= solved["bound"] <= solved["objective"] == solved["imbalance"]["mean"]


def test_bytes_are_split_by_link_class(capsys, tmp_path, trace) -> None:
    _, solved = place(
        capsys, "solve", "--routing", trace, "--devices", 4, "--nodes", 2, "--dispatch-bytes", 64,
        "--combine-bytes", 128, "--out", tmp_path / "p.json", *SMALL,
    )  # fmt: skip
    across = solved["cross_node_copies_per_token_layer"] * 96 * 2
    assert solved["bytes_per_token"]["across_nodes"] == pytest.approx(across)


def test_compare_puts_the_solvers_side_by_side(capsys, trace) -> None:
    status, compared = place(
        capsys, "compare", "--routing", trace, "--devices", 4, "--solvers", "contiguous", "eplb",
        "auto", *SMALL,
    )  # fmt: skip
    assert status == 0
    assert list(compared["solvers"]) == ["contiguous", "eplb", "auto"]
    assert compared["evaluated_on"] == "held out"


def test_a_recording_can_be_solved(capsys, tmp_path, trace) -> None:
    ours = tmp_path / "ours.safetensors"
    status, recorded = place(capsys, "record", "--routing", trace, "--out", ours)
    assert (status, recorded["tokens"], recorded["experts"]) == (0, 200, 16)
    plan = tmp_path / "p.json"
    words = ("solve", "--routing", ours, "--devices", 2, "--out", plan, *SMALL)
    assert place(capsys, *words)[0] == 0


def test_export_and_back(capsys, tmp_path, trace) -> None:
    plan, other, back = (tmp_path / n for n in ("p.json", "o.json", "b.json"))
    place(capsys, "solve", "--routing", trace, "--devices", 4, "--out", plan, *SMALL)
    words = ("--format", "ascend", "--out")
    assert place(capsys, "export", "--plan", plan, *words, other)[0] == 0
    known = ("--experts", 16, "--devices", 4)
    assert place(capsys, "export", "--import", "--plan", other, *known, *words, back)[0] == 0
    rows = [json.loads(p.read_text())["expert_of_slot"] for p in (plan, back)]
    assert rows[0] == rows[1]


def test_plots_are_pictures_and_one_page(capsys, tmp_path, trace) -> None:
    plan, folder = tmp_path / "p.json", tmp_path / "report"
    place(capsys, "solve", "--routing", trace, "--devices", 4, "--out", plan, *SMALL)
    status, drawn = place(capsys, "plot", "--plan", plan, "--routing", trace, "--out", folder)
    assert status == 0
    assert len(drawn["files"]) == 7
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 6
    assert "http" not in page.split("<h2>")[0].replace("http-equiv", "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--devices", "5"), "slots do not divide over 5 devices"),
        (("--devices", "4", "--slots", "12"), "cannot hold 16 experts"),
        (("--devices", "4", "--nodes", "3"), "do not divide over 3 nodes"),
        (("--devices", "4", "--memory", "100", "--expert-bytes", "50"), "memory: 4 slots"),
        (("--devices", "4", "--memory", "100"), "needs --expert-bytes"),
        (("--devices", "4", "--speeds", "1", "2"), "2 device speeds for 4 devices"),
        (("--devices", "4", "--max-imbalance", "0.5"), "at least 1"),
        (("--devices", "4", "--apart", "1,99"), "two different experts below 16"),
        (("--devices", "4", "--apart", "1,2", "--together", "1,2"), "also together"),
        (("--devices", "4", "--apart", "one,2"), "expected two experts"),
        (("--devices", "4", "--experts", "8"), "unknown expert"),
        (("--devices", "4", "--solver", "dp"), "too many placements"),
        (("--devices", "4", "--held-out", "1"), "below 1"),
        (("--devices", "4", "--time-limit", "0"), "must be positive"),
        (("--devices", "4", "--previous", "nowhere.json"), "cannot read nowhere.json"),
    ],
)
def test_bad_input_is_named_and_nothing_written(
    capsys, tmp_path, trace, words: tuple[str, ...], said: str
) -> None:
    plan = tmp_path / "plan.json"
    status, printed = place(capsys, "solve", "--routing", trace, "--out", plan, *words)
    assert status == cli.BAD_INPUT
    assert said in printed["error"]
    assert not plan.exists()


def test_the_parser_knows_every_choice_there_is() -> None:
    assert tuple(Dataflow) == cli.DATAFLOWS
    assert tuple(Phase) == cli.PHASES
    assert set(cli.SOLVERS) == set(Solver)


def test_place_imports_no_torch_and_help_no_numpy() -> None:
    solved = "import sys; import moeserve.placement.commands; assert 'torch' not in sys.modules"
    helped = (
        "import sys; from moeserve.placement import cli\n"
        "try: cli.main(['place', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'numpy', 'torch', 'pulp', 'rich'} & sys.modules.keys()"
    )
    for code in (solved, helped):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
