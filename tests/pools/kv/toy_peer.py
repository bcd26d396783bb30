"""Two toy ranks with servers, and what their tests share."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
from toy_house import VOCAB, Sink, ToyHouse

from moeserve.comm.control.rpc import Trust, open_server
from moeserve.core import Request, RequestId, SamplingParams
from moeserve.engine.sequence import History, KvSource
from moeserve.pools.kv.arrivals import Arrivals
from moeserve.pools.kv.channels import ChannelPool
from moeserve.pools.kv.counters import KvCounters
from moeserve.pools.kv.limits import FetchLimits
from moeserve.pools.kv.mooncake import Mooncake
from moeserve.pools.kv.serve import KvServer
from moeserve.pools.members import ServedTerms

WAIT_S = 20.0
RUN = b"run"
QUICK = FetchLimits(
    first_s=2.0, progress_s=1.0, beat_s=0.1, queued_s=2.0, whole_s=10.0, room_s=5.0, stalled_s=2.0
)

# Frames are smaller than what is sent, so that slots are used again.
SHARED = replace(QUICK, memory_from=0, slots=2, slot_bytes=2048, frame_bytes=2048)


def request(name: str = "a", prompt: int = 30, **params: Any) -> Request:
    params = {"max_tokens": 6, "ignore_eos": True, "seed": 3, **params}
    ids = tuple((7 * i * i + sum(map(ord, name))) % VOCAB for i in range(prompt))
    return Request(RequestId(name), ids, SamplingParams(**params))


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not what():  # noqa: ASYNC110 - what is awaited here is told in many ways
            await asyncio.sleep(0.002)


@dataclass
class Peer:
    """A rank with a server, and what stands before its engine."""

    house: ToyHouse
    terms: ServedTerms
    counters: KvCounters
    server: KvServer
    grpc: grpc.aio.Server
    port: int
    channels: ChannelPool
    arrivals: Arrivals
    sinks: list[Sink] = field(default_factory=list)

    @property
    def source(self) -> KvSource:
        return KvSource(f"127.0.0.1:{self.port}")

    def ask(self, wanted: Request, *sources: KvSource, **history: Any) -> Sink:
        sink = Sink()
        self.arrivals.submit(wanted, sink, History(sources=sources, **history))
        self.sinks.append(sink)
        return sink

    async def vacant(self) -> None:
        """Nothing is held for anybody."""
        await until(lambda: self.house.idle and not self.arrivals.arriving)
        await until(lambda: self.counters.serving == 0)
        await until(lambda: self.house.references == 0 and self.counters.borrowed == 0)
        assert not self.house.kept
        assert not self.house.tells
        assert self.counters.calls == 0


@contextlib.asynccontextmanager
async def peer(
    compute_id: str = "model",
    limits: FetchLimits = QUICK,
    mooncake: Mooncake | None = None,
    **house: Any,
) -> AsyncIterator[Peer]:
    toy = ToyHouse(**house)
    terms = ServedTerms("m", compute_id, VOCAB, toy.max_model_len, block_size=toy.block_size)
    counters = KvCounters()
    kv = KvServer(toy, terms, counters, limits, mooncake=mooncake)
    server, port = open_server("127.0.0.1", Trust(), RUN, [kv.handlers()])
    await server.start()
    channels = ChannelPool(Trust(), RUN)
    arrivals = Arrivals(toy, terms, channels, counters, limits, mooncake=mooncake)
    found = Peer(toy, terms, counters, kv, server, port, channels, arrivals)
    try:
        yield found
    finally:
        await arrivals.close()
        await channels.close()
        await server.stop(None)
        await asyncio.to_thread(kv.close)
        await asyncio.to_thread(toy.close)


async def ended(*sinks: Sink) -> None:
    await until(lambda: all(sink.ended.is_set() for sink in sinks))
