"""Workers answer, sleep while others are asked, fail by name, and leave nothing behind."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moeserve.bench.worker.repeat import repeat
from moeserve.bench.workers import LoggedProcess, Worker, pids_of_session, session_peak_bytes
from moeserve.errors import DeadlineError, UnavailableError
from moeserve.process.child import bound_to

SCRIPT = """
import os, subprocess, sys, time
from answer import Channel
channel = Channel()
print("a library talks")
children = []
def child(): children.append(subprocess.Popen(["sleep", "100"])); return {"pid": children[0].pid}
def die(why): sys.exit(why)
def late(seconds): time.sleep(seconds); return {}
def echo(**said): return {**said, "cpus": len(os.sched_getaffinity(0))}
channel.ready(hello=1)
channel.serve({"echo": echo, "child": child, "die": die, "late": late})
"""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    (tmp_path / "worker.py").write_text(SCRIPT)
    command = (sys.executable, str(tmp_path / "worker.py"))
    with Worker("bob", command, cpus=1, log=tmp_path / "log") as made:
        yield made


def state(pid: int) -> str:
    """R, S, T (stopped) ..., or nothing where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


def becomes(pid: int, wanted: str) -> bool:
    end = time.monotonic() + 20
    while state(pid) not in wanted.split("|"):
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def test_a_worker_answers_whatever_libraries_print(worker: Worker, tmp_path: Path) -> None:
    assert worker.ready_message == {"hello": 1}
    assert worker.ready_s > 0
    assert worker.request("echo", deadline=20, a=[1, 2]) == {"a": [1, 2], "cpus": 1}
    assert worker.request("echo", deadline=20, a="b") == {"a": "b", "cpus": 1}
    assert "a library talks" in (tmp_path / "log").read_text()


def test_a_worker_sleeps_until_it_is_asked(worker: Worker) -> None:
    assert becomes(worker.pid, "T")
    worker.request("echo", deadline=20)
    assert becomes(worker.pid, "T")


def test_a_late_worker_is_named_and_ended(worker: Worker) -> None:
    with pytest.raises(DeadlineError, match="bob has not answered"):
        worker.request("late", deadline=0.2, seconds=60)
    assert not worker.alive


def test_a_dead_worker_is_named_with_its_last_words(worker: Worker) -> None:
    with pytest.raises(UnavailableError, match="bob ended: out of luck"):
        worker.request("die", deadline=20, why="out of luck")
    with pytest.raises(UnavailableError, match="bob ended"):
        worker.request("echo", deadline=20)


def test_a_worker_that_cannot_start_says_why(tmp_path: Path) -> None:
    command = (sys.executable, "-c", "raise SystemExit('no such model')")
    with pytest.raises(UnavailableError, match="eve ended: no such model"):
        Worker("eve", command, cpus=1, log=tmp_path / "log")


def test_children_end_with_their_worker(worker: Worker) -> None:
    child = worker.request("child", deadline=20)["pid"]
    assert set(pids_of_session(worker.pid)) == {worker.pid, child}
    assert session_peak_bytes(worker.pid) > 1 << 20
    worker.close()
    assert becomes(child, "|Z")
    assert not worker.alive
    worker.close()


def test_a_server_is_ended_even_if_it_does_not_listen(tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(100)"
    with LoggedProcess(
        "deaf", (sys.executable, "-c", deaf), cpus=1, log=tmp_path / "log"
    ) as server:
        assert server.alive
        server.pause()
    assert not server.alive


def test_cores_are_given_back() -> None:
    before = os.sched_getaffinity(0)
    with bound_to(1):
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before


def test_a_call_is_repeated_at_least_three_times_after_one_to_warm_up() -> None:
    calls: list[None] = []
    assert len(repeat(lambda: calls.append(None), 0.0)) == 3
    assert len(calls) == 4
