"""Tensors of a checkpoint, packed for the op table.

Matrices take the decoder's weight dtype; norms, biases, sinks and routers are small and decide
much, so they stay fp32. Letters as in ``kernels.ops``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moeserve.kernels.ops import Linear, Ops
from moeserve.models.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Weights:
    """Reads and packs; ``progress`` hears (bytes read, bytes in all)."""

    checkpoint: Checkpoint
    ops: Ops
    dtype: torch.dtype
    progress: Callable[[int, int], None] | None = None

    def has(self, name: str) -> bool:
        return self.checkpoint.has(name)

    def require(self, name: str, *shape: int) -> None:
        """Before memory is taken for it: a config alone can claim any size."""
        self.checkpoint.require(name, shape)

    def matrix(self, name: str, *shape: int) -> Tensor:
        return self._get(name, shape).to(self.dtype)

    def vector(self, name: str, size: int) -> Tensor:
        return self._get(name, (size,)).float()

    def exact(self, name: str, *shape: int) -> Tensor:
        """In fp32, whatever the weight dtype: routers."""
        return self._get(name, shape).float()

    def copy_into(self, target: Tensor, name: str) -> None:
        """Into a slice of a larger matrix: one expert of many."""
        target.copy_(self._get(name, tuple(target.shape)))

    def linear(self, prefix: str, out: int, into: int, *, bias: bool = False) -> Linear:
        packed_bias = self.vector(f"{prefix}.bias", out) if bias else None
        return self.ops.pack_linear(self.matrix(f"{prefix}.weight", out, into), packed_bias)

    def _get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self.checkpoint.get(name, shape)
        if self.progress is not None:
            self.progress(self.checkpoint.bytes_read, self.checkpoint.total_bytes)
        return tensor
