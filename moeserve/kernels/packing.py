"""Weights in the layout of the native kernels, made once.

Letters: E matrices of a stack, N output features, K input features, g groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeserve.kernels import _cpu
from moeserve.kernels.matrix import Int4Matrix, Int8Matrix, Matrix

FP32, BF16, INT8, INT4 = range(4)
PANEL = 32
HUGE_PAGE = 2 << 20
MOST_FEATURES = 1 << 17  # the greatest K whose int8 products surely add up in 32 bits


@dataclass(frozen=True, slots=True)
class Panels:
    """``count`` matrices: the native handle, and the tensors whose memory it points to."""

    count: int
    handle: _cpu.Matrix
    memory: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.memory)


def pack(weight: Matrix, bias: Tensor | None = None, *, paired: bool = False) -> Panels:
    """A matrix [N, K] or a stack [E, N, K], with a bias for each output feature.

    ``paired`` puts row i and row N/2 + i into the same panel: gate and up of one feature.
    """
    *leading, out, into = weight.shape
    count = leading[0] if leading else 1
    assert len(leading) < 2, weight.shape
    assert not paired or out % 2 == 0, weight.shape
    kind, source, group = codes_of(weight)
    assert kind in (FP32, BF16) or into <= MOST_FEATURES, weight.shape
    source = source.contiguous()
    data = fresh(count * _cpu.packed_bytes(kind, out, into, group, paired))
    _cpu.pack(kind, source.data_ptr(), count, out, into, group, paired, data.data_ptr())
    memory = [data]

    def floats(x: Tensor) -> int:
        memory.append(pack_floats(x, count, out, paired))
        return memory[-1].data_ptr()

    scale = zero = levels = same_zero = 0
    if isinstance(weight, Int8Matrix | Int4Matrix):
        scale = floats(weight.scale)
    if isinstance(weight, Int4Matrix):
        same_zero = int(weight.zero.flatten()[0]) if weight.zero.numel() else 0
        if bool((weight.zero != same_zero).any()):
            memory.append(pack_floats(weight.zero, count, out, paired).to(torch.uint8))
            zero = memory[-1].data_ptr()
        if weight.levels is not None:
            memory.append(torch.tensor(weight.levels, dtype=torch.int8))
            assert memory[-1].shape == (16,), weight.levels
            assert not weight.zero.any(), "levels have no zero points"
            levels = memory[-1].data_ptr()
    bias_at = 0 if bias is None else floats(bias)
    handle = _cpu.Matrix(
        kind, out, into, data.data_ptr(), scale, bias_at, zero, levels, group, same_zero
    )
    return Panels(count, handle, tuple(memory))


def codes_of(weight: Matrix) -> tuple[int, Tensor, int]:
    """Kind, the tensor that holds the codes, features per group."""
    if isinstance(weight, Int8Matrix):
        assert weight.codes.dtype is torch.int8, weight.codes.dtype
        return INT8, weight.codes, 0
    if isinstance(weight, Int4Matrix):
        assert weight.packed.dtype is torch.uint8, weight.packed.dtype
        return INT4, weight.packed, weight.group
    if weight.dtype is torch.bfloat16:
        return BF16, weight, 0
    return FP32, weight.float(), 0


def pack_floats(x: Tensor, count: int, out: int, paired: bool) -> Tensor:
    """Per output feature, or per output feature and group: biases, scales, zeros."""
    flat = x.float().reshape(count, out, -1).contiguous()
    columns = flat.shape[2]
    packed = torch.empty(count * lanes(out, paired) * columns)
    _cpu.pack_floats(flat.data_ptr(), count, out, columns, paired, packed.data_ptr())
    return packed


def lanes(out: int, paired: bool) -> int:
    """Rows with padding: whole panels of 32, or of 16 pairs."""
    rows, panel = (out // 2, PANEL // 2) if paired else (out, PANEL)
    return -(-rows // panel) * PANEL


def fresh(nbytes: int) -> Tensor:
    """Untouched memory, in huge pages where it is large: few rows read it at memory bandwidth."""
    if nbytes < HUGE_PAGE:
        return torch.empty(nbytes, dtype=torch.uint8)
    room = torch.empty(nbytes + HUGE_PAGE, dtype=torch.uint8)
    skip = -room.data_ptr() % HUGE_PAGE
    data = room[skip : skip + nbytes]
    _cpu.use_huge_pages(data.data_ptr(), nbytes)
    return data
