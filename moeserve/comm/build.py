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
