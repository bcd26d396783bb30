"""One rank of ``bench/dispatch.py``, under mpirun: rank 0 prints a JSON object a figure."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeserve.comm.dispatcher import FlatDispatcher, ShardedExperts
from moeserve.comm.exchange.base import Exchange, Lanes
from moeserve.comm.exchange.open import open_exchange
from moeserve.comm.group import Group, Topology
from moeserve.comm.launch.note_store import join_store
from moeserve.comm.layout import LayerLayout
from moeserve.comm.table import table_of
from moeserve.kernels.cpu.ops import CpuOps, _cpu
from moeserve.kernels.matrix import Int8Matrix
from moeserve.kernels.ops import MoeWeights, Part, Routed, RouterSpec, RouterWeights
from moeserve.kernels.wire import Sums
from moeserve.observe.progress import Progress

# Of the sums that come back: what fits 16 bits, as nearly all do.
SUM = 1000
DRAWS = 4
FEWEST, MOST, BURSTS = 5, 400, 5

# By who does it and what is done.
Taken = dict[tuple[str, str], list[float]]


class Bench:
    """This rank, its exchanges, and one layer of experts."""

    def __init__(self, port: int, seconds: float, backends: Sequence[str]) -> None:
        rank, world = (int(os.environ[f"OMPI_COMM_WORLD_{n}"]) for n in ("RANK", "SIZE"))
        self.group = Group(rank, world, join_store("127.0.0.1", port))
        self.rank, self.world, self.seconds = rank, world, seconds
        self.ops = CpuOps()
        self.backends = backends
        self.random = torch.Generator().manual_seed(rank)
        self.turn = 0

    def open(self, sharded: ShardedExperts, most: int) -> dict[str, Exchange]:
        there = sharded.wire.row_bytes * most
        back = self.ops.sums_bytes(sharded.part, sharded.wire, most)
        self.turn += 1
        topology, lanes = Topology((0,) * self.world), Lanes((there, back), 60.0)
        return {
            backend: open_exchange(
                backend, self.group, topology, lanes, key=f"{backend} {self.turn}"
            )
            for backend in self.backends
        }

    def experts(self, count: int, hidden: int, inner: int, kind: str, top_k: int) -> ShardedExperts:
        """Contiguous: this rank holds its share."""
        mine = count // self.world

        def draw(*shape: int) -> Any:
            if kind == "int8":
                codes = torch.randint(-127, 128, shape, dtype=torch.int8)
                return Int8Matrix(codes, torch.full(shape[:-1], 1e-3))
            return (torch.randn(shape) / shape[-1] ** 0.5).to(torch.bfloat16)

        packed = self.ops.pack_experts(draw(mine, 2 * inner, hidden), draw(mine, hidden, inner))
        part = self.ops.prepare(MoeWeights(packed))
        layout = LayerLayout(np.arange(count, dtype=np.int32), count, self.world)
        return ShardedExperts(part, layout, table_of(layout), self.ops.wire(part, top_k))

    def routed(self, tokens: int, hidden: int, experts: int, top_k: int) -> Routed:
        noise = torch.rand(tokens, experts, generator=self.random)
        ids_TC = noise.topk(top_k).indices.int().contiguous()
        weights_TC = torch.rand(tokens, top_k, generator=self.random) / top_k
        return Routed(torch.randn(tokens, hidden, generator=self.random), ids_TC, weights_TC)

    def times(self, acts: Mapping[tuple[str, str], Callable[[int], object]]) -> Taken:
        """Microseconds of many calls of each, in bursts that take turns; as many on all ranks."""
        wanted = []
        for act in acts.values():
            begun = time.perf_counter()
            for i in range(FEWEST):
                act(i)
            each = (time.perf_counter() - begun) / FEWEST
            wanted.append(min(MOST, max(FEWEST, int(self.seconds / BURSTS / each))))
        self.turn += 1
        agreed = self.group.all_gather(f"calls {self.turn}", json.dumps(wanted).encode())[0]
        taken: Taken = {name: [] for name in acts}
        for _ in range(BURSTS):
            for (name, act), calls in zip(acts.items(), json.loads(agreed), strict=True):
                for i in range(calls):
                    begun = time.perf_counter()
                    act(i)
                    taken[name].append((time.perf_counter() - begun) * 1e6)
        return taken

    def notify(self, taken: Taken, tokens: int, nbytes: int = 0) -> None:
        for (by, kind), times in taken.items() if self.rank == 0 else ():
            row = {
                "ranks": self.world, "tokens": tokens, "by": by, "kind": kind, "bytes": nbytes,
                "median_us": statistics.median(times), "best_us": min(times), "calls": len(times),
            }  # fmt: skip
            print(json.dumps(row), flush=True)


def dispatch(bench: Bench, tokens: Sequence[int]) -> None:
    hidden, top_k, experts = 2048, 8, 128
    sharded = bench.experts(experts, hidden, 32, "int8", top_k)
    exchanges = bench.open(sharded, max(tokens))
    for count in tokens:
        draws = [bench.routed(count, hidden, experts, top_k) for _ in range(DRAWS)]
        x_TH = torch.randn(count, hidden, generator=bench.random)
        given = torch.randint(-SUM, SUM, (count * bench.world, 1, hidden), dtype=torch.int32)
        first = next(iter(exchanges.values()))
        there_R, back_R = there_and_back(bench, first, sharded, x_TH, draws[0], given)
        nbytes = sum(there_R) + sum(back_R)
        source, target = (torch.ones(nbytes, dtype=torch.uint8) for _ in range(2))
        acts: dict[tuple[str, str], Callable[[int], object]] = {}
        for name, exchange in exchanges.items():
            acts[name, "whole"] = lambda i, exchange=exchange, x_TH=x_TH, given=given, of=draws: (
                there_and_back(bench, exchange, sharded, x_TH, of[i % DRAWS], given)
            )
            acts[name, "bytes"] = lambda _, exchange=exchange, sizes=(there_R, back_R), of=source: (
                bytes_alone(exchange, sizes, of)
            )
        acts["memcpy", "bytes"] = lambda _, to=target, of=source: to.copy_(of)
        bench.notify(bench.times(acts), count, nbytes)
    for exchange in exchanges.values():
        exchange.close()


def bytes_alone(
    exchange: Exchange, sizes_LR: tuple[Sequence[int], Sequence[int]], source: Tensor
) -> None:
    """As many bytes in as many moves, copied from where they lie ready."""
    for lane, sizes_R in enumerate(sizes_LR):
        at = 0
        for area, size in zip(exchange.areas(lane, sizes_R), sizes_R, strict=True):
            area[:size].copy_(source[at : at + size])
            at += size
        exchange.send(lane, sizes_R)
        exchange.receive(lane)


def there_and_back(
    bench: Bench,
    exchange: Exchange,
    sharded: ShardedExperts,
    x_TH: Tensor,
    routed: Routed,
    given: Tensor,
) -> tuple[list[int], list[int]]:
    """As ``FlatDispatcher.moe``, but for the experts; the bytes handed over, out and back."""
    ops, part, wire = bench.ops, sharded.part, sharded.wire
    sent = sharded.table.assign(routed.ids_TC, bench.rank)
    there_R = [n * wire.row_bytes for n in sent.count_R]
    ops.pack_tokens(x_TH, part, routed, sent.copies, exchange.areas(0, there_R))
    exchange.send(0, there_R)
    segments = exchange.receive(0)
    rows_R = [s.shape[0] // wire.row_bytes for s in segments]
    sums = Sums(sum(rows_R), given)
    most_R = [ops.sums_bytes(part, wire, rows) for rows in rows_R]
    back_R = ops.pack_sums(part, wire, sums, segments, exchange.areas(1, most_R))
    exchange.send(1, back_R)
    ops.combine(x_TH, part, routed, sent.copies, exchange.receive(1), None)
    return there_R, back_R


def layer(bench: Bench, tokens: Sequence[int]) -> None:
    hidden, top_k, experts, inner = 1024, 4, 32, 512
    for kind in ("int8", "bf16"):
        sharded = bench.experts(experts, hidden, inner, kind, top_k)
        exchanges = bench.open(sharded, max(tokens))
        router = bench.ops.prepare(
            RouterWeights(
                torch.ones(hidden), 1e-6, bench.ops.pack_linear(torch.randn(experts, hidden)),
                RouterSpec(experts, top_k),
            )
        )  # fmt: skip
        flats = {
            name: FlatDispatcher(bench.ops, exchange, Topology((0,) * bench.world), Progress())
            for name, exchange in exchanges.items()
        }
        for count in tokens:
            x_TH = torch.randn(count, hidden, generator=bench.random)
            acts: dict[tuple[str, str], Callable[[int], object]] = {
                (name, kind): lambda _, flat=flat, router=router, sharded=sharded, x_TH=x_TH: (
                    whole_layer(bench, flat, router, sharded, x_TH)
                )
                for name, flat in flats.items()
            }
            bench.notify(bench.times(acts), count)
        for flat in flats.values():
            flat.close()


def whole_layer(
    bench: Bench,
    flat: FlatDispatcher,
    router: Part[RouterWeights],
    sharded: ShardedExperts,
    x_TH: Tensor,
) -> None:
    x_TH = x_TH.clone()
    routed = route(bench, x_TH, router)
    for _ in flat.moe(0, sharded, x_TH, routed):
        pass


def route(bench: Bench, x_TH: Tensor, router: Part[RouterWeights]) -> Routed:
    weights = router.weights
    normed_TH = bench.ops.rms_norm(x_TH, weights.norm_H, weights.eps)
    logits_TE = bench.ops.linear(normed_TH, weights.router)
    ids_TC, weights_TC = bench.ops.route_topk(logits_TE, weights.spec, None)
    return Routed(normed_TH, ids_TC, weights_TC)


def main() -> None:
    what, port, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    tokens = [int(n) for n in sys.argv[4].split(",")]
    backends = sys.argv[5].split(",")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    _cpu.set_threads(1)
    bench = Bench(port, seconds, backends)
    (dispatch if what == "dispatch" else layer)(bench, tokens)
    bench.group.all_gather("done", b"")


if __name__ == "__main__":
    main()
