"""Workers answer, or their job alone fails: late, too large, killed. Nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from moeserve.errors import (
    DeadlineError,
    ExhaustedError,
    InternalError,
    InvalidRequestError,
    UnavailableError,
)
from moeserve.process.frames import MOST_HEAD, lengths_of, packed
from moeserve.process.job_worker import WorkerProgram, worker_environ
from moeserve.process.pool import PoolLimits, WorkerPool

pytestmark = [pytest.mark.long, pytest.mark.timeout(120)]

WORKER = """
import os, sys, time
from moeserve.errors import InvalidRequestError
from moeserve.process.serve_jobs import JobLimits, run_worker
kept = []
def echo(head, payload): return {"said": head["say"]}, payload[::-1]
def pid(head, payload): return {"pid": os.getpid()}, b""
def sleep(head, payload): time.sleep(head["s"]); return {}, b""
def spin(head, payload):
    while True: pass
def take(head, payload): return {"size": len(bytes(head["bytes"]))}, b""
def keep(head, payload): kept.append(b"x" * head["bytes"]); return {}, b""
def die(head, payload): os._exit(3)
def refuse(head, payload): raise InvalidRequestError("no", param="it")
def bug(head, payload): raise KeyError("a bug")
def write(head, payload):
    os.write(os.open(head["file"], os.O_WRONLY | os.O_CREAT), b"x")
    return {}, b""
def environ(head, payload): return {"names": sorted(os.environ)}, b""
LIMITS = JobLimits(memory_bytes=256 << 20, cpu_s=0)
def prepare():
    if sys.argv[1] == "broken": raise InvalidRequestError("cannot begin")
    return {f.__name__: f for f in (
        echo, pid, sleep, spin, take, keep, die, refuse, bug, write, environ)}, {}
