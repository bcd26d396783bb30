"""Experts over two ranks on one GPU: as threads, then as processes; for ``device.py``.

Each rank holds half of the experts of one layer and has tokens of its own; records and sums go from
rank to rank in device memory (``comm.exchange.mapped``), between threads as it is, between
processes by CUDA's handles. What a rank gets must be, to the bit, what one process with all experts
makes of its tokens. With ``double`` all of it runs on a device in name, in Triton's interpreter:
threads over mapped memory, processes over collectives with gloo in NCCL's place; that shows that
the script is right, and its seconds mean nothing.

Letters: T tokens, H hidden.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]

from moeserve.comm.device_table import DeviceAssignmentTable
from moeserve.comm.dispatcher import FlatDispatcher, ShardedExperts
from moeserve.comm.exchange.base import Exchange, Lanes
from moeserve.comm.exchange.collective import CollectiveExchange
from moeserve.comm.exchange.mapped import CudaSharing, MappedExchange, StreamFence, ThreadSharing
from moeserve.comm.exchange.media import HostMedium
from moeserve.comm.exchange.open import open_host_exchanges
from moeserve.comm.exchange.streams import DeviceWork
from moeserve.comm.group import Group, Topology
from moeserve.comm.launch.note_store import host_store, join_store
from moeserve.comm.layout import LayerLayout
from moeserve.kernels.matrix import Matrix, part_of, stack, to_int8
from moeserve.kernels.ops import MoeWeights, Ops, Part, Routed
from moeserve.observe.progress import Progress

WORLD = 2
DEADLINE_S = 60.0
PATIENCE_S = 600.0  # until the other process has imported everything and made its weights
TOPOLOGY = Topology((0,) * WORLD)
RUNS = 20


@dataclass(frozen=True)
class Shape:
    """One layer, in INT8, and the ``tokens`` of each rank."""

    hidden: int
    inner: int
    experts: int
    chosen: int
    tokens: tuple[int, ...]
    runs: int = RUNS


V3 = Shape(7168, 2048, 64, 8, (1, 16, 256, 4096))
TINY = Shape(64, 32, 8, 2, (1, 5), 1)


@dataclass(frozen=True)
class Measured:
    """``same`` where both ranks got the bits of one process; the slower rank's median seconds."""

    way: str
    tokens: int
    same: bool
    seconds: float


@dataclass(frozen=True)
class Layer:
    """What a rank computes with: the experts of ``own``, and all of them."""

    ops: Ops
    shape: Shape
    rank: int
    sharded: ShardedExperts
    whole: Part[MoeWeights]

    @classmethod
    def of(cls, ops: Ops, shape: Shape, rank: int) -> Layer:
        """The same weights on every rank."""
        draw = torch.Generator().manual_seed(1)
        hidden, inner, count = shape.hidden, shape.inner, shape.experts
        up = torch.randn(count, 2 * inner, hidden, generator=draw) * hidden**-0.5
        down = torch.randn(count, hidden, inner, generator=draw) * inner**-0.5
        matrices = to_int8(up), to_int8(down)
        layout = LayerLayout(np.arange(count, dtype=np.int32), count, WORLD)
        own = packed(ops, matrices, layout.of_rank(rank))
        wire = replace(ops.wire(own, shape.chosen), wide=True)
        table = DeviceAssignmentTable(layout, ops.device)
        sharded = ShardedExperts(own, layout, table, wire)
        return cls(ops, shape, rank, sharded, packed(ops, matrices, range(count)))

    def lanes(self) -> Lanes:
        most, sharded = max(self.shape.tokens), self.sharded
        back = self.ops.sums_bytes(sharded.part, sharded.wire, most)
        return Lanes((sharded.wire.row_bytes * most, back), DEADLINE_S)

    def batch(self, tokens: int) -> tuple[Tensor, Routed]:
        """The rank's own, drawn anew."""
        draw = torch.Generator().manual_seed(100 * self.rank + tokens)
        hidden, shape, there = self.shape.hidden, self.shape, self.ops.device
        x_TH, normed_TH = (torch.randn(tokens, hidden, generator=draw) for _ in range(2))
        scores = torch.rand(tokens, shape.experts, generator=draw)
        ids_TC = scores.topk(shape.chosen).indices.int()
        weights_TC = torch.rand(tokens, shape.chosen, generator=draw)
        routed = Routed(normed_TH.to(there), ids_TC.to(there), weights_TC.to(there))
        return x_TH.to(there), routed

    def measure(self, exchange: Exchange, finish: Callable[[], object]) -> list[tuple[bool, float]]:
        """For each number of tokens; ``finish`` waits for the device. All ranks call it."""
        moves, found = FlatDispatcher(self.ops, exchange, TOPOLOGY, Progress()), []
        for tokens in self.shape.tokens:
            x_TH, routed = self.batch(tokens)
            alone_TH, together_TH = x_TH.clone(), x_TH.clone()
            self.ops.moe(alone_TH, self.whole, routed)
            self.mix(moves, together_TH, routed)
            same = torch.equal(alone_TH.cpu(), together_TH.cpu())
            taken = []
            for _ in range(self.shape.runs):
                finish()
                begun = time.perf_counter()
                self.mix(moves, x_TH, routed)
                finish()
                taken.append(time.perf_counter() - begun)
            found.append((same, statistics.median(taken)))
        moves.close()
        return found

    def mix(self, moves: FlatDispatcher, x_TH: Tensor, routed: Routed) -> None:
        for _ in moves.moe(0, self.sharded, x_TH, routed):
            pass


