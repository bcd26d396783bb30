"""Ranks that do not fit are refused at start, each with the reason, and nothing is left running."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from moeserve.comm.launch.spawn import child_environ
from moeserve.placement.plan import Plan, contiguous, dump

PATIENCE_S = 100.0
FLAGS = ["--grpc-port", "none", "--http-port", "0", "--threads", "1", "--num-blocks", "64"]

pytestmark = pytest.mark.timeout(200)


def begin(command: Sequence[str], environ: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *command, *FLAGS],
        env=os.environ | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def two_workers(*flags_of_rank: Sequence[str]) -> list[subprocess.Popen[str]]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = int(taken.getsockname()[1])
    return [
        begin(["moeserve.worker", *flags], child_environ(rank, 2, port))
        for rank, flags in enumerate(flags_of_rank)
    ]


def ends(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Status and what was said last."""
    found = []
    for process in processes:
        try:
            _, said = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
        assert "Traceback" not in said
        found.append((process.returncode, said.strip().splitlines()[-1]))
    return found


def test_settings_and_checkpoints_that_differ_are_refused_by_both_ranks(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model = str(tiny_checkpoint("mixtral"))
    other = tmp_path / "other"
    shutil.copytree(model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    settings = two_workers(["--model", model], ["--model", model, "--dtype", "bfloat16"])
    checkpoints = two_workers(["--model", model], ["--model", str(other)])
    for rank, (status, said) in enumerate(ends(settings)):
        assert status == 2
        assert f"rank {1 - rank} was started with dtype=" in said
    for rank, (status, said) in enumerate(ends(checkpoints)):
        assert status == 1
        assert f"rank {1 - rank} serves another checkpoint than rank {rank}: config.json" in said


def test_a_plan_for_others_and_one_that_lacks_an_expert_are_refused(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """The tiny Mixtral has 4 experts in each of 3 layers."""
    foreign, lacking = tmp_path / "foreign.json", tmp_path / "lacking.json"
    expert_LS = contiguous(layers=3, experts=8, slots=8, devices=2)
    foreign.write_text(dump(Plan(expert_LS, 8, 2, 1, (0, 1, 2))))
    fitting = Plan(contiguous(layers=3, experts=4, slots=4, devices=2), 4, 2, 1, (0, 1, 2))
    document = json.loads(dump(fitting))
    document["expert_of_slot"] = np.zeros((3, 4), int).tolist()
    lacking.write_text(json.dumps(document))
    model = str(tiny_checkpoint("mixtral"))
    served = [
        begin(["moeserve.cli", "serve", "--ep", "2", "--model", model, "--plan", str(plan)], {})
        for plan in (foreign, lacking)
    ]
    (first, wrong), (second, missing) = ends(served)
    assert (first, second) == (1, 1)
    assert "the plan is for 8 experts in layers [0, 1, 2] on 2 devices; the model has 4" in wrong
    assert "layer 0: expert 1 has no slot; every expert needs one" in missing
