"""The process of a source is killed, or stopped, at any point of a transfer: the tokens are right,
in time, and nothing is held."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from toy_house import alone
from toy_peer import QUICK, SHARED, ended, peer, request, until

from moeserve.engine.sequence import KvSource

PROGRAM = Path(__file__).with_name("toy_process.py")
START_S = 60.0


@contextlib.asynccontextmanager
async def source() -> AsyncIterator[tuple[asyncio.subprocess.Process, KvSource]]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(PROGRAM), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        port = int(await asyncio.wait_for(process.stdout.readline(), START_S))
        yield process, KvSource(f"127.0.0.1:{port}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        await process.wait()


@pytest.mark.long
@pytest.mark.parametrize("memory", [False, True], ids=["grpc", "memory"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
async def test_a_source_that_is_lost_midway(how: signal.Signals, memory: bool) -> None:
    """After some of its runs have come; they are kept, and the rest is computed."""
    ask = request("lost", 120)
    want = alone(ask).tokens
    async with (
        source() as (process, lost),
        peer(limits=SHARED if memory else QUICK, blocks=64) as b,
    ):
        sink = b.ask(ask, lost)
        await until(lambda: b.counters.runs >= 12)
        process.send_signal(how)
        began = time.monotonic()
        await ended(sink)
        assert sink.tokens == want
        assert time.monotonic() - began < 10
        assert sum(b.counters.sources_lost.values()) == 1
        assert 8 <= b.counters.fetched < 120
        assert b.counters.fetched + b.counters.recomputed == 120
        assert set(b.counters.bytes) == {"memory" if memory else "grpc"}
        await b.vacant()
        if how is signal.SIGSTOP:
            process.send_signal(signal.SIGCONT)
            again = request("again", 50)
            sink = b.ask(again, lost)
            await ended(sink)
            assert sink.tokens == alone(again).tokens
            assert sum(b.counters.sources_lost.values()) == 1, "it is back"
            await b.vacant()


@pytest.mark.long
async def test_two_processes_share_memory() -> None:
    ask = request("shared", 120)
    async with source() as (_, other), peer(limits=SHARED) as b:
        sink = b.ask(ask, other)
        await ended(sink)
        assert sink.tokens == alone(ask).tokens
        assert set(b.counters.bytes) == {"memory"}
        assert b.counters.fetched == 120
        await b.vacant()
