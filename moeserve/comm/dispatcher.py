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
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from moeserve.comm.exchange.base import Exchange
from moeserve.comm.group import Topology
from moeserve.comm.layout import LayerLayout
from moeserve.comm.table import Assigned, Table
from moeserve.kernels.ops import MoeWeights, Ops, Part, Routed
from moeserve.kernels.wire import Sums, Wire
from moeserve.observe.progress import Progress


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


class Leg:
    """One exchange on the way of tokens, with what goes over it counted in ``moved``.

    ``member_R`` are the run's numbers of the exchange's ranks.
    """

    def __init__(
        self,
        ops: Ops,
        exchange: Exchange,
        member_R: Sequence[int],
        topology: Topology,
        moved: Moved,
        progress: Progress,
    ) -> None:
        self.rank = exchange.rank
        self.world = exchange.world
        self.close = exchange.close
        self._ops = ops
        self._exchange = exchange
        self._moved = moved
        self._progress = progress
        self._others = [(r, rank) for r, rank in enumerate(member_R) if r != exchange.rank]
        home = topology.node_R[member_R[exchange.rank]]
        self._abroad_R = [topology.node_R[rank] != home for rank in member_R]

    def send_tokens(
        self, lane: int, wire: Wire, sent: Assigned, pack: Callable[[list[Tensor]], None]
    ) -> None:
        """``pack`` writes the records of ``sent``."""
        moved = self._moved
        sizes_R = [count * wire.row_bytes for count in sent.count_R]
        pack(self._exchange.areas(2 * lane, sizes_R))
        self._exchange.send(2 * lane, sizes_R)
        for r, rank in self._others:
            moved.copies_R[rank] += sent.count_R[r]
            moved.dispatch_bytes_R[rank] += sizes_R[r]
            moved.abroad += sent.count_R[r] if self._abroad_R[r] else 0

    def tokens(self, lane: int) -> list[Tensor]:
        return self._received(2 * lane)

    def send_sums(
        self, lane: int, spread: Spread, sums: Sums, segments_R: Sequence[Tensor]
    ) -> None:
        """Back to where the records of ``segments_R`` came from."""
        ops, part, wire, back = self._ops, spread.part, spread.wire, 2 * lane + 1
        most_R = [ops.sums_bytes(part, wire, len(s) // wire.row_bytes) for s in segments_R]
        areas_R = self._exchange.areas(back, most_R)
        sizes_R = ops.pack_sums(part, wire, sums, segments_R, areas_R)
        self._exchange.send(back, sizes_R)
        for r, rank in self._others:
            self._moved.combine_bytes_R[rank] += sizes_R[r]

    def sums(self, lane: int) -> list[Tensor]:
        return self._received(2 * lane + 1)

    def _received(self, lane: int) -> list[Tensor]:
        self._progress.begin("waiting")
        begun = time.perf_counter()
        segments_R = self._exchange.receive(lane)
        self._moved.waited_s += time.perf_counter() - begun
        return segments_R


class Flat:
    """Every rank to every rank over one exchange; lanes 2 m and 2 m + 1 belong to microbatch m."""

    def __init__(
        self, ops: Ops, exchange: Exchange, topology: Topology, progress: Progress
    ) -> None:
        self.moved = Moved(exchange.world)
        self._ops = ops
        self._progress = progress
        self._leg = Leg(ops, exchange, range(exchange.world), topology, self.moved, progress)

    def moe(
        self, lane: int, spread: Spread, x_TH: Tensor, routed: Routed
    ) -> Generator[None, None, None]:
        ops, leg, part, wire = self._ops, self._leg, spread.part, spread.wire
        self._progress.begin("dispatch")
        self.moved.rounds += 1
        self.moved.tokens += len(x_TH)
        sent = spread.table.assign(routed.ids_TC, leg.rank)
        leg.send_tokens(
            lane, wire, sent, lambda at: ops.pack_tokens(x_TH, part, routed, sent.copies, at)
        )
        self._progress.begin("shared expert")
        shared_TH = ops.shared(part, routed)
        yield
        segments_R = leg.tokens(lane)
        self._progress.begin("experts")
        leg.send_sums(lane, spread, ops.run_experts(part, wire, segments_R), segments_R)
        yield
        segments_R = leg.sums(lane)
        self._progress.begin("combine")
        ops.collect(x_TH, part, routed, sent.copies, segments_R, shared_TH)

    def close(self) -> None:
        self._leg.close()


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
        size, first = inner.world, outer.rank * inner.world
        rail = range(inner.rank, topology.world, size)
        node = range(first, first + size)
        self._rank = first + inner.rank
        self._outer = Leg(ops, outer, rail, topology, self.moved, progress)
        self._inner = Leg(ops, inner, node, topology, self.moved, progress)

    def moe(
        self, lane: int, spread: Spread, x_TH: Tensor, routed: Routed
    ) -> Generator[None, None, None]:
        ops, outer, inner = self._ops, self._outer, self._inner
        part, wire, size = spread.part, spread.wire, inner.world
        self._progress.begin("dispatch")
        self.moved.rounds += 1
        self.moved.tokens += len(x_TH)
        sent = spread.table.assign(routed.ids_TC, self._rank, ranks_per_unit=size)
        outer.send_tokens(
            lane, wire, sent, lambda at: ops.pack_tokens(x_TH, part, routed, sent.copies, at)
        )
        self._progress.begin("shared expert")
        shared_TH = ops.shared(part, routed)
        yield
        landed = outer.tokens(lane)
        self._progress.begin("relay of tokens")
        inside = spread.table.spread(landed, wire, size)
        inner.send_tokens(
            lane, wire, inside, lambda at: ops.relay_tokens(wire, landed, inside.copies, at)
        )
        yield
        segments_R = inner.tokens(lane)
        self._progress.begin("experts")
        inner.send_sums(lane, spread, ops.run_experts(part, wire, segments_R), segments_R)
        yield
        segments_R = inner.sums(lane)
        self._progress.begin("relay of contributions")
        rows = sum(len(s) for s in landed) // wire.row_bytes
        sums = ops.relay_sums(part, wire, inside.copies, segments_R, rows)
        outer.send_sums(lane, spread, sums, landed)
        yield
        segments_R = outer.sums(lane)
        self._progress.begin("combine")
        ops.collect(x_TH, part, routed, sent.copies, segments_R, shared_TH)

    def close(self) -> None:
        self._outer.close()
        self._inner.close()
