"""How fast KV goes from one process to another of this host: by shared memory beside a memcpy, by
gRPC beside a bare gRPC stream of messages of the same size, in one run; where the package of
Mooncake's transfer engine is installed, by it over TCP beside its bare writes.

    python bench/kv_transfer.py [--tokens 2048] [--layers 16] [--rounds 5] [--out FILE]

The source is another process. Its rank has no model: blocks hold random numbers and are all
computed, so what is measured is the way from one cache into another: export, digests, transport,
checks, import. Blocks lie in the caches as they travel; with --native caches are those of the CPU
kernels, whose layout is another, and export and import rearrange them (``bench/kv_export.py``). One
JSON line per figure, in GB/s of KV: the best and the median of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import grpc
import torch

from moeserve.comm.control.rpc import Trust, open_channel, open_server, proof_metadata
from moeserve.core import (
    BlockId,
    CacheScope,
    Event,
    FinishReason,
    Request,
    RequestId,
    SamplingParams,
)
from moeserve.engine.sequence import NEW, HeldKv, History, KvSource
from moeserve.errors import ConfigError
from moeserve.kernels.kv_layout import KvBlockLayout
from moeserve.kernels.kv_runs import export_by_blocks, import_by_blocks
from moeserve.kernels.ops import KvRuns, KvShape
from moeserve.kernels.select import choose_ops
from moeserve.pb import kv_pb2
from moeserve.pools.kv.channels import ChannelPool
from moeserve.pools.kv.counters import KvCounters
from moeserve.pools.kv.digests import RunDigests
from moeserve.pools.kv.exporter import KvExporter
from moeserve.pools.kv.fetch import Fetcher
from moeserve.pools.kv.importer import KvImporter
from moeserve.pools.kv.limits import FetchLimits
from moeserve.pools.kv.mooncake import Mooncake, RegisteredSlots
from moeserve.pools.kv.mover import Mover
from moeserve.pools.kv.receiver_call import FetchOrder
from moeserve.pools.kv.runs import Stretch, stretch_bytes
from moeserve.pools.kv.serve import KvServer
from moeserve.pools.members import ServedTerms

RUN, HOST, VOCAB, BLOCK = b"bench", "127.0.0.1", 1000, 16
BARE = "moeserve.bench.Bare"
PATIENCE_S = 60.0
TERMS = ServedTerms("bench", "bench", VOCAB, 1 << 20)


def pieces(blocks: Sequence[BlockId]) -> Iterator[tuple[int, int, int]]:
    """(block, place in ``blocks``, count) of consecutive blocks, each for one copy."""
    begin = 0
    for i in range(1, len(blocks) + 1):
        if i == len(blocks) or blocks[i] != blocks[i - 1] + 1:
            yield blocks[begin], begin, i - begin
            begin = i


class FullHouse:
    """A rank whose KV is all there: requests end as soon as they come."""

    def __init__(self, tokens: int, layers: int, native: bool) -> None:
        self.ops = choose_ops()
        self.native = native
        self.block_size = BLOCK
        count = -(-tokens // BLOCK)
        shape = KvShape(count, BLOCK, 4, 128, 128, torch.bfloat16)
        self.layouts = tuple(KvBlockLayout.of(shape) for _ in range(layers))
        self.caches = [self.ops.new_kv(shape) for _ in range(layers if native else 0)]
        self.plain = [
            torch.zeros(count, layout.nbytes, dtype=torch.uint8)
            for layout in self.layouts[len(self.caches) :]
        ]
        self.held = HeldKv(tuple(BlockId(b) for b in range(count)), 0)
        self.nbytes = count * sum(layout.nbytes for layout in self.layouts)
        self.kept: dict[RequestId, HeldKv] = {}

    def fill(self) -> None:
        rows = torch.randint(
            256, (len(self.held.blocks), self.layouts[0].nbytes), dtype=torch.uint8
        )
        for layer in range(len(self.layouts)):
            self.import_kv(layer, self.held.blocks, rows)

    def borrow(self, token_ids: Sequence[int], scope: CacheScope) -> HeldKv | None:
        return self.held

    def publish(self, held: HeldKv, token_ids: Sequence[int], scope: CacheScope) -> None: ...

    def give_back(self, held: HeldKv, *, forget: bool = False) -> None: ...

    def export_kv(self, layer: int, blocks: Sequence[BlockId], out_NX: torch.Tensor) -> None:
        if self.native:
            self.ops.export_kv(self.caches[layer], torch.tensor(blocks), out_NX)
        else:
            for first, at, count in pieces(blocks):
                out_NX[at : at + count] = self.plain[layer][first : first + count]

    def import_kv(self, layer: int, blocks: Sequence[BlockId], data_NX: torch.Tensor) -> None:
        if self.native:
            self.ops.import_kv(self.caches[layer], torch.tensor(blocks), data_NX)
        else:
            for first, at, count in pieces(blocks):
                self.plain[layer][first : first + count] = data_NX[at : at + count]

    def export_runs(
        self, blocks: Sequence[BlockId], runs: KvRuns, out_X: torch.Tensor
    ) -> torch.Tensor:
        if self.native:
            return self.ops.export_runs(self.caches, torch.tensor(blocks), runs, out_X)
        return export_by_blocks(self, blocks, runs, out_X)

    def import_runs(
        self,
        blocks: Sequence[BlockId],
        runs: KvRuns,
        digests_RD: torch.Tensor,
        data_X: torch.Tensor,
    ) -> torch.Tensor:
        if self.native:
            table = torch.tensor(blocks)
            return self.ops.import_runs(self.caches, table, runs, digests_RD, data_X)
        return import_by_blocks(self, blocks, runs, digests_RD, data_X)

    def submit(self, request: Request, sink: Any, history: History = NEW) -> None:
        self.kept[request.id] = replace(self.held, computed=len(request.prompt_ids))
        sink.deliver([Event(request.id, (1,), finish=FinishReason.LENGTH)])

    def abort(self, request_id: RequestId, reason: FinishReason = FinishReason.ABORT) -> None: ...

    def look(self, request_id: RequestId) -> HeldKv | None:
        return None

    def look_within(self, request_id: RequestId) -> None:
        return None

    def layers_done(self, step: int) -> int:
        return 0

    def made(self, request_id: RequestId) -> None:
        return None

    def take_kept(self, request_id: RequestId) -> HeldKv | None:
        return self.kept.pop(request_id, None)

    def detach(self, request_id: RequestId) -> None:
        return None

    def on_step(self, tell: Callable[[], None]) -> Callable[[], None]:
        return lambda: None

    between_steps = on_step


def serve(tokens: int, layers: int, native: bool, ports: Any) -> None:
    """The source's process."""
    torch.set_num_threads(1)

    async def stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
        count, size = map(int, request.split())
        data = os.urandom(size)
        for _ in range(count):
            yield data

    async def write(request: bytes, context: Any) -> bytes:
        assert engine is not None
        offered = kv_pb2.Registered.FromString(request)
        outlet = engine.outlet(offered, 1, PATIENCE_S)
        assert outlet is not None
        for n in range(-(-nbytes // offered.slot_bytes)):
            room = await outlet.take(0, offered.slot_bytes)
            await outlet.deliver(room)
            assert room.slot is not None, n
            outlet.freed(room.slot)
        outlet.close()
        return b""

    engine, nbytes = mooncake(), 0

    async def run() -> None:
        nonlocal nbytes
        house = FullHouse(tokens, layers, native)
        house.fill()
        nbytes = house.nbytes
        kv = KvServer(house, TERMS, KvCounters(), mooncake=engine)
        bare = grpc.method_handlers_generic_handler(
            BARE,
            {
                "Stream": grpc.unary_stream_rpc_method_handler(stream),
                "Write": grpc.unary_unary_rpc_method_handler(write),
            },
        )
        server, port = open_server(HOST, Trust(), RUN, [kv.handlers(), bare])
        await server.start()
        ports.put(port)
        await server.wait_for_termination()

    asyncio.run(run())


class Receiver:
    """Fetches a whole prompt, again and again."""

    def __init__(
        self,
        house: FullHouse,
        port: int,
        tokens: int,
        limits: FetchLimits,
        engine: Mooncake | None = None,
    ) -> None:
        self.house, self.port, self.tokens = house, port, tokens
        self.mover, self.counters = Mover("bench"), KvCounters()
        self.channels = ChannelPool(Trust(), RUN)
        self.fetcher = Fetcher(
            house,
            TERMS.compute_id,
            self.channels,
            self.mover,
            self.counters,
            limits,
            mooncake=engine,
        )
        ids = tuple(i % VOCAB for i in range(tokens))
        self.request = Request(RequestId("bench"), ids, SamplingParams(2))

    async def fetch(self) -> None:
        digests = RunDigests(
            TERMS.compute_id, self.house.layouts, CacheScope(), self.request.prompt_ids
        )
        importer = KvImporter(self.house, self.house.held, self.tokens, digests, self.counters)

        async def handed(outputs: tuple[int, ...], computed: int) -> bool:
            return False

        async def made(outputs: tuple[int, ...]) -> bool:
            return False

        source = KvSource(f"{HOST}:{self.port}")
        await self.fetcher.fetch(
            FetchOrder(
                source,
                self.request,
                History(),
                importer,
                lambda event: True,
                handed,
                made,
                lambda: None,
            )
        )
        assert importer.complete

    async def close(self) -> None:
        await self.channels.close()
        self.mover.close()
        self.fetcher.close()


async def bare(port: int, total: int, size: int) -> None:
    channel = open_channel(HOST, port, Trust(), "")
    begin: Any = channel.unary_stream(f"/{BARE}/Stream")
    count = -(-total // size)
    call = begin(b"%d %d" % (count, size), metadata=proof_metadata(Trust(), RUN))
    came = 0
    while (data := await call.read()) is not grpc.aio.EOF:
        came += len(data)
    assert came == count * size
    await channel.close()


def mooncake() -> Mooncake | None:
    try:
        return Mooncake(HOST)
    except ConfigError:
        return None


async def bare_writes(port: int, slots: RegisteredSlots) -> None:
    channel = open_channel(HOST, port, Trust(), "")
    begin: Any = channel.unary_unary(f"/{BARE}/Write")
    offered = slots.offer().SerializeToString()
    await begin(offered, metadata=proof_metadata(Trust(), RUN))
    await channel.close()


async def by_mooncake(
    port: int, house: FullHouse, tokens: int, rounds: int, limits: FetchLimits
) -> list[dict[str, Any]]:
    engine = mooncake()
    if engine is None:
        return []
    receiver = Receiver(house, port, tokens, replace(limits, slots=0), engine)
    found = [await rates("mooncake", rounds, house.nbytes, receiver.fetch)]
    assert set(receiver.counters.bytes) == {"mooncake"}
    await receiver.close()
    slots = engine.take(limits.registered, limits.slot_bytes)
    assert slots is not None
    job = lambda: bare_writes(port, slots)  # noqa: E731
    found.append(await rates("bare mooncake", rounds, house.nbytes, job))
    engine.give(slots, again=True)
    engine.close()
    return found


async def rates(
    name: str, rounds: int, nbytes: int, run: Callable[[], Awaitable[None]]
) -> dict[str, Any]:
    await run()  # first touch of memory, connections
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        await run()
        seconds.append(time.perf_counter() - began)
    found = [nbytes / s / 1e9 for s in seconds]
    return {"what": name, "best": max(found), "median": statistics.median(found)}


def digest_share(house: FullHouse, tokens: int) -> dict[str, Any]:
    """Of exporting with digests, what the digests take, by the processor time of the thread: of all
    layers, into a slot. ``table_share`` is what the table of runs takes beside that."""
    digests = RunDigests(TERMS.compute_id, house.layouts, CacheScope(), range(tokens))
    exporter = KvExporter(house, digests)
    blocks = house.held.blocks[: tokens // BLOCK]
    frames = [(Stretch(layer, 0, len(blocks) * BLOCK),) for layer in range(len(house.layouts))]
    out = torch.empty(stretch_bytes(house.layouts[0], frames[0][0]), dtype=torch.uint8)
    rows = out.view(len(blocks), -1)
    parts = exporter.parts(blocks, frames)
    layers = range(len(frames))
    jobs: dict[str, Callable[[], object]] = {
        "with": lambda: [parts.export(layer, out) for layer in layers],
        "without": lambda: [house.export_kv(layer, blocks, rows) for layer in layers],
        "table": lambda: exporter.parts(blocks, frames),
    }
    best = dict.fromkeys(jobs, float("inf"))
    for _ in range(25):
        for name, job in jobs.items():
            began = time.thread_time()
            job()
            best[name] = min(best[name], time.thread_time() - began)
    share = 1 - best["without"] / best["with"]
    return {
        "what": "digests",
        "share_of_export": share,
        "table_share": best["table"] / best["with"],
        "rate": house.nbytes / best["with"] / 1e9,
    }


async def measure(port: int, house: FullHouse, tokens: int, rounds: int) -> list[dict[str, Any]]:
    limits = FetchLimits(whole_s=120)
    source = torch.ones(house.nbytes, dtype=torch.uint8)
    target = torch.zeros(house.nbytes, dtype=torch.uint8)

    async def memcpy() -> None:
        target.copy_(source)

    found = [{"what": "bytes", "bytes": house.nbytes, "cores": os.cpu_count()}]
    found.append(await rates("memcpy", rounds, house.nbytes, memcpy))
    for name, chosen in (("memory", limits), ("grpc", replace(limits, slots=0))):
        receiver = Receiver(house, port, tokens, chosen)
        found.append(await rates(name, rounds, house.nbytes, receiver.fetch))
        assert set(receiver.counters.bytes) == {name}
        await receiver.close()
    size = limits.frame_bytes
    found.append(
        await rates("bare grpc", rounds, house.nbytes, lambda: bare(port, house.nbytes, size))
    )
    found += await by_mooncake(port, house, tokens, rounds, limits)
    found.append(digest_share(house, tokens))
    by_name = {one["what"]: one for one in found}
    pairs = ("memory", "memcpy"), ("grpc", "bare grpc"), ("mooncake", "bare mooncake")
    for name, other in pairs:
        if name not in by_name:
            continue
        ratio = by_name[name]["median"] / by_name[other]["median"]
        found.append({"what": f"{name} / {other}", "ratio": ratio})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--native", action="store_true", help="caches of the CPU kernels")
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    context = multiprocessing.get_context("spawn")
    ports = context.Queue()
    settings = args.tokens, args.layers, args.native
    process = context.Process(target=serve, args=(*settings, ports), daemon=True)
    process.start()
    try:
        found = asyncio.run(
            measure(ports.get(timeout=60), FullHouse(*settings), args.tokens, args.rounds)
        )
    finally:
        process.kill()
        process.join(10)
    text = "\n".join(json.dumps(one) for one in found)
    print(text)
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
