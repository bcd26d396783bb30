"""One MoE layer over ranks: tokens out, contributions back, in moves that other work fits between.

``moe`` is a generator that yields wherever it would wait, so that whoever drives it can do another
microbatch's work meanwhile; all ranks drive theirs in the same order. ``FlatDispatcher`` sends a
token once to every rank that holds experts of it; ``HierarchicalDispatcher`` once to every node,
where the rank of the same number within its node hands it on inside and adds up what comes back.
By the exact combine both give the bits of one process.

Letters: T tokens of the batch, C choices, N copies, R ranks, H hidden.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from moeserve.comm.exchange.base import Exchange
from moeserve.comm.group import Topology
from moeserve.comm.layout import LayerLayout
from moeserve.comm.table import Assigned, AssignmentTable
from moeserve.kernels.ops import MoeWeights, Ops, Part, Routed
from moeserve.kernels.wire import Sums, Wire
from moeserve.observe.progress import Progress

RunExperts = Callable[[Sequence[Tensor]], Sums]


@dataclass(slots=True)
class ShardedExperts:
    """A layer as this rank holds it: its slots' experts, and where all others are.

    Replaced as a whole, between steps, when a new plan comes. Where ``run`` is given, the experts
    are not all in memory, and it runs them as ``Ops.run_experts`` would.
    """

    part: Part[MoeWeights]
    layout: LayerLayout
    table: AssignmentTable
    wire: Wire
    run: RunExperts | None = None

    def sums(self, ops: Ops, segments: Sequence[Tensor]) -> Sums:
        """What this rank's experts make of the records of all segments in turn."""
        if self.run is not None:
            return self.run(segments)
        return ops.run_experts(self.part, self.wire, segments)


@dataclass(slots=True)
class DispatchStats:
    """Counted where it happens (law 8), on this rank; a copy is one token on its way to one rank.

    ``copies`` and the bytes are those sent to other ranks, ``inter_node`` the copies to other
    nodes among them, ``came`` the copies that other ranks sent here. ``waited_s`` is the time spent
    in ``receive``. The size does not depend on the number of ranks.
    """

    rounds: int = 0
    tokens: int = 0
    copies: int = 0
    inter_node: int = 0
    came: int = 0
    dispatch_bytes: int = 0
    combine_bytes: int = 0
    waited_s: float = 0.0


class Dispatcher(Protocol):
    """Moves one layer's tokens. ``lane`` numbers the microbatch."""

    stats: DispatchStats

    def moe(
        self, lane: int, sharded: ShardedExperts, x_TH: Tensor, routed: Routed
    ) -> Generator[None, None, None]:
        """Adds the mixture to ``x_TH``, as ``Ops.moe`` in one process does; T may be 0.

        Yields before it waits.
        """
        ...

    def close(self) -> None: ...


