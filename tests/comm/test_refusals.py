"""Ranks that do not fit are refused at start, each with the reason, and nothing is left running."""

from __future__ import annotations

import json
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

PATIENCE_S = 150.0
FLAGS = ["--grpc-port", "none", "--http-port", "0", "--threads", "1", "--num-blocks", "64"]
WORKERS = Path(__file__).parent / "forked_workers.py"

pytestmark = [pytest.mark.long, pytest.mark.timeout(200)]


def ends(runs: Sequence[Sequence[Sequence[str]]], folder: Path) -> list[list[tuple[int, str]]]:
    """Runs of several ranks, all at once, by the flags of each rank: status of each rank, and what
    it said last."""
    workers, ports = [], []
    for flags_of_rank in runs:
        ports.append(socket.create_server(("127.0.0.1", 0)))
        port = int(ports[-1].getsockname()[1])
        for rank, flags in enumerate(flags_of_rank):
            environ = child_environ(rank, len(flags_of_rank), port)
            workers.append([environ, [*flags, *FLAGS]])
    for taken in ports:
        taken.close()
    (folder / "runs.json").write_text(json.dumps(workers))
    done = subprocess.run(
        [sys.executable, WORKERS, folder / "runs.json", folder],
        stdout=subprocess.PIPE,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    found = []
    for number, status in enumerate(json.loads(done.stdout)):
        said = (folder / f"{number}.txt").read_text()
        assert "Traceback" not in said
        found.append((status, said.strip().splitlines()[-1]))
    remaining = iter(found)
    return [[next(remaining) for _ in flags_of_rank] for flags_of_rank in runs]


def test_ranks_that_differ_and_plans_that_do_not_fit_are_refused_by_all_ranks(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """The tiny Mixtral has 4 experts in each of 3 layers."""
    model = str(tiny_checkpoint("mixtral"))
    other = tmp_path / "other"
    shutil.copytree(model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    lacking = tmp_path / "lacking.json"
    fitting = Plan(contiguous(layers=3, experts=4, slots=4, devices=2), 4, 2, 1, (0, 1, 2))
    document = json.loads(dump(fitting))
    document["expert_of_slot"] = np.zeros((3, 4), int).tolist()
    lacking.write_text(json.dumps(document))
    adding = ["--model", model, "--dispatcher", "moe_distribute"]
    settings, checkpoints, plans, cards, sums = ends(
        [
            [["--model", model], ["--model", model, "--dtype", "bfloat16"]],
            [["--model", model], ["--model", str(other)]],
            [["--model", model, "--plan", str(lacking)]] * 2,
            [["--model", model, "--dispatcher", "deepep"]] * 2,
            [adding] * 2,
        ],
        tmp_path,
    )
    for rank, (status, said) in enumerate(settings):
        assert status == 2
        assert f"rank {1 - rank} was started with dtype=" in said
    for rank, (status, said) in enumerate(checkpoints):
        assert status == 1
        assert f"rank {1 - rank} serves another checkpoint than rank {rank}: config.json" in said
    for status, said in plans:
        assert status == 1
        assert "layer 0: expert 1 has no slot; every expert needs one" in said
    for status, said in cards:
        assert status == 2
        assert "dispatcher=deepep: rank 0: DeepEP is for CUDA devices, and this rank" in said
    for status, said in sums:
        assert status == 2
        assert "give --combine fast, or leave out --dispatcher" in said


def test_a_plan_for_others_ends_the_server_and_its_ranks(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign.json"
    expert_LS = contiguous(layers=3, experts=8, slots=8, devices=2)
    foreign.write_text(dump(Plan(expert_LS, 8, 2, 1, (0, 1, 2))))
    words = ["serve", "--ep", "2", "--model", str(tiny_checkpoint("mixtral"))]
    done = subprocess.run(
        [sys.executable, "-m", "moeserve.cli", *words, "--plan", foreign, *FLAGS],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    wrong = done.stderr.strip().splitlines()[-1]
    assert "the plan is for 8 experts in layers [0, 1, 2] on 2 devices; the model has 4" in wrong
