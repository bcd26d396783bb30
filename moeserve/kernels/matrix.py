"""Matrices in 8 and 4 bits, and how floats become them: the formats between loader and op table.

A row (one output feature) has its own scale. Rounding is to nearest, ties to even; codes are
symmetric (-127..127), so that negating a weight negates its code. Letters: ``...`` any leading
dimensions (experts, heads), N output features, K input features, g features per group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeserve.errors import CheckpointError

GROUP = 128
TINY = 2.0**-100


@dataclass(frozen=True, slots=True)
class Int8Matrix:
    """``codes`` int8 [..., N, K] times ``scale`` fp32 [..., N]."""

    codes: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape


@dataclass(frozen=True, slots=True)
class Int4Matrix:
    """(code - zero) * scale, where feature k belongs to group k // ``group``.

    ``packed`` uint8 [..., N, K / 2] holds feature 2i in the low nibble of byte i and 2i + 1 in
    the high one. ``scale`` is fp32 and ``zero`` uint8, both [..., N, ceil(K / g)]. A code stands
    for itself, or for ``levels[code]`` (16 values of int8, then ``zero`` is all 0): MXFP4.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor
    group: int = GROUP
    levels: tuple[int, ...] | None = None

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.packed.shape[:-1], 2 * self.packed.shape[-1]))


Matrix = Tensor | Int8Matrix | Int4Matrix


@dataclass(frozen=True, slots=True)
class Rounded:
    """Floats [..., N, K] that become what ``to_int8`` makes of them when they are packed.

    ``name`` is what an error calls them: NaN and infinity cannot be rounded.
    """

    floats: Tensor
    name: str

    @property
    def shape(self) -> torch.Size:
        return self.floats.shape


Block = Matrix | Rounded


@dataclass(frozen=True, slots=True)
class Pieces:
    """Matrices that were not joined yet, so that packing them is the only copy.

    ``blocks[e]`` are the rows of matrix e, one block [n, K] under the other; all blocks are of one
    ``form_of``, and all matrices are cut alike. [E, N, K] where ``stacked``, otherwise the only
    one, [N, K].
    """

    blocks: tuple[tuple[Block, ...], ...]
    stacked: bool

    def __post_init__(self) -> None:
        assert self.stacked or len(self.blocks) == 1, len(self.blocks)
        cuts = {tuple(b.shape for b in blocks) for blocks in self.blocks}
        assert len(cuts) == 1, cuts
        assert len({form_of(b) for blocks in self.blocks for b in blocks}) == 1, "several forms"

    @property
    def shape(self) -> torch.Size:
        first = self.blocks[0]
        whole = (sum(block.shape[0] for block in first), first[0].shape[1])
        return torch.Size((len(self.blocks), *whole) if self.stacked else whole)


Source = Matrix | Rounded | Pieces


def form_of(block: Block) -> tuple[object, ...]:
    """Equal for matrices that can lie in one."""
    if isinstance(block, Tensor):
        return (block.dtype,)
    if isinstance(block, Rounded):
        return (Rounded, block.floats.dtype)
    if isinstance(block, Int8Matrix):
        return (Int8Matrix,)
    return (Int4Matrix, block.group, block.levels)


def joined(source: Source) -> Matrix:
    """One matrix or stack, rounded where that was put off."""
    if isinstance(source, Pieces):
        if not source.stacked:
            return part_of(source, 0)
        return stack([part_of(source, e) for e in range(len(source.blocks))])
    if isinstance(source, Rounded):
        if not source.floats.is_meta and not bool(source.floats.abs().amax().isfinite()):
            raise not_finite(source)
        return to_int8(source.floats)
    return source


def not_finite(block: Rounded) -> CheckpointError:
    return CheckpointError(
        f"{block.name} holds NaN or infinity and cannot be rounded to int8; load it with "
        f"quantization none"
    )


def part_of(stack: Source, index: int) -> Matrix:
    """One matrix of several."""
    if isinstance(stack, Pieces):
        return rows_of([joined(block) for block in stack.blocks[index]])
    if isinstance(stack, Rounded):
        return joined(Rounded(stack.floats[index], stack.name))
    if isinstance(stack, Int8Matrix):
        return Int8Matrix(stack.codes[index], stack.scale[index])
    if isinstance(stack, Int4Matrix):
        parts = (stack.packed[index], stack.scale[index], stack.zero[index])
        return Int4Matrix(*parts, stack.group, stack.levels)
    return stack[index]


