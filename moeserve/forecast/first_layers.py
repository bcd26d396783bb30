"""The first layers of a model, as a decoder of their own: enough to see what a layer costs.

Two layers, and those before the first that routes. The weights are the model's own, and so is the
way from token ids to logits; what comes out means nothing.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from moeserve.config.options import LoadOptions
from moeserve.kernels.ops import Ops
from moeserve.models.checkpoint import Checkpoint
from moeserve.models.decoder import Decoder, assemble
from moeserve.models.spec import ModelSpec
from moeserve.offload.checkpoint_demand import StoredSizes

# What the layers and both ends may take, as they are stored.
MOST_BYTES = 1 << 30
LAYERS = "num_hidden_layers"


def first_layers(sizes: StoredSizes) -> StoredSizes | None:
    """The sizes of these layers; None where they take too much."""
    count = min(len(sizes.layers), (*sizes.spec.moe_layers, 0)[0] + 2)
    found = replace(
        sizes, spec=replace(sizes.spec, layers=sizes.spec.layers[:count], mtp=None),
        layers=sizes.layers[:count], other=0,
    )  # fmt: skip
    return found if found.total <= MOST_BYTES else None


def load_first_layers(folder: Path, spec: ModelSpec, ops: Ops, options: LoadOptions) -> Decoder:
    """The layers of ``spec``, which are the first of the model in ``folder``."""

    class FirstLayers(Checkpoint):
        """Says that there are no more layers, and leaves the others unread."""

        def __init__(self, path: Path, config: dict[str, Any], *others: Any) -> None:
            super().__init__(path, {**config, LAYERS: len(spec.layers)}, *others)

        def unread(self) -> tuple[str, ...]:
            return ()

    return assemble(FirstLayers.open(folder), ops, options)
