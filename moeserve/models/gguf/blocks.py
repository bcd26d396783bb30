"""Blocks of a GGUF tensor to the matrices of the op table.

``Q4_0`` and ``MXFP4`` are exactly groups of 32 with 4-bit codes (``EXACT``). No format of ours has
the form of the others: ``Q8_0``, ``Q5_0`` and ``Q6_K`` have scales for parts of a row in more than
4 bits, ``Q4_1``, ``Q4_K``, ``Q5_1`` and ``Q5_K`` add a minimum that is no whole number of their
scale. They are read as fp32, or rounded to int8 per row, a piece at a time.

In fp32 every value is what llama.cpp's reference has, in its order of operations. Letters: N rows,
B bytes in a row, K features, b blocks in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeserve.kernels.matrix import Int4Matrix, Int8Matrix, pack_nibbles, to_int8
from moeserve.models.gguf.block_types import BY_NAME

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

EXACT = ("Q4_0", "MXFP4")
# E2M1, doubled to be whole, and the powers of two halved for that.
E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
NO_POWER = 255
_GROUP = 32
# Values made at a time: some 30 bytes each while they are.
_PIECE = 1 << 19


def features_of(kind: str, row_bytes: int) -> int:
    """K; 0 where the bytes are no whole blocks."""
    blocks, rest = divmod(row_bytes, BY_NAME[kind].nbytes)
    return 0 if rest else blocks * BY_NAME[kind].values


def to_groups(kind: str, raw_NB: Tensor) -> Int4Matrix:
    """[N, K] of one of ``EXACT``, exactly. A negative scale becomes a positive one of mirrored
    codes."""
    rows, size = len(raw_NB), features_of(kind, raw_NB.shape[1])
    levels = E2M1 if kind == "MXFP4" else None
    if raw_NB.is_meta:
        scale, packed = raw_NB.new_empty(rows, size // _GROUP), raw_NB.new_empty(rows, size // 2)
        return Int4Matrix(packed, scale.float(), scale, _GROUP, levels)
    packed_NC = torch.empty(rows, size // 2, dtype=torch.uint8)
    scale_Nb = torch.empty(rows, size // _GROUP)
    zero_Nb = torch.zeros(rows, size // _GROUP, dtype=torch.uint8)
    for at in _pieces(rows, size):
        blocks = _blocks(kind, raw_NB[at].numpy())
        if kind == "MXFP4":
            code = _nibbles(blocks[..., 1:])
            scale_Nb[at] = torch.from_numpy(_powers(blocks[..., 0]))
        else:
            code, step = _nibbles(blocks[..., 2:]), _half(blocks, 0)[..., 0]
            mirrored = np.signbit(step)
            code = np.where(mirrored[..., None], 15 - code, code)
            scale_Nb[at] = torch.from_numpy(np.abs(step))
            zero_Nb[at] = torch.from_numpy((8 - mirrored).astype(np.uint8))
        packed_NC[at] = pack_nibbles(torch.from_numpy(code.reshape(len(blocks), size)))
    return Int4Matrix(packed_NC, scale_Nb, zero_Nb, _GROUP, levels)


def to_values(kind: str, raw_NB: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[N, K] in fp32, or rounded to another type of floats."""
    size = features_of(kind, raw_NB.shape[1])
    found = torch.empty(len(raw_NB), size, dtype=dtype, device=raw_NB.device)
    if not raw_NB.is_meta:
        for at in _pieces(len(raw_NB), size):
            found[at] = _values(kind, raw_NB[at])
    return found


def to_rows(kind: str, raw_NB: Tensor) -> Int8Matrix:
    """[N, K] rounded to int8 per row."""
    size = features_of(kind, raw_NB.shape[1])
    codes = torch.empty(len(raw_NB), size, dtype=torch.int8, device=raw_NB.device)
    scale = torch.empty(len(raw_NB), device=raw_NB.device)
    if not raw_NB.is_meta:
        for at in _pieces(len(raw_NB), size):
            rounded = to_int8(_values(kind, raw_NB[at]))
            codes[at], scale[at] = rounded.codes, rounded.scale
    return Int8Matrix(codes, scale)


def sound(kind: str, raw_NB: Tensor) -> bool:
    """Whether every scale is a finite number; those of a header are."""
    if raw_NB.is_meta:
        return True
    size = features_of(kind, raw_NB.shape[1])
    pieces = (_blocks(kind, raw_NB[at].numpy()) for at in _pieces(len(raw_NB), size))
    if kind == "MXFP4":
        return all(bool((blocks[..., 0] != NO_POWER).all()) for blocks in pieces)
    halves = _HALVES[kind]
    return all(bool(np.isfinite(_half(b, at)).all()) for b in pieces for at in halves)


# Where the fp16 numbers of a block are.
_HALVES: Mapping[str, tuple[int, ...]] = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2),
    "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip


