"""A decoder's parts without data: what the config implies of every tensor and matrix.

The loader itself puts them together, so a packed folder is checked by the code that reads any
other, and no number of a model's shape is believed that the config does not imply.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeserve.kernels.matrix import Block, Source
from moeserve.kernels.ops import Experts, Linear
from moeserve.kernels.reference.ops import ReferenceOps
from moeserve.kernels.wire import Combine
from moeserve.models.checkpoint import Checkpoint
from moeserve.models.fields import Fields
from moeserve.models.formats.layouts import Stored
from moeserve.models.formats.method import read_method
from moeserve.models.spec import MoeSpec
from moeserve.models.weights import AS_STORED, Weights


class ShapeOps(ReferenceOps):
    """Packs nothing. Nothing is computed of meta tensors: some operations on them import a compiler
    of torch's first, which takes seconds."""

    def pack_linear(self, weight_NK: Source, bias_N: Tensor | None = None) -> Linear:
        out, into = weight_NK.shape
        return Linear(out, into, (torch.empty(out, into, device="meta"), bias_N))


@dataclass(frozen=True, slots=True)
class Skeleton(Weights):
    """Tensors that have a shape and no data, whatever is asked for."""

    def matrix(self, module: str, out: int, into: int) -> Block:
        return torch.empty(out, into, device="meta")

    def floats(self, module: str, out: int, into: int) -> Tensor:
        return torch.empty(out, into, device="meta")

    def embedding(self, module: str, vocab: int, hidden: int) -> Tensor:
        return torch.empty(vocab, hidden, dtype=self.dtype, device="meta")

    def exact(self, name: str, *shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    def vectors(self, names: Sequence[str | None], sizes: Sequence[int]) -> Tensor:
        return torch.empty(sum(sizes), device="meta")

    def routed(self, prefix: str, spec: MoeSpec, hidden: int, own: Sequence[int]) -> Experts | None:
        return Experts(len(own), hidden, spec.intermediate, spec.activation, None)


def skeleton_of(checkpoint: Checkpoint, dtype: torch.dtype, combine: Combine) -> Skeleton:
    where = str(checkpoint.path / "config.json")
    stored = Stored(checkpoint, read_method(Fields(checkpoint.config, where)))
    return Skeleton(checkpoint, stored, ShapeOps(), dtype, AS_STORED, combine=combine)
