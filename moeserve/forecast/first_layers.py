"""The first layers of a model, as decoders of their own: enough to see what a layer costs.

Those before the first that routes, that one, and some more: two depths, so that what a layer costs
can be told from what a step costs. The weights are the model's own, and so is the way from token
ids to logits; what comes out means nothing.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from moeserve.config.options import LoadOptions
from moeserve.kernels.ops import Ops
from moeserve.models.checkpoint import Checkpoint
from moeserve.models.decoder import Decoder, assemble, load_decoder
from moeserve.models.layer_runner import LocalLayerRunner
from moeserve.models.packed.layout import is_packed
from moeserve.models.spec import ModelSpec
from moeserve.offload.checkpoint_demand import StoredSizes

# What the layers and both ends may take, as they are stored; and what is as good as more: far more
# than caches hold.
MOST_BYTES, ENOUGH_BYTES = 1 << 31, 400 << 20
MORE = 7
LAYERS = "num_hidden_layers"


def first_layers(sizes: StoredSizes) -> tuple[StoredSizes, ...]:
    """The sizes of these layers, of each depth, the deepest last; empty where the shallowest take
    too much."""
    least = (*sizes.spec.moe_layers, 0)[0] + 1
    counts = sorted({min(len(sizes.layers), least + more) for more in (0, 1, 3, MORE)})
    found = tuple(of_depth(sizes, count) for count in counts)
    fits = [one for one in found if one.total <= MOST_BYTES]
    deeper = [one for one in fits[1:] if one.total <= ENOUGH_BYTES][-1:] or fits[1:2]
    return tuple(fits[:1] + deeper)


def of_depth(sizes: StoredSizes, count: int) -> StoredSizes:
    spec = replace(sizes.spec, layers=sizes.spec.layers[:count], mtp=None)
    return replace(sizes, spec=spec, layers=sizes.layers[:count], other=0)


def load_first_layers(folder: Path, spec: ModelSpec, ops: Ops, options: LoadOptions) -> Decoder:
    """The layers of ``spec``, which are the first of the model in ``folder``."""
    if is_packed(folder):  # of what is mapped, only what runs is read
        return cut(load_decoder(folder, ops, options), spec)

    class FirstLayers(Checkpoint):
        """Says that there are no more layers, and leaves the others unread."""

        def __init__(self, path: Path, config: dict[str, Any], *others: Any) -> None:
            super().__init__(path, {**config, LAYERS: len(spec.layers)}, *others)

        def unread(self) -> tuple[str, ...]:
            return ()

    return assemble(FirstLayers.open(folder), ops, options)


def cut(decoder: Decoder, spec: ModelSpec) -> Decoder:
    """The first layers of ``decoder`` alone, which are those of ``spec``."""
    stack = decoder.ops.stack_layers(decoder.stack.layers[: len(spec.layers)])
    runner = LocalLayerRunner(decoder.ops, stack)
    return replace(decoder, spec=spec, stack=stack, runner=runner, mtp=None)
