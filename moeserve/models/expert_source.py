"""Experts of a model that is being served, read again from its folder: for a rank that is to hold
others than it was started with. Those of a packed folder are mapped.

The folder is opened anew, so that whoever reads has counters and memory of its own; packing may go
on beside running steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moeserve.config.options import AS_STORED, LoadOptions
from moeserve.errors import PlacementError
from moeserve.kernels.ops import Experts, Ops
from moeserve.models.checkpoint import Checkpoint
from moeserve.models.decoder import open_weights
from moeserve.models.families import read_spec
from moeserve.models.moe import load_experts
from moeserve.models.packed.checkpoint import PackedCheckpoint, open_checkpoint
from moeserve.models.packed.decoder import Laid
from moeserve.models.packed.layout import require_runnable
from moeserve.models.spec import ModelSpec, MoeSpec


@dataclass(frozen=True, slots=True)
class ExpertSource:
    """One thread at a time reads from it. ``load`` makes experts of a layer, in their order."""

    checkpoint: Checkpoint
    spec: ModelSpec
    load: Callable[[int, MoeSpec, Sequence[int]], Experts]

    @property
    def bytes_read(self) -> int:
        return self.checkpoint.bytes_read

    def read(self, layer: int, own: Sequence[int]) -> Experts:
        """Experts ``own`` of a decoder layer, packed in this order."""
        mlp = self.spec.layers[layer].mlp if 0 <= layer < len(self.spec.layers) else None
        if not isinstance(mlp, MoeSpec):
            raise PlacementError(f"layer {layer} of {self.checkpoint.path} has no experts")
        experts = self.load(layer, mlp, own)
        self.checkpoint.release()
        return experts


def expert_bytes(checkpoint: Checkpoint, layers: Sequence[int], num_experts: int) -> int:
    """What an expert takes in the files, on average."""
    if isinstance(checkpoint, PackedCheckpoint):
        records = [checkpoint.header.layers[layer].experts for layer in layers]
        return sum(found.nbytes for found in records if found is not None) // len(layers)
    prefixes = tuple(f"model.layers.{layer}." for layer in layers)
    mine = [n for n in checkpoint.names if n.startswith(prefixes) and ".experts." in n]
    return sum(map(checkpoint.nbytes, mine)) // (len(layers) * num_experts)


def open_experts(path: str | Path, ops: Ops, options: LoadOptions = AS_STORED) -> ExpertSource:
    """With the arguments that ``load_decoder`` had, so that what is read is what it would hold."""
    checkpoint = open_checkpoint(path)
    spec, names = read_spec(checkpoint)
    if isinstance(checkpoint, PackedCheckpoint):
        require_runnable(checkpoint.path, checkpoint.header, ops.packing)
        laid = Laid(checkpoint, ops)
        return ExpertSource(
            checkpoint, spec, lambda layer, mlp, own: laid.experts(layer, mlp, spec.hidden, own)
        )
    w = open_weights(checkpoint, ops, options)

    def load(layer: int, mlp: MoeSpec, own: Sequence[int]) -> Experts:
        return load_experts(w, f"model.layers.{layer}", mlp, names, spec.hidden, own)

    return ExpertSource(checkpoint, spec, load)
