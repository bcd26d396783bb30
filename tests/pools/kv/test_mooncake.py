"""KV by Mooncake's own transfer engine over TCP, where its package is installed; and what members
do that do not both have it."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toy_house import alone
from toy_peer import SHARED, Peer, ended, peer, request

from moeserve.engine.sequence import KvSource
from moeserve.errors import ConfigError
from moeserve.pb import kv_pb2 as pb
from moeserve.pools.kv.mooncake import MOST_REGIONS, Mooncake

HERE = Path(__file__).parent
LIMITS = replace(SHARED, slots=0, slot_bytes=4096, first_s=10.0, progress_s=10.0, whole_s=20.0)


class Memory:
    """An engine that writes to no other process: what the adapter does with its answers."""

    def __init__(self, answer: int = 0) -> None:
        self.answer = answer
        self.registered: set[int] = set()
        self.written: list[tuple[str, int]] = []

    def initialize(self, host: str, metadata: str, protocol: str, device: str) -> int:
        assert (metadata, protocol, device) == ("P2PHANDSHAKE", "tcp", "")
        return 0

    def get_rpc_port(self) -> int:
        return 7

    def register_memory(self, address: int, size: int) -> int:
        self.registered.add(address)
        return 0

    def unregister_memory(self, address: int) -> int:
        self.registered.remove(address)
        return 0

    def transfer_sync_write(self, session: str, address: int, to: int, size: int) -> int:
        self.written.append((session, size))
        return self.answer


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    made = Memory()

    class Module:
        TransferEngine = staticmethod(lambda: made)

    monkeypatch.setitem(sys.modules, "mooncake", Module())  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "mooncake.engine", Module())  # type: ignore[arg-type]
    yield made
    assert not made.registered


async def fetch(b: Peer, source: KvSource, name: str) -> None:
    ask = request(name, 61)
    sink = b.ask(ask, source)
    await ended(sink)
    assert sink.tokens == alone(ask).tokens


async def test_an_engine_that_does_not_reach_the_other_side_costs_time(engine: Memory) -> None:
    """Nothing was sent: the digests would say so of what was not written, too."""
    engine.answer = -1
    one, other = Mooncake("127.0.0.1"), Mooncake("127.0.0.1")
    async with peer(limits=LIMITS, mooncake=one) as a, peer(limits=LIMITS, mooncake=other) as b:
        await fetch(b, a.source, "r")
        assert engine.written
        assert b.counters.bytes == {}
        assert b.counters.sources_lost == {"unreachable": 1}
        assert b.counters.recomputed == 61
        engine.answer = 0  # it says that it wrote, and did not
        await fetch(b, a.source, "s")
        assert b.counters.bad_digests > 0
        assert b.counters.sources_lost == {"unreachable": 1, "wrong": 1}
        await a.vacant()
        await b.vacant()
    engine.registered -= {slots.address for slots in other._lost}
    assert len(other._lost) == 2, "a late write may still come: it is not used again"
    for made in (one, other):
        made.close()


@pytest.mark.parametrize("which", ["source", "receiver"])
async def test_members_of_which_one_has_it_send_messages(engine: Memory, which: str) -> None:
    mine = Mooncake("127.0.0.1")
    theirs: dict[str, Any] = {"mooncake": mine}
    ours: dict[str, Any] = {}
    if which == "receiver":
        theirs, ours = ours, theirs
    async with peer(limits=LIMITS, **theirs) as a, peer(limits=LIMITS, **ours) as b:
        await fetch(b, a.source, "r")
        assert set(b.counters.bytes) == {"grpc"}
        assert not engine.written
        await a.vacant()
        await b.vacant()
    mine.close()


def test_what_is_offered_is_not_believed(engine: Memory) -> None:
    mine = Mooncake("127.0.0.1")
    good = {"session": "h:1", "address": 4096, "slots": 4, "slot_bytes": 4096}
    for wrong in ({"slots": 0}, {"slots": 1 << 20}, {"slot_bytes": 64}, {"session": ""}):
        assert mine.outlet(pb.Registered(**{**good, **wrong}), 1024, 1.0) is None
    assert mine.outlet(pb.Registered(**{**good, "slot_bytes": 1 << 40}), 1024, 1.0) is None
    regions = [mine.take(2, 4096) for _ in range(MOST_REGIONS + 1)]
    assert regions.pop() is None
    assert mine.outlet(pb.Registered(**good), 1024, 1.0) is None
    for one in regions:
        assert one is not None
        mine.give(one, again=True)
    mine.close()


def test_without_the_package_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mooncake.engine", None)
    with pytest.raises(ConfigError, match=r"moeserve\[mooncake\]"):
        Mooncake("127.0.0.1")


def is_there() -> bool:
    try:
        importlib.import_module("mooncake.engine")
    except ImportError:
        return False
    return True


@asynccontextmanager
async def source() -> AsyncIterator[KvSource]:
    """A member in another process, which has the engine."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(HERE / "toy_process.py"),
        "--mooncake",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        port = int(await asyncio.wait_for(process.stdout.readline(), 60))
        yield KvSource(f"127.0.0.1:{port}")
    finally:
        process.kill()
        await process.wait()


@pytest.mark.long
@pytest.mark.skipif(not is_there(), reason="the package of Mooncake's engine is not installed")
async def test_tokens_are_those_of_one_rank_by_the_engine_itself() -> None:
    mine = Mooncake("127.0.0.1")
    async with source() as other, peer(limits=LIMITS, blocks=200, mooncake=mine) as b:
        for n in range(3):
            await fetch(b, other, f"r{n}")
        assert b.counters.sources_lost == {}
        assert set(b.counters.bytes) == {"mooncake"}
        assert b.counters.fetched == 3 * 61
        assert b.counters.bad_digests == 0
        await b.vacant()
    mine.close()
