"""Experts of a model that is being served, read again from its folder: for a rank that is to hold
others than it was started with.

The folder is opened anew, so that whoever reads has counters and memory of its own; packing may go
on beside running steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moeserve.config.options import AS_STORED, LoadOptions
from moeserve.errors import PlacementError
from moeserve.kernels.ops import Experts, Ops
from moeserve.models.checkpoint import Checkpoint
from moeserve.models.decoder import open_weights
from moeserve.models.families import read_spec
from moeserve.models.moe import load_experts
from moeserve.models.names import TensorNames
from moeserve.models.spec import ModelSpec, MoeSpec
from moeserve.models.weights import Weights


@dataclass(frozen=True, slots=True)
class ExpertSource:
    """One thread at a time reads from it."""

    weights: Weights
    spec: ModelSpec
    names: TensorNames

    @property
    def bytes_read(self) -> int:
        return self.weights.checkpoint.bytes_read

    def read(self, layer: int, own: Sequence[int]) -> Experts:
        """Experts ``own`` of a decoder layer, packed in this order."""
        mlp = self.spec.layers[layer].mlp if 0 <= layer < len(self.spec.layers) else None
        if not isinstance(mlp, MoeSpec):
            raise PlacementError(f"layer {layer} of {self.weights.checkpoint.path} has no experts")
        prefix = f"model.layers.{layer}"
        experts = load_experts(self.weights, prefix, mlp, self.names, self.spec.hidden, own)
        self.weights.checkpoint.release()
        return experts


def expert_bytes(checkpoint: Checkpoint, layers: Sequence[int], num_experts: int) -> int:
    """What an expert takes in the files, on average."""
    prefixes = tuple(f"model.layers.{layer}." for layer in layers)
    mine = [n for n in checkpoint.names if n.startswith(prefixes) and ".experts." in n]
    return sum(map(checkpoint.nbytes, mine)) // (len(layers) * num_experts)


def open_experts(path: str | Path, ops: Ops, options: LoadOptions = AS_STORED) -> ExpertSource:
    """With the arguments that ``load_decoder`` had, so that what is read is what it would hold."""
    checkpoint = Checkpoint.open(path)
    spec, names = read_spec(checkpoint)
    return ExpertSource(open_weights(checkpoint, ops, options), spec, names)