def to_int8(weight_NK: Tensor) -> Int8Matrix:
    """Round to nearest, one scale per row: the greatest magnitude becomes 127."""
    w = weight_NK.float()
    scale = w.abs().amax(-1) / 127
    codes = (w / scale.where(scale > 0, 1.0)[..., None]).round().clamp(-127, 127)
    return Int8Matrix(codes.to(torch.int8), scale)


def to_int4(weight_NK: Tensor, group: int = GROUP) -> Int4Matrix:
    """Round to nearest, symmetric (zero is 8), one scale per group of a row."""
    w = weight_NK.float()
    pad = -w.shape[-1] % group
    grouped = torch.nn.functional.pad(w, (0, pad)).reshape(*w.shape[:-1], -1, group)
    scale = grouped.abs().amax(-1) / 7
    codes = (grouped / scale.where(scale > 0, 1.0)[..., None]).round().clamp(-7, 7) + 8
    codes = codes.flatten(-2)[..., : w.shape[-1]].to(torch.uint8)
    zero = torch.full(scale.shape, 8, dtype=torch.uint8)
    return Int4Matrix(pack_nibbles(codes), scale, zero, group)


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 0..15 [..., K] to [..., K / 2], the even feature low."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def to_float(matrix: Matrix) -> Tensor:
    """What the codes stand for, in fp32; a plain tensor as it is, in fp32."""
    if isinstance(matrix, Tensor):
        return matrix.float()
    if isinstance(matrix, Int8Matrix):
        return matrix.codes.float() * matrix.scale[..., None]
    codes = unpack_nibbles(matrix.packed)
    value = codes.int() if matrix.levels is None else torch.tensor(matrix.levels)[codes.long()]
    spread = matrix.group
    zero = matrix.zero.int().repeat_interleave(spread, -1)[..., : codes.shape[-1]]
    scale = matrix.scale.repeat_interleave(spread, -1)[..., : codes.shape[-1]]
    return (value - zero).float() * scale


def rows_of(parts: Sequence[Matrix]) -> Matrix:
    """Matrices of one form and width, one under the other: the rows of all of them."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    assert len({form_of(p) for p in parts}) == 1, "matrices of several forms"
    rows = len(first.shape) - 2
    both = zip(*map(tensors_of, parts), strict=True)
    return like(first, [torch.cat(same, rows) for same in both])


def stack(parts: Sequence[Matrix]) -> Matrix:
    """[E, N, K] of E matrices of one form."""
    assert len({form_of(p) for p in parts}) == 1, "matrices of several forms"
    both = zip(*map(tensors_of, parts), strict=True)
    return like(parts[0], [torch.stack(same) for same in both])


def tensors_of(matrix: Matrix) -> tuple[Tensor, ...]:
    if isinstance(matrix, Tensor):
        return (matrix,)
    if isinstance(matrix, Int8Matrix):
        return matrix.codes, matrix.scale
    return matrix.packed, matrix.scale, matrix.zero


def like(matrix: Matrix, tensors: Sequence[Tensor]) -> Matrix:
    """A matrix of the same form of other tensors."""
    if isinstance(matrix, Tensor):
        return tensors[0]
    if isinstance(matrix, Int8Matrix):
        return Int8Matrix(tensors[0], tensors[1])
    return Int4Matrix(tensors[0], tensors[1], tensors[2], matrix.group, matrix.levels)


def quantize_rows(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Activations per token: codes int8 [T, K] and scale fp32 [T], the oracle of every backend.

    scale = max|x| / 127 and code = round(x * (127 / max|x|)), both in fp32. A row whose greatest
    magnitude is below 2^-100 has scale 0 and codes 0, for 127 over it may be no number; a row that
    holds NaN or an infinity has scale NaN and codes 0, so that everything computed from it is NaN.
    """
    most_T1 = x_TK.abs().amax(-1, keepdim=True)
    sound = most_T1.isfinite()
    some = sound & (most_T1 >= TINY)
    # A number over a tensor would be rounded twice: torch multiplies by the reciprocal.
    most_code = torch.full_like(most_T1, 127.0)
    factor = torch.where(some, most_code / most_T1, torch.zeros_like(most_T1))
    finite = torch.where(sound, x_TK, torch.zeros_like(x_TK))
    codes = (finite * factor).round().clamp(-127, 127).to(torch.int8)
    scale = torch.where(some, most_T1 / 127, torch.zeros_like(most_T1))
    scale = torch.where(sound, scale, torch.full_like(most_T1, torch.nan))
    return codes, scale[:, 0]
