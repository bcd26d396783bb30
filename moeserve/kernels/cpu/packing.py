"""Weights in the layout of the native kernels, made once.

Letters: E matrices of a stack, N output features, K input features, g groups of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeserve.kernels.cpu import _cpu
from moeserve.kernels.matrix import (
    Block,
    Int4Matrix,
    Int8Matrix,
    Pieces,
    Rounded,
    Source,
    not_finite,
    part_of,
)

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


def pack(weight: Source, bias: Tensor | None = None, *, paired: bool = False) -> Panels:
    """A matrix [N, K] or a stack [E, N, K], with a bias for each output feature.

    ``paired`` puts row i and row N/2 + i into the same panel: gate and up of one feature.
    """
    *leading, out, into = weight.shape
    count = leading[0] if leading else 1
    assert len(leading) < 2, weight.shape
    assert not paired or out % 2 == 0, weight.shape
    blocks = blocks_of(weight)
    first = blocks[0]
    rows = [block.shape[0] for block in blocks[: len(blocks) // count]]
    kind, group = kind_of(first)
    assert kind in (FP32, BF16) or into <= MOST_FEATURES, weight.shape
    data = fresh(count * _cpu.packed_bytes(kind, out, into, group, paired))
    memory = [data]

    def floats(parts: Sequence[Tensor], rows: Sequence[int]) -> int:
        memory.append(pack_floats(parts, rows, count, paired))
        return memory[-1].data_ptr()

    scale = zero = levels = same_zero = 0
    codes = Held([codes_of(block) for block in blocks])
    if isinstance(first, Rounded):
        memory.append(torch.empty(count * lanes(out, paired)))
        scale, stored = memory[-1].data_ptr(), BF16 if codes.dtype is torch.bfloat16 else FP32
        to = data.data_ptr(), scale
        if not _cpu.round_and_pack(stored, codes.at, rows, into, paired, *to):
            raise next(not_finite(b) for b in blocks if isinstance(b, Rounded) and not sound(b))
    else:
        _cpu.pack(kind, codes.at, rows, into, group, paired, data.data_ptr())
    if isinstance(first, Int8Matrix | Int4Matrix):
        same = [b.scale for b in blocks if isinstance(b, Int8Matrix | Int4Matrix)]
        scale = floats(same, rows)
    if isinstance(first, Int4Matrix):
        zeros = [b.zero for b in blocks if isinstance(b, Int4Matrix)]
        same_zero = int(zeros[0].flatten()[0]) if zeros[0].numel() else 0
        if any(bool((z != same_zero).any()) for z in zeros):
            memory.append(pack_floats(zeros, rows, count, paired).to(torch.uint8))
            zero = memory[-1].data_ptr()
        if first.levels is not None:
            memory.append(torch.tensor(first.levels, dtype=torch.int8))
            assert memory[-1].shape == (16,), first.levels
            assert not zero and not same_zero, "levels have no zero points"
            levels = memory[-1].data_ptr()
    bias_at = 0
    if bias is not None:
        bias_at = floats(list(bias) if leading else [bias], [out])
    handle = _cpu.Matrix(
        kind, out, into, data.data_ptr(), scale, bias_at, zero, levels, group, same_zero
    )
    return Panels(count, handle, tuple(memory))


class Held:
    """Tensors of one dtype and their addresses, which stay valid as long as this lives."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._parts = [part.contiguous() for part in parts]
        self.dtype = self._parts[0].dtype
        self.at = [part.data_ptr() for part in self._parts]


def blocks_of(weight: Source) -> list[Block]:
    """Of every matrix in turn, all cut alike."""
    if isinstance(weight, Pieces):
        return [block for blocks in weight.blocks for block in blocks]
    if len(weight.shape) == 2:
        return [weight]
    if isinstance(weight, Rounded):
        return [Rounded(floats, weight.name) for floats in weight.floats]
    return [part_of(weight, e) for e in range(weight.shape[0])]


def kind_of(block: Block) -> tuple[int, int]:
    """What it is kept as, and features per group."""
    if isinstance(block, Int8Matrix | Rounded):
        return INT8, 0
    if isinstance(block, Int4Matrix):
        return INT4, block.group
    return (BF16 if block.dtype is torch.bfloat16 else FP32), 0


def codes_of(block: Block) -> Tensor:
    """What is read, in a dtype that the kernels know."""
    if isinstance(block, Int8Matrix):
        assert block.codes.dtype is torch.int8, block.codes.dtype
        return block.codes
    if isinstance(block, Int4Matrix):
        assert block.packed.dtype is torch.uint8, block.packed.dtype
        return block.packed
    floats = block.floats if isinstance(block, Rounded) else block
    return floats if floats.dtype is torch.bfloat16 else floats.float()


def sound(block: Rounded) -> bool:
    return bool(block.floats.isfinite().all())


def pack_floats(parts: Sequence[Tensor], rows: Sequence[int], count: int, paired: bool) -> Tensor:
    """Per output feature, or per output feature and group: biases, scales, zeros."""
    held = Held([part.float() for part in parts])
    columns = parts[0].shape[1] if parts[0].ndim == 2 else 1
    packed = torch.empty(count * lanes(sum(rows), paired) * columns)
    _cpu.pack_floats(held.at, list(rows), columns, paired, packed.data_ptr())
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
