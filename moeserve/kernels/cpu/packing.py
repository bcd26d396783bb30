"""Weights in the layout of the native kernels, made once.

Letters: E matrices of a stack, N output features, K input features, g groups of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeserve.kernels.cpu import _cpu
from moeserve.kernels.cpu.memory import SharedPages, empty_bytes
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
from moeserve.kernels.records import MatrixForm, WeightKind

FP32, BF16, INT8, INT4 = range(4)
KINDS = (WeightKind.FP32, WeightKind.BF16, WeightKind.INT8, WeightKind.INT4)
PANEL = 32
MOST_FEATURES = 1 << 17  # the greatest K whose int8 products surely add up in 32 bits


@dataclass(frozen=True, slots=True)
class Panels:
    """``count`` matrices of a form: the native handle, and the memory it points to.

    ``arrays`` are data, scales, biases and zero points, uint8 [count, bytes of one matrix].
    """

    count: int
    form: MatrixForm
    handle: _cpu.Matrix
    arrays: tuple[Tensor | None, ...]
    levels: Tensor | None

    @property
    def memory(self) -> tuple[Tensor, ...]:
        return tuple(part for part in self.arrays if part is not None)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.memory)


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """The native handle, and the memory it points to. ``order`` is the record of each expert."""

    handle: _cpu.Experts
    gate_up: Panels
    down: Panels
    order: Tensor | None = None


def pack(
    weight: Source,
    bias: Tensor | None = None,
    *,
    paired: bool = False,
    pages: SharedPages | None = None,
) -> Panels:
    """A matrix [N, K] or a stack [E, N, K], with a bias for each output feature.

    ``paired`` puts row i and row N/2 + i into the same panel: gate and up of one feature. Small
    ones are put into ``pages`` that they share with others.
    """
    *leading, out, into = weight.shape
    stack = PackedStack.of(weight, paired)
    assert not paired or out % 2 == 0, weight.shape
    assert stack.kind in (FP32, BF16) or into <= MOST_FEATURES, weight.shape
    nbytes = stack.count * _cpu.packed_bytes(stack.kind, out, into, stack.group, paired)
    data = empty_bytes(nbytes) if pages is None else pages.take(nbytes)
    scale = pack_codes(stack, into, data)
    zero, same_zero = pack_zeros(stack)
    first = stack.blocks[0]
    levels = first.levels if isinstance(first, Int4Matrix) else None
    assert levels is None or (zero is None and not same_zero), "levels have no zero points"
    biases = None
    if bias is not None:
        biases = pack_floats(list(bias) if leading else [bias], [out], stack.count, paired)
    form = MatrixForm(
        KINDS[stack.kind],
        out,
        into,
        count=stack.count if leading else None,
        paired=paired,
        biased=bias is not None,
        group=stack.group,
        zero=None if zero is not None else same_zero,
        levels=levels,
    )
    arrays = [
        None if array is None else array.view(torch.uint8).view(stack.count, -1)
        for array in (data, scale, biases, zero)
    ]
    return panels_of(form, stack.count, arrays)


def panels_of(form: MatrixForm, count: int, arrays: Sequence[Tensor | None]) -> Panels:
    """Over packed arrays; the native handle points to the first matrix of each."""
    levels = None if form.levels is None else torch.tensor(form.levels, dtype=torch.int8)
    assert levels is None or len(levels) == 16, form.levels
    data, scale, bias, zero = map(address, arrays)
    handle = _cpu.Matrix(
        KINDS.index(form.kind),
        form.out_features,
        form.in_features,
        data,
        scale,
        bias,
        zero,
        address(levels),
        form.group,
        form.zero or 0,
    )
    return Panels(count, form, handle, tuple(arrays), levels)


def array_sizes(form: MatrixForm) -> tuple[int, int, int, int]:
    """Bytes of one matrix's data, scales, biases and zero points."""
    n, k, kind = form.out_features, form.in_features, KINDS.index(form.kind)
    rows = lanes(n, form.paired)
    zeros = rows * form.groups if form.kind is WeightKind.INT4 and form.zero is None else 0
    data = _cpu.packed_bytes(kind, n, k, form.group, form.paired)
    return data, 4 * rows * form.groups, 4 * rows * form.biased, zeros


@dataclass(frozen=True, slots=True)
class PackedStack:
    """What is packed: ``count`` matrices of the same blocks, each block of ``rows`` rows."""

    blocks: list[Block]
    count: int
    rows: list[int]
    kind: int
    group: int
    paired: bool

    @staticmethod
    def of(weight: Source, paired: bool) -> PackedStack:
        *leading, _, _ = weight.shape
        assert len(leading) < 2, weight.shape
        blocks, count = blocks_of(weight), leading[0] if leading else 1
        rows = [block.shape[0] for block in blocks[: len(blocks) // count]]
        return PackedStack(blocks, count, rows, *kind_of(blocks[0]), paired)


def pack_codes(stack: PackedStack, into: int, data: Tensor) -> Tensor | None:
    """Fill ``data`` with the panels; the scales of codes, packed, or None where there are none.

    CheckpointError where floats that are to be rounded hold NaN or infinity.
    """
    codes = Addresses([codes_of(block) for block in stack.blocks])
    if isinstance(stack.blocks[0], Rounded):
        scale = torch.empty(stack.count * lanes(sum(stack.rows), stack.paired))
        stored = BF16 if codes.dtype is torch.bfloat16 else FP32
        to = data.data_ptr(), scale.data_ptr()
        if not _cpu.round_and_pack(stored, codes.at, stack.rows, into, stack.paired, *to):
            raise next(
                not_finite(b) for b in stack.blocks if isinstance(b, Rounded) and not finite(b)
            )
        return scale
    _cpu.pack(stack.kind, codes.at, stack.rows, into, stack.group, stack.paired, data.data_ptr())
    scales = [b.scale for b in stack.blocks if isinstance(b, Int8Matrix | Int4Matrix)]
    return pack_floats(scales, stack.rows, stack.count, stack.paired) if scales else None


def pack_zeros(stack: PackedStack) -> tuple[Tensor | None, int]:
    """int4's zero points, packed, or None and the one that all groups have."""
    zeros = [b.zero for b in stack.blocks if isinstance(b, Int4Matrix)]
    same = int(zeros[0].flatten()[0]) if zeros and zeros[0].numel() else 0
    if not any(bool((z != same).any()) for z in zeros):
        return None, same
    return pack_floats(zeros, stack.rows, stack.count, stack.paired).to(torch.uint8), same


def address(part: Tensor | None) -> int:
    return 0 if part is None else part.data_ptr()


class Addresses:
    """Of tensors of one dtype; they stay valid as long as this lives."""

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


def finite(block: Rounded) -> bool:
    return bool(block.floats.isfinite().all())


def pack_floats(parts: Sequence[Tensor], rows: Sequence[int], count: int, paired: bool) -> Tensor:
    """Per output feature, or per output feature and group: biases, scales, zeros."""
    floats = Addresses([part.float() for part in parts])
    columns = parts[0].shape[1] if parts[0].ndim == 2 else 1
    packed = torch.empty(count * lanes(sum(rows), paired) * columns)
    _cpu.pack_floats(floats.at, list(rows), columns, paired, packed.data_ptr())
    return packed


def lanes(out: int, paired: bool) -> int:
    """Rows with padding: whole panels of 32, or of 16 pairs."""
    rows, panel = (out // 2, PANEL // 2) if paired else (out, PANEL)
    return -(-rows // panel) * PANEL
