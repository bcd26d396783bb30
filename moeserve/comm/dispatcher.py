"""One MoE layer over ranks: tokens out, contributions back, in moves that other work fits between.

``moe`` is a generator that yields wherever it would wait, so that whoever drives it can do another
microbatch's work meanwhile; all ranks drive theirs in the same order. ``Flat`` sends a token once
to every rank that holds experts of it; ``ByNode`` once to every node, where the rank of the same
number within its node hands it on inside and adds up what comes back. By the exact combine both
give the bits of one process.

Letters: T tokens of the batch, C choices, N copies, R ranks, H hidden.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from moeserve.comm.exchange import Exchange
from moeserve.comm.group import Topology
from moeserve.comm.layout import LayerLayout
from moeserve.comm.progress import Progress
from moeserve.comm.table import Assigned, Table
from moeserve.kernels.ops import MoeWeights, Ops, Part, Routed
from moeserve.kernels.wire import Wire


@dataclass(slots=True)
class Spread:
    """A layer as this rank holds it: its slots' experts, and where all others are.

    Replaced as a whole, between steps, when a new plan comes.
    """

    part: Part[MoeWeights]
    layout: LayerLayout
    table: Table
    wire: Wire


@dataclass(slots=True)
class Moved:
    """Counted where it happens (law 8), on this rank; a copy is one token on its way to one rank.

    ``copies_R`` and the bytes are by destination, this rank left out; ``abroad`` are copies to
    other nodes. ``waited_s`` is the time spent in ``receive``.
    """

    world: int
    rounds: int = 0
    tokens: int = 0
    copies_R: list[int] = field(default_factory=list)
    abroad: int = 0
    dispatch_bytes_R: list[int] = field(default_factory=list)
    combine_bytes_R: list[int] = field(default_factory=list)
    waited_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("copies_R", "dispatch_bytes_R", "combine_bytes_R"):
            setattr(self, name, [0] * self.world)


class Dispatcher(Protocol):
    """Moves one layer's tokens. ``lane`` numbers the microbatch."""

    moved: Moved

    def moe(
        self, lane: int, spread: Spread, x_TH: Tensor, routed: Routed
    ) -> Generator[None, None, None]:
        """Adds the mixture to ``x_TH``, as ``Ops.mix`` in one process does; T may be 0.

        Yields before it waits.
        """
        ...

    def close(self) -> None: ...


