"""The first layers of a model, as decoders of their own: enough to see what a layer costs.

Those before the first that routes, that one, and some more: two depths, so that what a layer costs
can be told from what a step costs. The layers' weights are the model's own, and so is the way from
token ids to logits; what comes out means nothing.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from moeserve.config.options import LoadOptions
from moeserve.forecast.kernels import random_matrix
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
# Of a head with more rows so many run: a large vocabulary takes as long as several layers, and what
# these take would be lost in it.
HEAD_ROWS = 4096
# Layers of a model whose experts are read: with room for those of two, most are missing.
STREAMED = 8
LAYERS = "num_hidden_layers"


def first_layers(sizes: StoredSizes) -> tuple[StoredSizes, ...]:
    """The sizes of these layers, of each depth, the deepest last; empty where the shallowest take
    too much."""
    least = (*sizes.spec.moe_layers, 0)[0] + 1
    counts = sorted({min(len(sizes.layers), least + more) for more in (0, 1, 3, MORE)})
    found = tuple(of_depth(sizes, count) for count in counts)
    most = MOST_BYTES - (sizes.head - found[0].head)
    fits = [one for one in found if one.total <= most]
    deeper = [one for one in fits[1:] if one.total <= ENOUGH_BYTES][-1:] or fits[1:2]
    return tuple(fits[:1] + deeper)


def streamed_layers(sizes: StoredSizes) -> StoredSizes:
    """The sizes of the first layers that are timed with experts that are read."""
    least = (*sizes.spec.moe_layers, 0)[0]
    return of_depth(sizes, min(len(sizes.layers), least + STREAMED))


def of_depth(sizes: StoredSizes, count: int) -> StoredSizes:
    rows, whole = min(sizes.spec.vocab, HEAD_ROWS), sizes.spec.vocab
    spec = replace(sizes.spec, layers=sizes.spec.layers[:count], mtp=None, vocab=rows)
    head = sizes.head * rows // whole
    return replace(sizes, spec=spec, layers=sizes.layers[:count], head=head, other=0)


def load_first_layers(folder: Path, spec: ModelSpec, ops: Ops, options: LoadOptions) -> Decoder:
    """The layers of ``spec``, which are the first of the model in ``folder``, and its head."""
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
    own = replace(spec, vocab=decoder.spec.vocab)
    return replace(decoder, spec=own, stack=stack, runner=runner, mtp=None)


def with_small_head(decoder: Decoder, kind: str) -> Decoder:
    """With a head of at most ``HEAD_ROWS`` rows; one that has more is of random rows instead, held
    as ``kind``."""
    if decoder.spec.vocab <= HEAD_ROWS:
        return decoder
    rows = random_matrix(kind, HEAD_ROWS, decoder.spec.hidden)
    small = replace(decoder.head.weights, head=decoder.ops.pack_linear(rows))
    spec = replace(decoder.spec, vocab=HEAD_ROWS)
    return replace(decoder, spec=spec, head=decoder.ops.prepare(small))