run_worker(prepare, LIMITS, LIMITS)
"""
LIMITS: dict[str, Any] = {"workers": 2, "jobs": 64, "job_bytes": 1 << 20, "job_s": 60.0}
OpenPool = Callable[..., WorkerPool]


@pytest.fixture
async def open_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[OpenPool]:
    (tmp_path / "some_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    pools = []

    def build(mood: str = "well", **limits: Any) -> WorkerPool:
        program = WorkerProgram("some work", "some_worker", (mood,))
        pools.append(WorkerPool(program, PoolLimits(**LIMITS | limits)))
        return pools[-1]

    yield build
    for pool in pools:
        pids = pool.pids
        await pool.close()
        assert not pool.pids
        assert not any(map(exists, pids))
        assert pool.jobs == 0


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def eventually(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end, "not in time"
        await asyncio.sleep(0.01)


async def well(pool: WorkerPool) -> None:
    head, payload = await pool.ask({"do": "echo", "say": "é"}, b"abc")
    assert (head["said"], payload) == ("é", b"cba")


async def test_every_job_gets_its_own_answer(open_pool: OpenPool) -> None:
    pool = open_pool()
    jobs = [pool.ask({"do": "echo", "say": str(i)}, bytes([i]) * i * 999) for i in range(40)]
    for i, (head, payload) in enumerate(await asyncio.gather(*jobs)):
        assert (head["said"], payload) == (str(i), bytes([i]) * i * 999)
    assert (pool.counts.started, pool.counts.done, pool.counts.killed) == (2, 40, 0)


@pytest.mark.parametrize(
    ("job", "limits", "error", "says"),
    [
        ({"do": "sleep", "s": 100}, {"job_s": 0.2}, DeadlineError, "took too long"),
        ({"do": "spin"}, {}, DeadlineError, "took too long"),
        ({"do": "take", "bytes": 1 << 30}, {}, ExhaustedError, "too much memory"),
        ({"do": "die"}, {}, ExhaustedError, "status 3"),
    ],
    ids=["late", "busy", "large", "dead"],
)
async def test_one_job_fails_and_the_next_has_another_worker(
    open_pool: OpenPool, job: Any, limits: Any, error: type[Exception], says: str
) -> None:
    pool = open_pool(workers=1, **limits)
    await well(pool)
    (pid,) = pool.pids
    with pytest.raises(error, match=f"some work.*{says}"):
        await pool.ask(job)
    await well(pool)
    assert not exists(pid)
    assert (pool.counts.started, pool.counts.killed, pool.counts.failed) == (2, 1, 1)


async def test_errors_of_a_job_leave_its_worker(open_pool: OpenPool, tmp_path: Path) -> None:
    pool = open_pool(workers=1)
    with pytest.raises(InvalidRequestError, match=r"^no$") as refused:
        await pool.ask({"do": "refuse"})
    assert refused.value.param == "it"
    with pytest.raises(InternalError, match="a bug"):
        await pool.ask({"do": "bug"})
    with pytest.raises(InternalError, match="File too large"):
        await pool.ask({"do": "write", "file": str(tmp_path / "written")})
    await well(pool)
    assert (pool.counts.started, pool.counts.killed, pool.counts.failed) == (1, 0, 3)


async def test_what_waits_is_bounded(open_pool: OpenPool) -> None:
    pool = open_pool(workers=1, jobs=2, job_bytes=10)
    await well(pool)
    running = asyncio.create_task(pool.ask({"do": "sleep", "s": 0.5}, b"12345678"))
    await asyncio.sleep(0)
    with pytest.raises(ExhaustedError, match="wait already"):
        await pool.ask({"do": "pid"}, b"123")
    second = asyncio.create_task(pool.ask({"do": "pid"}, b"12"))
    await asyncio.sleep(0)
    with pytest.raises(ExhaustedError, match="2 texts of 10 bytes wait already"):
        await pool.ask({"do": "pid"})
    await asyncio.gather(running, second)
    assert (pool.counts.refused, pool.counts.done) == (2, 3)
    await well(pool)


async def test_a_worker_that_has_grown_is_replaced(open_pool: OpenPool) -> None:
    pool = open_pool(workers=1, grown_bytes=32 << 20)
    await pool.ask({"do": "keep", "bytes": 8 << 20})
    (pid,) = pool.pids
    await pool.ask({"do": "keep", "bytes": 64 << 20})
    await eventually(lambda: not exists(pid))
    await well(pool)
    assert (pool.counts.started, pool.counts.replaced, pool.counts.killed) == (2, 1, 0)


async def test_one_without_work_ends(open_pool: OpenPool) -> None:
    pool = open_pool(idle_s=0.05)
    await well(pool)
    await eventually(lambda: not pool.pids)
    await well(pool)
    assert pool.counts.started == 2


async def test_whoever_gives_up_costs_no_worker(open_pool: OpenPool) -> None:
    pool = open_pool(workers=1)
    await well(pool)
    (pid,) = pool.pids
    for _ in range(5):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pool.ask({"do": "sleep", "s": 0.05}), 0.001)
    await well(pool)
    assert pool.pids == (pid,)
    assert (pool.counts.started, pool.counts.done) == (1, 7)


async def test_one_that_is_killed_while_idle_is_noticed(open_pool: OpenPool) -> None:
    pool = open_pool(workers=1)
    await well(pool)
    os.kill(pool.pids[0], 9)
    await eventually(lambda: not pool._idle[0].process.alive)
    await well(pool)


async def test_closing_ends_jobs(open_pool: OpenPool) -> None:
    pool = open_pool(workers=1)
    await well(pool)
    jobs = [asyncio.create_task(pool.ask({"do": "sleep", "s": 100})) for _ in range(2)]
    await asyncio.sleep(0.05)
    await pool.close()
    for job in jobs:
        with pytest.raises(UnavailableError, match="stops"):
            await job
    with pytest.raises(UnavailableError, match="stops"):
        await pool.ask({"do": "pid"})


@pytest.mark.parametrize("turns", [1, 2, 5, 50])
async def test_closing_while_a_worker_starts_leaves_none(open_pool: OpenPool, turns: int) -> None:
    pool = open_pool()
    job = asyncio.create_task(pool.ask({"do": "sleep", "s": 100}))  # not done before it closes
    warming = asyncio.create_task(pool.warm())
    for _ in range(turns):
        await asyncio.sleep(0.0005)
    warming.cancel()
    await asyncio.wait({warming})
    await pool.close()
    with pytest.raises(UnavailableError, match="stops"):
        await job
    assert not running("some_worker")


def running(word: str) -> list[Path]:
    """Processes with this word in their command."""
    return [p for p in Path("/proc").glob("[0-9]*") if word.encode() in command_of(p)]


def command_of(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


async def test_one_that_cannot_begin_says_why(open_pool: OpenPool) -> None:
    pool = open_pool("broken", workers=1)
    for _ in range(2):
        with pytest.raises(InvalidRequestError, match="cannot begin"):
            await pool.ask({"do": "pid"})
    await pool.warm()


async def test_a_worker_has_none_of_our_secrets(
    open_pool: OpenPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOESERVE_API_KEY", "a key of clients")
    head, _ = await open_pool().ask({"do": "environ"})
    assert "MOESERVE_API_KEY" not in head["names"]
    assert set(worker_environ({"LANG": "C", "PGPASSWORD": "x"})) >= {"LANG", "PYTHONPATH"}
    assert "PGPASSWORD" not in worker_environ({"PGPASSWORD": "x"})


def test_frames_are_bounded() -> None:
    assert lengths_of(packed({"a": 1}, b"123")[:8]) == (8, 3)
    with pytest.raises(ValueError, match="too large"):
        packed({"a": "x" * MOST_HEAD})
    with pytest.raises(ValueError, match="too large"):
        lengths_of(b"\xff" * 8)