def packed(ops: Ops, matrices: Sequence[Matrix], experts: Sequence[int]) -> Part[MoeWeights]:
    mine = [stack([part_of(m, e) for e in experts]) for m in matrices]
    return ops.prepare(MoeWeights(ops.pack_experts(mine[0], mine[1]), None))


def as_threads(shape: Shape, double: bool) -> list[Measured]:
    """Two threads of this process, each with a stream of its own."""
    store, shared, device = HashStore(), dict[Any, Any](), device_of(double)

    def sharing() -> ThreadSharing:
        if double:
            return ThreadSharing(device, shared)
        fence = lambda: StreamFence(device, torch.cuda.Event())  # noqa: E731
        return ThreadSharing(device, shared, fence, DeviceWork(device))

    def rank(r: int) -> list[tuple[bool, float]]:
        with on_device(device, double):
            layer = Layer.of(table(device), shape, r)
            exchange = MappedExchange(Group(r, WORLD, store), layer.lanes(), "ranks", sharing())
            return layer.measure(exchange, partial(finish, device))

    with whole_double(double), ThreadPoolExecutor(WORLD) as pool:
        return joined("threads", shape, list(pool.map(rank, range(WORLD))))


def as_processes(shape: Shape, double: bool) -> list[Measured]:
    """This process and one that it starts."""
    store, port = host_store("127.0.0.1")
    given = json.dumps({"port": port, "double": double, "shape": asdict(shape)})
    command = [sys.executable, __file__, given]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            mine = one_process(Group(0, WORLD, store, patience_s=PATIENCE_S), shape, double)
            theirs = [(bool(same), float(taken)) for same, taken in json.loads(last_line(other))]
        finally:
            other.kill()
    return joined("processes", shape, [mine, theirs])


def last_line(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=10 * DEADLINE_S)
    return said.splitlines()[-1]


def one_process(group: Group, shape: Shape, double: bool) -> list[tuple[bool, float]]:
    device = device_of(double)
    with whole_double(double):
        layer = Layer.of(table(device), shape, group.rank)
        lanes = layer.lanes()
        exchange: Exchange
        if double:
            from moeserve.kernels.triton.double import bare

            on_host = open_host_exchanges(group, TOPOLOGY, lanes, key="ranks")
            medium = HostMedium.open(group, "ranks", device, bare)
            exchange = CollectiveExchange(group, lanes, *on_host, medium)
        else:
            exchange = MappedExchange(group, lanes, "ranks", CudaSharing(device))
        return layer.measure(exchange, partial(finish, device))


def joined(way: str, shape: Shape, ranks: Sequence[list[tuple[bool, float]]]) -> list[Measured]:
    return [
        Measured(way, tokens, all(same for same, _ in each), max(taken for _, taken in each))
        for tokens, each in zip(shape.tokens, zip(*ranks, strict=True), strict=True)
    ]


def device_of(double: bool) -> torch.device:
    return torch.device("meta") if double else torch.device("cuda", 0)


def table(device: torch.device) -> Ops:
    from moeserve.kernels.triton.ops import TritonOps

    return TritonOps(device)


def whole_double(double: bool) -> AbstractContextManager[object]:
    if not double:
        return nullcontext()
    from moeserve.kernels.triton.double import device_double

    return device_double()


def on_device(device: torch.device, double: bool) -> AbstractContextManager[object]:
    """For a thread that is a rank."""
    if not double:
        return torch.cuda.stream(torch.cuda.Stream(device))
    from moeserve.kernels.triton.double import device_thread

    return device_thread()


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def every_way(double: bool) -> Iterator[Measured]:
    """On a device in name ``TRITON_INTERPRET=1`` is to be set before anything is imported."""
    shape = TINY if double else V3
    yield from as_threads(shape, double)
    yield from as_processes(shape, double)


def main() -> None:
    """The second of two processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("given", type=json.loads, help="what the first has said")
    given = parser.parse_args().given
    shape = Shape(**{**given["shape"], "tokens": tuple(given["shape"]["tokens"])})
    group = Group(1, WORLD, join_store("127.0.0.1", given["port"]), patience_s=PATIENCE_S)
    print(json.dumps(one_process(group, shape, given["double"])))


if __name__ == "__main__":
    main()
