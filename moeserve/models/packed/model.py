"""An open packed folder for those who decide themselves what of it is in memory: where each part
lies on disk, and parts made over any memory that their bytes are read into.

Nothing of the weights is read or mapped here. Reading a region (``pread``) cannot end the process
when a file shrinks, as a map would; ``require_unchanged`` says whether it is still the same file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from torch import Tensor

from moeserve.config.options import AS_STORED, LoadOptions
from moeserve.errors import PlacementError
from moeserve.kernels.ops import Experts, Layer, Ops, RecordLayout
from moeserve.kernels.wire import Combine
from moeserve.models.decoder import Decoder, skeleton_decoder
from moeserve.models.packed.checkpoint import PackedCheckpoint, settled
from moeserve.models.packed.decoder import Laid
from moeserve.models.packed.layout import PackedRecords, Region, require_runnable
from moeserve.models.spec import ModelSpec, MoeSpec


@dataclass(frozen=True, slots=True)
class PackedModel:
    """``skeleton`` has every part of the model without data. Layers count from 0; the block of
    multi-token prediction, where there is one, is the last."""

    checkpoint: PackedCheckpoint
    skeleton: Decoder
    laid: Laid

    @classmethod
    def open(cls, path: str | Path, ops: Ops, options: LoadOptions = AS_STORED) -> Self:
        """CheckpointError where the kernels do not understand it, or it was packed otherwise than
        ``options`` ask for."""
        checkpoint = PackedCheckpoint.open(path)
        require_runnable(checkpoint.path, checkpoint.header, ops.packing)
        settled(checkpoint.path, checkpoint.header, options)
        skeleton = skeleton_decoder(checkpoint, Combine(options.combine))
        return cls(checkpoint, skeleton, Laid(checkpoint, ops))

    @property
    def spec(self) -> ModelSpec:
        return self.skeleton.spec

    def file(self, region: Region) -> Path:
        return self.checkpoint.path / region.file

    def trunk(self, layer: int) -> Region:
        """All of a layer but its routed experts."""
        return self.checkpoint.header.layers[layer].trunk.region

    def expert(self, layer: int, expert: int) -> Region:
        """The record of a routed expert, of ``record_layout``'s bytes."""
        return self._records(layer).region(expert)

    def record_layout(self, layer: int) -> RecordLayout:
        self._records(layer)
        return self.laid.record_layout(layer, self._moe(layer), self.spec.hidden)

    def layer_over(self, layer: int, trunk: Tensor, experts: Experts | None = None) -> Layer:
        """Runs from ``trunk``, uint8 of the region's bytes on a page, once they are there.

        ``experts`` is what its tokens may choose from, None where it routes nothing.
        """
        return self.laid.layer(layer, self._layer(layer), trunk, experts)

    def experts_over(
        self, layer: int, memory: Tensor, slots: int, order: Sequence[int] | None = None
    ) -> Experts:
        """Of records of this layer that lie, or will, in ``memory``; see ``Ops.experts_over``."""
        return self.laid.ops.experts_over(memory, self.record_layout(layer), slots, order)

    def require_unchanged(self) -> None:
        """CheckpointError where a file is not the one that was opened."""
        self.checkpoint.require_unchanged()

    def _layer(self, number: int) -> Layer:
        layers = self.skeleton.stack.layers
        if number < len(layers):
            return layers[number]
        assert self.skeleton.mtp is not None, number
        return self.skeleton.mtp.stack.layers[0]

    def _moe(self, number: int) -> MoeSpec:
        return moe_of(self.spec, number, self.checkpoint.path)

    def _records(self, number: int) -> PackedRecords:
        records = self.checkpoint.header.layers[number].experts
        if records is None:
            raise PlacementError(f"layer {number} of {self.checkpoint.path} has no experts")
        return records


def moe_of(spec: ModelSpec, number: int, path: Path) -> MoeSpec:
    """Of a layer that routes; PlacementError where it does not."""
    layers = (*spec.layers, *(() if spec.mtp is None else (spec.mtp,)))
    mlp = layers[number].mlp if 0 <= number < len(layers) else None
    if not isinstance(mlp, MoeSpec):
        raise PlacementError(f"layer {number} of {path} has no experts")
    return mlp