def _pieces(rows: int, size: int) -> Iterator[slice]:
    step = max(1, _PIECE // max(1, size))
    return (slice(at, min(rows, at + step)) for at in range(0, rows, step))


def _values(kind: str, raw_NB: Tensor) -> Tensor:
    blocks = _blocks(kind, raw_NB.numpy())
    return torch.from_numpy(_DECODERS[kind](blocks).reshape(len(blocks), -1))


def _blocks(kind: str, raw_NB: Bytes) -> Bytes:
    """[N, b, bytes of a block]."""
    return raw_NB.reshape(len(raw_NB), -1, BY_NAME[kind].nbytes)


def _half(blocks: Bytes, at: int) -> Floats:
    """The fp16 number at a byte of every block, [N, b, 1]."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """Low halves of the last dimension's bytes, then high ones."""
    return np.concatenate((packed & 15, packed >> 4), -1)


def _powers(exponent: Bytes) -> Floats:
    return np.ldexp(np.float32(1), exponent.astype(np.int32) - 128)


def _q4_0(blocks: Bytes) -> Floats:
    return (_nibbles(blocks[..., 2:]).view(np.int8) - np.int8(8)) * _half(blocks, 0)


def _q4_1(blocks: Bytes) -> Floats:
    return _nibbles(blocks[..., 4:]) * _half(blocks, 0) + _half(blocks, 2)


def _fifth_bits(packed: Bytes) -> Bytes:
    """Of 32 features, from 4 bytes."""
    return np.unpackbits(packed, axis=-1, bitorder="little") << np.uint8(4)


def _q5_0(blocks: Bytes) -> Floats:
    code = _nibbles(blocks[..., 6:]) | _fifth_bits(blocks[..., 2:6])
    return (code.view(np.int8) - np.int8(16)) * _half(blocks, 0)


def _q5_1(blocks: Bytes) -> Floats:
    code = _nibbles(blocks[..., 8:]) | _fifth_bits(blocks[..., 4:8])
    return code * _half(blocks, 0) + _half(blocks, 2)


def _q8_0(blocks: Bytes) -> Floats:
    return blocks[..., 2:].view(np.int8) * _half(blocks, 0)


def _six_bits(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Scales and minima of 8 groups of 32, from 12 bytes: [N, b, 8] each."""
    first, second, third = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scale = np.concatenate((first & 63, (third & 15) | (first >> 6 << 4)), -1)
    least = np.concatenate((second & 63, (third >> 4) | (second >> 6 << 4)), -1)
    return scale, least


def _groups_of_32(packed: Bytes) -> Bytes:
    """[N, b, 8, 32] of 128 bytes: every 32 of them hold two groups."""
    halves = packed.reshape(*packed.shape[:-1], 4, 1, 32)
    return np.concatenate((halves & 15, halves >> 4), -2).reshape(*packed.shape[:-1], 8, 32)


def _with_minima(blocks: Bytes, code: Bytes) -> Floats:
    scale, least = _six_bits(blocks[..., 4:16])
    step, base = _half(blocks, 0) * scale, _half(blocks, 2) * least
    found: Floats = code * step[..., None] - base[..., None]
    return found


def _q4_k(blocks: Bytes) -> Floats:
    return _with_minima(blocks, _groups_of_32(blocks[..., 16:]))


def _q5_k(blocks: Bytes) -> Floats:
    bit = np.arange(8, dtype=np.uint8)[:, None]
    fifth = (blocks[..., None, 16:48] >> bit & np.uint8(1)) << np.uint8(4)
    return _with_minima(blocks, _groups_of_32(blocks[..., 48:]) | fifth)


def _q6_k(blocks: Bytes) -> Floats:
    """Two halves of 128 features, each of 64 bytes with the low bits and 32 with the high ones."""
    shape = blocks.shape[:-1]
    low = blocks[..., :128].reshape(*shape, 2, 1, 2, 32)
    low = np.concatenate((low & 15, low >> 4), -3).reshape(*shape, 2, 4, 32)
    high = blocks[..., 128:192].reshape(*shape, 2, 1, 32)
    shift = np.array([0, 2, 4, 6], np.uint8)[:, None]
    code = (low | (high >> shift & 3) << 4).view(np.int8) - np.int8(32)
    step = _half(blocks, 208) * blocks[..., 192:208].view(np.int8)
    return code.reshape(*shape, 16, 16) * step[..., None]


def _mxfp4(blocks: Bytes) -> Floats:
    level = np.array(E2M1, np.int8)[_nibbles(blocks[..., 1:])]
    return level * _powers(blocks[..., :1])


_DECODERS: Mapping[str, Callable[[Bytes], Floats]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q4_K": _q4_k,
    "Q5_K": _q5_k, "Q6_K": _q6_k, "MXFP4": _mxfp4,
}  # fmt: skip
