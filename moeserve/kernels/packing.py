"""Weights in the layout of the native kernels, made once.

Letters: E matrices of a stack, N output features, K input features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeserve.errors import InternalError
from moeserve.kernels import _cpu
from moeserve.kernels.matrix import Int4Matrix, Int8Matrix, Matrix

PANEL = 32
KINDS = {torch.float32: 0, torch.bfloat16: 1}


@dataclass(frozen=True, slots=True)
class Panels:
    """``count`` matrices: the native handle, and the tensors whose memory it points to."""

    count: int
    handle: _cpu.Matrix
    memory: tuple[Tensor, ...]


def pack(weight: Matrix, bias: Tensor | None = None, *, paired: bool = False) -> Panels:
    """A matrix [N, K] or a stack [E, N, K], with a bias for each output feature.

    ``paired`` puts row i and row N/2 + i into the same panel: gate and up of one feature.
    """
    if isinstance(weight, Int8Matrix | Int4Matrix):
        raise InternalError("quantised weights come with the next change")
    out, into = weight.shape[-2:]
    source = weight if weight.dtype in KINDS else weight.float()
    source = source.reshape(-1, out, into).contiguous()
    kind, count = KINDS[source.dtype], len(source)
    data = torch.empty(count, lanes(out, paired), into, dtype=source.dtype)
    _cpu.pack(source.data_ptr(), count, out, into, paired, bool(kind), data.data_ptr())
    memory, bias_at = (data,), 0
    if bias is not None:
        flat = bias.float().reshape(count, out).contiguous()
        packed = torch.empty(count, lanes(out, paired))
        _cpu.pack(flat.data_ptr(), count, out, 1, paired, False, packed.data_ptr())
        memory, bias_at = (data, packed), packed.data_ptr()
    handle = _cpu.Matrix(kind, out, into, data.data_ptr(), 0, bias_at, 0, 0, 0, 0)
    return Panels(count, handle, memory)


def lanes(out: int, paired: bool) -> int:
    """Rows with padding: whole panels of 32, or of 16 pairs."""
    rows, panel = (out // 2, PANEL // 2) if paired else (out, PANEL)
    return -(-rows // panel) * PANEL
