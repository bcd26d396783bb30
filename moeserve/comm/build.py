"""From a loaded model and its ranks to something that runs its layers over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from moeserve.comm.device_table import DeviceAssignmentTable
from moeserve.comm.dispatcher import (
    Dispatcher,
    FlatDispatcher,
    HierarchicalDispatcher,
    RunExperts,
    ShardedExperts,
)
from moeserve.comm.exchange.base import DEADLINE_S, Alarm, Exchange, Lanes
from moeserve.comm.exchange.cards import device_of_rank, meet
from moeserve.comm.exchange.collective import BeginningOrder
from moeserve.comm.exchange.open import open_device_exchange, open_exchange
from moeserve.comm.group import Group, Topology, ranks_per_node
from moeserve.comm.layout import LayerLayout
from moeserve.comm.pipeline import ParallelLayerRunner
from moeserve.comm.table import AssignmentTable, table_of
from moeserve.errors import InternalError
from moeserve.kernels.ops import Layer, MoeWeights, Ops, Part, RouterWeights
from moeserve.kernels.wire import Combine
from moeserve.observe.progress import Progress
from moeserve.placement.report import CopyBytes

MANY = 1 << 16


@dataclass(frozen=True, slots=True)
class Bounds:
    """``tokens`` is the most that a rank brings to one microbatch, ``microbatches`` the most of
    them in a step. A wait ends after ``deadline_s``, or at once when ``alarm`` returns an error."""

    tokens: int
    microbatches: int
    deadline_s: float = DEADLINE_S
    alarm: Alarm | None = None


@runtime_checkable
class MayKeepRecords(Protocol):
    """A table of an accelerator that can make and read records where they lie on it."""

    def keeps_records(self, part: Part[MoeWeights]) -> bool: ...


def open_parallel(
    ops: Ops,
    layers: Sequence[Layer],
    layouts: Mapping[int, LayerLayout],
    group: Group,
    topology: Topology,
    *,
    backend: str,
    bounds: Bounds,
    progress: Progress,
    address: str | None = None,
    runs: Mapping[int, RunExperts] | None = None,
) -> ParallelLayerRunner:
    """Collective over ``group``, which is all of the run. ``layouts`` are by layer number, and so
    are ``runs``, of experts that are not all in memory.

    Where nodes have several ranks each, in order, tokens cross to a node once; see
    ``HierarchicalDispatcher``. Where all ranks compute on devices that can reach one another, by
    ``backend``, tokens stay on them; see ``exchange.cards``.
    """
    size = ranks_per_node(topology)
    own = device_of_rank(ops.device, host_layers(ops, layers, runs))
    on_device = meet(backend, group, own, topology.node_R)
    sharded = shard_layers(ops, layers, layouts, size or 1, runs, wide=bool(on_device))
    lanes = lanes_of(ops, sharded, bounds, bounds.tokens)
    order = BeginningOrder()

    def opened(among: Group, lanes: Lanes, key: str) -> Exchange:
        if not on_device:
            return open_exchange(backend, among, topology, lanes, key=key, address=address)
        return open_device_exchange(
            on_device, among, topology, lanes, ops.device, order, key=key, address=address
        )

    dispatcher: Dispatcher
    if size is None:
        dispatcher = FlatDispatcher(ops, opened(group, lanes, "exchange"), topology, progress)
    else:
        rail = group.sub_group(range(group.rank % size, group.world, size))
        node = group.sub_group(topology.ranks_of(topology.node_R[group.rank]))
        outer = opened(rail, lanes, "outer")
        # Whatever comes from all nodes may be for one rank inside.
        inner_lanes = lanes_of(ops, sharded, bounds, bounds.tokens * topology.num_nodes)
        with ExitStack() as undo:
            undo.callback(outer.close)
            inner = opened(node, inner_lanes, "inner")
            undo.pop_all()
        dispatcher = HierarchicalDispatcher(ops, outer, inner, topology, progress)
    return ParallelLayerRunner(ops, layers, sharded, dispatcher, progress)


def host_layers(
    ops: Ops, layers: Sequence[Layer], runs: Mapping[int, RunExperts] | None = None
) -> list[int]:
    """Those whose records the table of an accelerator cannot keep there."""
    found = []
    for number, layer in enumerate(layers):
        if isinstance(layer.mlp, Part):
            continue
        may = isinstance(ops, MayKeepRecords) and ops.keeps_records(layer.mlp[1])
        if not may or number in (runs or {}):
            found.append(number)
    return found


def parallel_over(
    ops: Ops,
    layers: Sequence[Layer],
    layouts: Mapping[int, LayerLayout],
    dispatcher: Dispatcher,
    progress: Progress,
    runs: Mapping[int, RunExperts] | None = None,
    *,
    wide: bool = False,
) -> ParallelLayerRunner:
    """The same over a dispatcher that is there; ``wide`` where its exchange keeps to devices."""
    sharded = shard_layers(ops, layers, layouts, runs=runs, wide=wide)
    return ParallelLayerRunner(ops, layers, sharded, dispatcher, progress)


def shard_layers(
    ops: Ops,
    layers: Sequence[Layer],
    layouts: Mapping[int, LayerLayout],
    ranks_per_unit: int = 1,
    runs: Mapping[int, RunExperts] | None = None,
    *,
    wide: bool = False,
) -> list[ShardedExperts | None]:
    """By layer; each layer's experts are those of this rank's slots."""
    return [
        None
        if isinstance(layer.mlp, Part)
        else shard_experts(
            ops, *layer.mlp, layouts[number], ranks_per_unit, (runs or {}).get(number), wide=wide
        )
        for number, layer in enumerate(layers)
    ]


def shard_experts(
    ops: Ops,
    router: Part[RouterWeights],
    experts: Part[MoeWeights],
    layout: LayerLayout,
    ranks_per_unit: int = 1,
    run: RunExperts | None = None,
    *,
    wide: bool = False,
) -> ShardedExperts:
    """Where records are ``wide`` (``kernels.wire``), who goes where is found on the device too.
    InternalError where no rank has as many experts by the layout."""
    held = experts.weights.experts.num_experts
    if run is None and not layout.holds(held):
        raise InternalError(f"a rank holds {held} experts of a layer; none does by its plan")
    wire = replace(ops.wire(experts, router.weights.spec.top_k), wide=wide)
    table: AssignmentTable = (
        DeviceAssignmentTable(layout, ops.device, ranks_per_unit)
        if wide
        else table_of(layout, ranks_per_unit)
    )
    return ShardedExperts(experts, layout, table, wire, run)


def lanes_of(
    ops: Ops, sharded: Sequence[ShardedExperts | None], bounds: Bounds, tokens: int
) -> Lanes:
    """One there and one back for each microbatch, with room for the widest layer."""
    routed = [s for s in sharded if s is not None]
    there = max((s.wire.row_bytes * tokens for s in routed), default=0)
    back = max((ops.sums_bytes(s.part, s.wire, tokens) for s in routed), default=0)
    return Lanes((there, back) * bounds.microbatches, bounds.deadline_s, bounds.alarm)


def device_bytes(ops: Ops, layers: Sequence[Layer], tokens: int, world: int) -> int:
    """What tokens of so many ranks take on the device of one, by collectives, in steps in which
    each has ``tokens`` at most: records and sums, those it sends and those that come. The most that
    can be where each token goes to all ranks, and twice an even load where it does not. 0 where
    they go through the host."""
    if world == 1 or host_layers(ops, layers):
        return 0
    most = 0
    for layer in layers:
        if isinstance(layer.mlp, Part):
            continue
        router, experts = layer.mlp
        top_k = router.weights.spec.top_k
        wire = replace(ops.wire(experts, top_k), wide=True)
        sent = min(top_k, world)
        both_ways = wire.row_bytes * tokens + ops.sums_bytes(experts, wire, tokens)
        most = max(most, (sent + min(2 * sent, world)) * both_ways)
    return 2 * most  # of microbatches the first may have all tokens, the next a half, a quarter...


def copy_bytes(ops: Ops, experts: Part[MoeWeights], top_k: int, *, wide: bool = False) -> CopyBytes:
    """What a copy of a token weighs out and back, for the cost model.

    By the exact combine, sums that fit 16 bits, as nearly all do, and whole those of two limbs or
    of ``wide`` records; by the fast one bf16. The ordered one sends a row for every choice, which
    is not known beforehand: as many as a copy may have.
    """
    wire = ops.wire(experts, top_k)
    most = ops.sums_bytes(experts, wire, MANY) // MANY
    exact = experts.weights.combine is Combine.EXACT
    narrow = exact and not wide and most < 8 * wire.hidden
    return CopyBytes(wire.row_bytes, 2 * wire.hidden + 1 if narrow else most)
