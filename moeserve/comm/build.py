"""From a loaded model and its ranks to something that runs its layers over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moeserve.comm.dispatcher import Dispatcher, Spread
from moeserve.comm.layout import LayerLayout
from moeserve.comm.pipeline import Parallel
from moeserve.comm.progress import Progress
from moeserve.comm.table import Table
from moeserve.errors import InternalError
from moeserve.kernels.ops import Layer, MoeWeights, Ops, Part, RouterWeights
from moeserve.kernels.wire import Combine
from moeserve.placement.report import CopyBytes

MANY = 1 << 16


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


def copy_bytes(ops: Ops, experts: Part[MoeWeights], top_k: int) -> CopyBytes:
    """What a copy of a token weighs out and back, for the cost model.

    By the exact combine, sums that fit 16 bits, as nearly all do, and wide ones whole; by the fast
    one bf16. The ordered one sends a row for every choice, which is not known beforehand: as many
    as a copy may have.
    """
    wire = ops.wire(experts, top_k)
    most = ops.sums_bytes(experts, wire, MANY) // MANY
    exact = experts.weights.combine is Combine.EXACT
    narrow = exact and most < 8 * wire.hidden
    return CopyBytes(wire.row_bytes, 2 * wire.hidden + 1 if narrow else most)