class DispatchHop:
    """One exchange on the way of tokens, with what goes over it counted in ``stats``.

    ``member_R`` are the run's numbers of the exchange's ranks.
    """

    def __init__(
        self,
        ops: Ops,
        exchange: Exchange,
        member_R: Sequence[int],
        topology: Topology,
        stats: DispatchStats,
        progress: Progress,
    ) -> None:
        self.rank = exchange.rank
        self.world = exchange.world
        self.close, self.fetch = exchange.close, exchange.fetch
        self._ops = ops
        self._exchange = exchange
        self._stats = stats
        self._progress = progress
        home = topology.node_R[member_R[exchange.rank]]
        nodes = [topology.node_R[rank] for rank in member_R]
        self._abroad = [r for r, node in enumerate(nodes) if node != home]

    def send_tokens(
        self, lane: int, wire: Wire, sent: Assigned, pack: Callable[[list[Tensor]], None]
    ) -> None:
        """``pack`` writes the records of ``sent``."""
        stats, count_R = self._stats, sent.count_R
        sizes_R = [count * wire.row_bytes for count in count_R]
        pack(self._exchange.areas(2 * lane, sizes_R))
        self._exchange.send(2 * lane, sizes_R)
        copies = sum(count_R) - count_R[self.rank]
        stats.copies += copies
        stats.dispatch_bytes += copies * wire.row_bytes
        stats.inter_node += sum(count_R[r] for r in self._abroad)

    def tokens(self, lane: int, wire: Wire) -> list[Tensor]:
        segments_R = self._received(2 * lane)
        came = sum(map(len, segments_R)) - len(segments_R[self.rank])
        self._stats.came += came // wire.row_bytes
        return segments_R

    def send_sums(
        self, lane: int, sharded: ShardedExperts, sums: Sums, segments_R: Sequence[Tensor]
    ) -> None:
        """Back to where the records of ``segments_R`` came from."""
        ops, part, wire, back = self._ops, sharded.part, sharded.wire, 2 * lane + 1
        most_R = [ops.sums_bytes(part, wire, len(s) // wire.row_bytes) for s in segments_R]
        areas_R = self._exchange.areas(back, most_R)
        sizes_R = ops.pack_sums(part, wire, sums, segments_R, areas_R)
        self._exchange.send(back, sizes_R)
        self._stats.combine_bytes += sum(sizes_R) - sizes_R[self.rank]

    def sums(self, lane: int) -> list[Tensor]:
        return self._received(2 * lane + 1)

    def _received(self, lane: int) -> list[Tensor]:
        self._progress.begin("waiting")
        begun = time.perf_counter()
        segments_R = self._exchange.receive(lane)
        self._stats.waited_s += time.perf_counter() - begun
        return segments_R


class FlatDispatcher:
    """Every rank to every rank over one exchange; lanes 2 m and 2 m + 1 belong to microbatch m."""

    def __init__(
        self, ops: Ops, exchange: Exchange, topology: Topology, progress: Progress
    ) -> None:
        self.stats = DispatchStats()
        self._ops = ops
        self._progress = progress
        self._hop = DispatchHop(
            ops, exchange, range(exchange.world), topology, self.stats, progress
        )

    def moe(
        self, lane: int, sharded: ShardedExperts, x_TH: Tensor, routed: Routed
    ) -> Generator[None, None, None]:
        ops, hop, part, wire = self._ops, self._hop, sharded.part, sharded.wire
        self._progress.begin("dispatch")
        self.stats.rounds += 1
        self.stats.tokens += len(x_TH)
        sent = sharded.table.assign(routed.ids_TC, hop.rank, fetch=hop.fetch)
        hop.send_tokens(
            lane, wire, sent, lambda at: ops.pack_tokens(x_TH, part, routed, sent.copies, at)
        )
        self._progress.begin("shared expert")
        shared_TH = ops.shared(part, routed)
        yield
        segments_R = hop.tokens(lane, wire)
        self._progress.begin("experts")
        hop.send_sums(lane, sharded, sharded.sums(ops, segments_R), segments_R)
        yield
        segments_R = hop.sums(lane)
        self._progress.begin("combine")
        ops.combine(x_TH, part, routed, sent.copies, segments_R, shared_TH)

    def close(self) -> None:
        self._hop.close()


class HierarchicalDispatcher:
    """One copy to every node over ``outer``, which joins the ranks of one number within their
    nodes; then one to every rank there over ``inner``, which joins the ranks of a node.

    Lanes as in ``FlatDispatcher``, of each exchange. Ranks of a node must follow one another, and
    nodes be of one size, as launchers number them.
    """

    def __init__(
        self,
        ops: Ops,
        outer: Exchange,
        inner: Exchange,
        topology: Topology,
        progress: Progress,
    ) -> None:
        self.stats = DispatchStats()
        self._ops = ops
        self._progress = progress
        size, first = inner.world, outer.rank * inner.world
        rail = range(inner.rank, topology.world, size)
        node = range(first, first + size)
        self._rank = first + inner.rank
        self._outer = DispatchHop(ops, outer, rail, topology, self.stats, progress)
        self._inner = DispatchHop(ops, inner, node, topology, self.stats, progress)

    def moe(
        self, lane: int, sharded: ShardedExperts, x_TH: Tensor, routed: Routed
    ) -> Generator[None, None, None]:
        ops, outer, inner = self._ops, self._outer, self._inner
        part, wire, size = sharded.part, sharded.wire, inner.world
        self._progress.begin("dispatch")
        self.stats.rounds += 1
        self.stats.tokens += len(x_TH)
        sent = sharded.table.assign(
            routed.ids_TC, self._rank, ranks_per_unit=size, fetch=outer.fetch
        )
        outer.send_tokens(
            lane, wire, sent, lambda at: ops.pack_tokens(x_TH, part, routed, sent.copies, at)
        )
        self._progress.begin("shared expert")
        shared_TH = ops.shared(part, routed)
        yield
        landed = outer.tokens(lane, wire)
        self._progress.begin("relay of tokens")
        inside = sharded.table.relay(landed, wire, size, fetch=inner.fetch)
        inner.send_tokens(
            lane, wire, inside, lambda at: ops.relay_tokens(wire, landed, inside.copies, at)
        )
        yield
        segments_R = inner.tokens(lane, wire)
        self._progress.begin("experts")
        inner.send_sums(lane, sharded, sharded.sums(ops, segments_R), segments_R)
        yield
        segments_R = inner.sums(lane)
        self._progress.begin("relay of contributions")
        rows = sum(len(s) for s in landed) // wire.row_bytes
        sums = ops.relay_sums(part, wire, inside.copies, segments_R, rows)
        outer.send_sums(lane, sharded, sums, landed)
        yield
        segments_R = outer.sums(lane)
        self._progress.begin("combine")
        ops.combine(x_TH, part, routed, sent.copies, segments_R, shared_TH)

    def close(self) -> None:
        self._outer.close()
        self._inner.close()