class Flat:
    """Every rank to every rank over one exchange; lanes 2 m and 2 m + 1 belong to microbatch m."""

    def __init__(
        self, ops: Ops, exchange: Exchange, topology: Topology, progress: Progress
    ) -> None:
        self.moved = Moved(exchange.world)
        self._ops = ops
        self._progress = progress
        self._exchange = exchange
        node_R = topology.node_R
        self._abroad_R = [node != node_R[exchange.rank] for node in node_R]

    def moe(
        self, lane: int, spread: Spread, x_TH: Tensor, routed: Routed
    ) -> Generator[None, None, None]:
        ops, exchange, moved, rank = self._ops, self._exchange, self.moved, self._exchange.rank
        there, back, part, wire = 2 * lane, 2 * lane + 1, spread.part, spread.wire
        self._progress.begin("dispatch")
        sent = spread.table.assign(routed.ids_TC, rank)
        sizes_R = [count * wire.row_bytes for count in sent.count_R]
        ops.pack_tokens(x_TH, part, routed, sent.copies, exchange.areas(there, sizes_R))
        exchange.send(there, sizes_R)
        self._count(len(x_TH), sent, sizes_R)
        self._progress.begin("shared expert")
        shared_TH = ops.shared(part, routed)
        yield
        segments_R = self._received(there)
        self._progress.begin("experts")
        sums = ops.run_experts(part, wire, segments_R)
        most_R = [ops.sums_bytes(part, wire, len(s) // wire.row_bytes) for s in segments_R]
        areas_R = exchange.areas(back, most_R)
        sizes_R = ops.pack_sums(part, wire, sums, segments_R, areas_R)
        exchange.send(back, sizes_R)
        for r, size in enumerate(sizes_R):
            moved.combine_bytes_R[r] += size if r != rank else 0
        yield
        segments_R = self._received(back)
        self._progress.begin("combine")
        ops.collect(x_TH, part, routed, sent.copies, segments_R, shared_TH)

    def close(self) -> None:
        self._exchange.close()

    def _received(self, lane: int) -> list[Tensor]:
        return received(self._exchange, lane, self.moved, self._progress)

    def _count(self, tokens: int, sent: Assigned, sizes_R: Sequence[int]) -> None:
        moved, rank = self.moved, self._exchange.rank
        moved.rounds += 1
        moved.tokens += tokens
        for r, count in enumerate(sent.count_R):
            if r != rank and count:
                moved.copies_R[r] += count
                moved.dispatch_bytes_R[r] += sizes_R[r]
                moved.abroad += count if self._abroad_R[r] else 0


class ByNode:
    """One copy to every node over ``outer``, which joins the ranks of one number within their
    nodes; then one to every rank there over ``inner``, which joins the ranks of a node.

    Lanes as in ``Flat``, of each exchange. Ranks of a node must follow one another, and nodes be of
    one size, as launchers number them.
    """

    def __init__(
        self,
        ops: Ops,
        outer: Exchange,
        inner: Exchange,
        topology: Topology,
        progress: Progress,
    ) -> None:
        self.moved = Moved(topology.world)
        self._ops = ops
        self._progress = progress
        self._outer = outer
        self._inner = inner
        self._size = inner.world
        self._rank = outer.rank * inner.world + inner.rank

    def moe(
        self, lane: int, spread: Spread, x_TH: Tensor, routed: Routed
    ) -> Generator[None, None, None]:
        ops, outer, inner = self._ops, self._outer, self._inner
        there, back, part, wire = 2 * lane, 2 * lane + 1, spread.part, spread.wire
        self._progress.begin("dispatch")
        sent = spread.table.assign(routed.ids_TC, self._rank, ranks_per_unit=self._size)
        sizes_R = [count * wire.row_bytes for count in sent.count_R]
        ops.pack_tokens(x_TH, part, routed, sent.copies, outer.areas(there, sizes_R))
        outer.send(there, sizes_R)
        self._count_abroad(len(x_TH), sent, sizes_R)
        self._progress.begin("shared expert")
        shared_TH = ops.shared(part, routed)
        yield
        landed = self._received(outer, there)
        self._progress.begin("relay of tokens")
        inside = spread.table.spread(landed, wire, self._size)
        sizes_R = [count * wire.row_bytes for count in inside.count_R]
        ops.relay_tokens(wire, landed, inside.copies, inner.areas(there, sizes_R))
        inner.send(there, sizes_R)
        self._count_inside(inside, sizes_R)
        yield
        segments_R = self._received(inner, there)
        self._progress.begin("experts")
        sums = ops.run_experts(part, wire, segments_R)
        most_R = [ops.sums_bytes(part, wire, len(s) // wire.row_bytes) for s in segments_R]
        sizes_R = ops.pack_sums(part, wire, sums, segments_R, inner.areas(back, most_R))
        inner.send(back, sizes_R)
        self._count_back(inner, sizes_R)
        yield
        segments_R = self._received(inner, back)
        self._progress.begin("relay of contributions")
        rows = sum(len(s) for s in landed) // wire.row_bytes
        sums = ops.relay_sums(part, wire, inside.copies, segments_R, rows)
        most_R = [ops.sums_bytes(part, wire, len(s) // wire.row_bytes) for s in landed]
        sizes_R = ops.pack_sums(part, wire, sums, landed, outer.areas(back, most_R))
        outer.send(back, sizes_R)
        self._count_back(outer, sizes_R)
        yield
        segments_R = self._received(outer, back)
        self._progress.begin("combine")
        ops.collect(x_TH, part, routed, sent.copies, segments_R, shared_TH)

    def close(self) -> None:
        self._outer.close()
        self._inner.close()

    def _received(self, exchange: Exchange, lane: int) -> list[Tensor]:
        return received(exchange, lane, self.moved, self._progress)

    def _member(self, exchange: Exchange, r: int) -> int:
        """The rank that the exchange calls r."""
        if exchange is self._outer:
            return r * self._size + self._inner.rank
        return self._outer.rank * self._size + r

    def _count_abroad(self, tokens: int, sent: Assigned, sizes_R: Sequence[int]) -> None:
        moved = self.moved
        moved.rounds += 1
        moved.tokens += tokens
        for node, count in enumerate(sent.count_R):
            if node != self._outer.rank and count:
                rank = self._member(self._outer, node)
                moved.copies_R[rank] += count
                moved.abroad += count
                moved.dispatch_bytes_R[rank] += sizes_R[node]

    def _count_inside(self, inside: Assigned, sizes_R: Sequence[int]) -> None:
        for r, count in enumerate(inside.count_R):
            if r != self._inner.rank and count:
                rank = self._member(self._inner, r)
                self.moved.copies_R[rank] += count
                self.moved.dispatch_bytes_R[rank] += sizes_R[r]

    def _count_back(self, exchange: Exchange, sizes_R: Sequence[int]) -> None:
        for r, size in enumerate(sizes_R):
            if r != exchange.rank:
                self.moved.combine_bytes_R[self._member(exchange, r)] += size


def received(exchange: Exchange, lane: int, moved: Moved, progress: Progress) -> list[Tensor]:
    progress.begin("waiting")
    begun = time.perf_counter()
    segments_R = exchange.receive(lane)
    moved.waited_s += time.perf_counter() - begun
    return segments_R
