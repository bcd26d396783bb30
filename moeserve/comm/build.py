"""From a loaded model and its ranks to something that runs its layers over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moeserve.comm.dispatcher import ByNode, Dispatcher, Flat, Spread
from moeserve.comm.exchange import DEADLINE_S, Alarm, Exchange
from moeserve.comm.group import Group, Topology
from moeserve.comm.layout import LayerLayout
from moeserve.comm.open import open_exchange
from moeserve.comm.pipeline import Parallel
from moeserve.comm.progress import Progress
from moeserve.comm.rounds import Lanes
from moeserve.comm.table import Table
from moeserve.errors import InternalError
from moeserve.kernels.ops import Layer, MoeWeights, Ops, Part, RouterWeights


@dataclass(frozen=True, slots=True)
class Meeting:
    """The ranks, and how they reach one another; ``address`` is of the interface to listen on."""

    group: Group
    topology: Topology
    alarm: Alarm | None = None
    backend: str = "auto"
    deadline_s: float = DEADLINE_S
    address: str | None = None


def parallel_over(
    ops: Ops,
    layers: Sequence[Layer],
    layouts: Mapping[int, LayerLayout],
    dispatcher: Dispatcher,
    progress: Progress,
) -> Parallel:
    """``layouts`` by layer number; each layer's experts are those of this rank's slots."""
    spreads = [
        None if isinstance(layer.mlp, Part) else spread_of(ops, *layer.mlp, layouts[number])
        for number, layer in enumerate(layers)
    ]
    return Parallel(ops, layers, spreads, dispatcher, progress)


def spread_of(
    ops: Ops, router: Part[RouterWeights], experts: Part[MoeWeights], layout: LayerLayout
) -> Spread:
    """InternalError where the experts are not as many as the layout has slots on a rank."""
    held = experts.weights.experts.num_experts
    if held != layout.slots:
        raise InternalError(f"a rank holds {held} experts of a layer, its plan says {layout.slots}")
    wire = ops.wire(experts, router.weights.spec.top_k)
    return Spread(experts, layout, Table(layout), wire)


def open_dispatcher(
    ops: Ops,
    layers: Sequence[Layer],
    tokens: int,
    microbatches: int,
    meeting: Meeting,
    progress: Progress,
) -> Dispatcher:
    """Collective: all ranks come with the same ``tokens`` (the most in a step of one rank) and
    ``microbatches`` (the most that a step is cut into).

    By node where there are several, all of one size above one and numbered in turn.
    """
    group, topology, size = meeting.group, meeting.topology, node_size(meeting.topology)

    def lanes(nodes: int) -> Lanes:
        """Segments may hold the tokens of so many nodes' ranks."""
        each = [nodes * -(-tokens // (m + 1)) for m in range(microbatches)]
        sizes = [size for rows in each for size in segment_bytes(ops, layers, rows)]
        return Lanes(tuple(sizes), meeting.deadline_s, meeting.alarm)

    def opened(part: Group, key: str, nodes: int) -> Exchange:
        return open_exchange(
            meeting.backend, part, topology, lanes(nodes), key=key, address=meeting.address
        )

    if size in (1, group.world):
        return Flat(ops, opened(group, "ranks", 1), topology, progress)
    number, node = group.rank % size, group.rank // size
    rail = group.sub_group(range(number, group.world, size))
    inside = group.sub_group(range(node * size, (node + 1) * size))
    outer = opened(rail, f"rail {number}", 1)
    inner = opened(inside, f"node {node}", topology.num_nodes)
    return ByNode(ops, outer, inner, topology, progress)


def node_size(topology: Topology) -> int:
    """Ranks on each node, where all have as many and they follow one another; else 1."""
    size = topology.world // topology.num_nodes
    even = tuple(rank // size for rank in range(topology.world))
    return size if topology.node_R == even else 1


def segment_bytes(ops: Ops, layers: Sequence[Layer], rows: int) -> tuple[int, int]:
    """The most that a segment of so many tokens may have on its way there, and back."""
    there, back = 64, 64
    for layer in layers:
        if not isinstance(layer.mlp, Part):
            router, experts = layer.mlp
            wire = ops.wire(experts, router.weights.spec.top_k)
            there = max(there, rows * wire.row_bytes)
            back = max(back, ops.sums_bytes(experts, wire, rows))
    return there, back
