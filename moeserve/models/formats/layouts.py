"""One function per way of storing a matrix: tensors of an open checkpoint in, a ``Matrix`` out.

Shapes come from the model's config and are checked against every header before data is read;
scales must be finite and not negative. What our formats cannot hold exactly (fp8, several groups
of 8 bits, groups in any order) is read as floats, and rounded to int8 where codes are wanted.
Letters: N output features, K input features, G groups in a row, B bytes in a row, E experts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moeserve.errors import CheckpointError
from moeserve.kernels.matrix import (
    Int4Matrix,
    Int8Matrix,
    Matrix,
    pack_nibbles,
    to_int8,
    unpack_nibbles,
)
from moeserve.models.checkpoint import FLOATS, Checkpoint
from moeserve.models.formats import grouped
from moeserve.models.formats.method import AWQ, COMPRESSED, FP8, GGUF, GPTQ, MXFP4, Method
from moeserve.models.gguf import blocks as gguf
from moeserve.models.gguf.block_types import SUFFIXES

# Where AWQ puts feature c of every eight.
_AWQ_NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)
# Powers of two, halved as the codes of E2M1 are doubled.
_E8M0_HALVES = tuple(2.0 ** (e - 128) for e in range(256))
_MX_GROUP = 32


@dataclass(frozen=True, slots=True)
class Stored:
    """The matrices of a checkpoint. ``rounded`` counts those that were rounded anew, by method."""

    checkpoint: Checkpoint
    method: Method
    rounded: Counter[str] = field(default_factory=Counter)

    def linear(self, module: str, out: int, into: int) -> Matrix:
        """[N, K] of ``module``, in codes if stored so; plain floats are a view of the file."""
        found = self._blocks(module, out, into)
        if found is not None and found[0] in gguf.EXACT:
            return gguf.to_groups(*found)
        if found is not None:
            self.rounded[found[0]] += 1
            return gguf.to_rows(*found)
        matrix = self.exactly(module, out, into)
        if not isinstance(matrix, Tensor) or self._reader(module) is None:
            return matrix
        self.rounded[self.method.name] += 1
        return to_int8(matrix)

    def exactly(self, module: str, out: int, into: int) -> Matrix:
        """As ``linear``, but codes that no format of ours holds are read as fp32."""
        read = self._reader(module)
        if read is None:
            return self.checkpoint.get(f"{module}.weight", (out, into))
        return read(self, module, out, into)

    def in_blocks(self, module: str) -> bool:
        """Whether it is blocks of GGUF."""
        return any(self.checkpoint.has(f"{module}.{end}") for end in SUFFIXES)

    def plain_dtype(self, module: str) -> torch.dtype:
        """Of its floats, or those that models are published in where it is blocks of GGUF."""
        name = f"{module}.weight"
        return torch.bfloat16 if self.in_blocks(module) else self.checkpoint.dtype(name)

    def table(self, module: str, rows: int, size: int, dtype: torch.dtype) -> Tensor:
        """[rows, size] of an embedding: a view of the file where it has this type."""
        found = self._blocks(module, rows, size)
        if found is not None:
            return gguf.to_values(*found, dtype)
        table = self.checkpoint.get(f"{module}.weight", (rows, size))
        aligned = table.is_meta or table.data_ptr() % table.itemsize == 0
        return table.to(dtype, copy=not aligned)

    def _blocks(self, module: str, out: int, into: int) -> tuple[str, Tensor] | None:
        """The type, and rows of blocks [N, B], of a module that a GGUF file has so."""
        if self.method.name != GGUF:
            return None
        for end, kind in SUFFIXES.items():
            name = f"{module}.{end}"
            if not self.checkpoint.has(name):
                continue
            shape = self.checkpoint.shape(name)
            if len(shape) != 2 or (shape[0], gguf.features_of(kind, shape[1])) != (out, into):
                raise self._wrong(
                    name, f"has rows of bytes {list(shape)}, its metadata implies {[out, into]}"
                )
            raw = self._get(name, shape, torch.uint8)
            if not gguf.sound(kind, raw):
                raise self._wrong(name, "holds a scale that is not finite")
            return kind, raw
        return None

    def _gguf(self, module: str, out: int, into: int) -> Matrix:
        found = self._blocks(module, out, into)
        assert found is not None, module
        return gguf.to_groups(*found) if found[0] in gguf.EXACT else gguf.to_values(*found)

    def _reader(self, module: str) -> _Reader | None:
        """None for plain floats."""
        for part, methods, read in _BY_TENSOR:
            name = f"{module}.{part}"
            if self.checkpoint.has(name):
                self._belongs(name, methods)
                return read
        name = f"{module}.weight"
        kind = self.checkpoint.dtype(name)
        if kind not in _BY_DTYPE:
            return None
        methods, read = _BY_DTYPE[kind]
        self._belongs(name, methods)
        return read

    def experts(
        self, name: str, num: int, out: int, into: int, own: Sequence[int]
    ) -> list[Int4Matrix]:
        """[N, K] of each of ``own``, of a stack in MXFP4: e2m1 codes, one power of two per 32 of
        them."""
        self._belongs(f"{name}_blocks", (MXFP4,))
        groups = -(-into // _MX_GROUP)
        bytes_only = (torch.uint8,)
        blocks = self.checkpoint.rows(f"{name}_blocks", (num, out, groups, 16), own, bytes_only)
        powers = self.checkpoint.rows(f"{name}_scales", (num, out, groups), own, bytes_only)
        found = []
        for block, power in zip(blocks, powers, strict=True):
            self._sound(f"{name}_scales", power != 255, "holds NaN")
            scale = torch.tensor(_E8M0_HALVES)[power.long()]
            packed = block.flatten(-2)[..., : into // 2]
            zero = torch.zeros(scale.shape, dtype=torch.uint8)
            found.append(Int4Matrix(packed, scale, zero, _MX_GROUP, gguf.E2M1))
        return found

    def has_experts(self, name: str) -> bool:
        return self.checkpoint.has(f"{name}_blocks")

    def needless(self, name: str) -> bool:
        """What a method stores beside its codes and we have no use for: activations are scaled by
        the token here, and GPTQ writes biases of zeros."""
        if not self.method.name:
            return False
        if name.endswith(_SCALES_OF_ACTIVATIONS):
            return True
        if not name.endswith(".bias") or self.method.name not in (GPTQ, AWQ):
            return False
        return not _any(self.checkpoint.get(name))

    def _int8(self, module: str, out: int, into: int) -> Matrix:
        codes = self._get(f"{module}.weight", (out, into), torch.int8)
        scale, group = self._scales(f"{module}.weight_scale", out, into)
        zero = None
        if self.checkpoint.has(f"{module}.weight_zero_point"):
            name = f"{module}.weight_zero_point"
            zero = self._get(name, self.checkpoint.shape(name), torch.int8)
            zero = self._per_row(name, zero, out).expand(scale.shape)
        return self._bytes(codes, scale, zero, group)

    def _fp8(self, module: str, out: int, into: int) -> Matrix:
        values = self._get(f"{module}.weight", (out, into), torch.float8_e4m3fn).float()
        name = f"{module}.weight_scale"
        name = f"{name}_inv" if self.checkpoint.has(f"{name}_inv") else name
        shape, block = self.checkpoint.shape(name), self.method.block
        if block is not None and shape == (-(-out // block[0]), -(-into // block[1])):
            scale = self._scale(name, shape).repeat_interleave(block[0], 0)[:out]
            values *= grouped.spread(scale, block[1], into)
        else:
            values *= self._per_row(name, self._scale(name, shape), out)
        self._sound(f"{module}.weight", values.isfinite(), "holds NaN or overflows")
        return values

    def _packed(self, module: str, out: int, into: int) -> Matrix:
        """compressed-tensors: codes along the row, 8 of 4 bits or 4 of 8 in an int32."""
        c, name = self.checkpoint, f"{module}.weight_packed"
        if c.has(f"{module}.weight_shape"):
            declared = self._get(f"{module}.weight_shape", (2,), torch.int64)
            right = declared == torch.tensor([out, into])
            self._sound(
                f"{module}.weight_shape", right, f"is not {[out, into]}, as config.json has"
            )
        words = c.shape(name)[-1]
        bits = self._bits(name, words, into)
        packed = _octets(self._get(name, (out, words), torch.int32))
        scale, group = self._scales(f"{module}.weight_scale", out, into)
        zero = torch.full(scale.shape, 1 << (bits - 1), dtype=torch.uint8)
        if c.has(f"{module}.weight_zero_point"):
            zname = f"{module}.weight_zero_point"
            rows = -(-out * bits // 32)
            stored = self._get(zname, (rows, scale.shape[1]), torch.int32)
            zero = _codes(stored.mT, bits)[:, :out].mT
        index = None
        if c.has(f"{module}.weight_g_idx"):
            index = self._index(f"{module}.weight_g_idx", into, scale.shape[1], group)
        return self._grouped(packed, scale, zero, group, bits, into, index)

    def _gptq(self, module: str, out: int, into: int) -> Matrix:
        name = f"{module}.qweight"
        words = self.checkpoint.shape(name)[0]
        bits = self._bits(name, words, into)
        if words * 32 != into * bits:
            raise self._wrong(name, f"{words} rows do not hold {into} codes of {bits} bits")
        packed = _octets(self._get(name, (words, out), torch.int32).mT)
        scale, group = self._scales(f"{module}.scales", out, into, transposed=True)
        zeros = self._get(f"{module}.qzeros", (scale.shape[1], -(-out * bits // 32)), torch.int32)
        zero = _codes(zeros, bits)[:, :out].mT
        if self.method.zeros_less_one:
            zero = (zero + 1) & ((1 << bits) - 1)
        index = None
        if self.checkpoint.has(f"{module}.g_idx"):
            index = self._index(f"{module}.g_idx", into, scale.shape[1], group)
        return self._grouped(packed, scale, zero, group, bits, into, index)

    def _awq(self, module: str, out: int, into: int) -> Matrix:
        name = f"{module}.qweight"
        if out % 8:
            raise self._wrong(name, f"{out} output features are not whole words of 8")
        stored = self._get(name, (into, out // 8), torch.int32)
        scale, group = self._scales(f"{module}.scales", out, into, transposed=True)
        zeros = self._get(f"{module}.qzeros", (scale.shape[1], out // 8), torch.int32)
        codes, zero = (_in_order(_codes(x, 4)).mT for x in (stored, zeros))
        return self._grouped(pack_nibbles(codes), scale, zero, group, 4, into, None)

    def _grouped(
        self,
        packed: Tensor,
        scale: Tensor,
        zero: Tensor,
        group: int,
        bits: int,
        into: int,
        index: Tensor | None,
    ) -> Matrix:
        if index is None and bits == 8:
            signed, shifted = ((x ^ 128).view(torch.int8) for x in (packed[:, :into], zero))
            return self._bytes(signed, scale, shifted, group)
        if index is None and into % 2 == 0:
            return grouped.int4(packed[:, : into // 2], scale, zero, group)
        order = torch.arange(into) // group if index is None else index.long()
        codes = packed if bits == 8 else unpack_nibbles(packed)
        values = codes[:, :into].float() - zero.float()[:, order]
        return values.mul_(scale[:, order])

    def _bytes(self, codes: Tensor, scale: Tensor, zero: Tensor | None, group: int) -> Matrix:
        if scale.shape[1] == 1 and (zero is None or not _any(zero)):
            return Int8Matrix(codes, scale[:, 0].contiguous())
        values, width = codes.float(), codes.shape[1]
        if zero is not None:
            values -= grouped.spread(zero.float(), group, width)
        return values.mul_(grouped.spread(scale, group, width))

    def _scales(
        self, name: str, out: int, into: int, *, transposed: bool = False
    ) -> tuple[Tensor, int]:
        """[N, G] and the size of a group; one scale for everything becomes one per row."""
        shape = self.checkpoint.shape(name)
        scale = self._scale(name, shape)
        if transposed:
            scale = scale.mT if scale.ndim == 2 else scale
        elif scale.ndim < 2:
            scale = self._per_row(name, scale, out)
        if scale.ndim != 2 or scale.shape[0] != out:
            raise self._wrong(name, f"has shape {list(shape)}, expected scales of {out} rows")
        group = grouped.group_size(into, scale.shape[1], self.method.groups)
        if group is None:
            raise self._wrong(
                name,
                f"has {scale.shape[1]} groups for {into} features, which no group size of "
                f"config.json explains",
            )
        return scale, group

    def _scale(self, name: str, shape: tuple[int, ...]) -> Tensor:
        scale = self._get(name, shape, *FLOATS).float()
        if scale.numel() and not scale.is_meta:
            least, most = torch.aminmax(scale)  # NaN where there is any
            if not (least.item() >= 0 and most.item() < math.inf):
                raise self._wrong(name, "holds a scale that is negative or not finite")
        return scale

    def _per_row(self, name: str, scale: Tensor, out: int) -> Tensor:
        """[N, 1] from [], [1], [N] or [N, 1]."""
        if scale.numel() not in (1, out):
            raise self._wrong(name, f"has shape {list(scale.shape)}, expected 1 or {out} scales")
        return scale.reshape(-1, 1).expand(out, 1)

    def _index(self, name: str, into: int, groups: int, group: int) -> Tensor | None:
        """None where features lie in their groups' order."""
        index = self._get(name, (into,), torch.int32, torch.int64)
        if index.is_meta:  # of a header there is nothing more to check
            return None
        within = (index >= 0) & (index < groups)
        self._sound(name, within, f"holds a group outside 0..{groups - 1}")
        return index if _any(index != torch.arange(into) // group) else None

    def _bits(self, name: str, words: int, into: int) -> int:
        for bits in (4, 8):
            if words == -(-into * bits // 32):
                return bits
        raise self._wrong(
            name, f"has {words} words of 32 bits for {into} features: only 4 and 8 bits are known"
        )

    def _get(self, name: str, shape: tuple[int, ...], *kinds: torch.dtype) -> Tensor:
        return self.checkpoint.get(name, shape, kinds)

    def _belongs(self, name: str, methods: tuple[str, ...]) -> None:
        if self.method.name not in methods:
            named = f"the method {self.method.name!r}" if self.method.name else "no method"
            dtype = str(self.checkpoint.dtype(name)).removeprefix("torch.")
            raise self._wrong(
                name,
                f"has dtype {dtype}, quantised as {' or '.join(methods)} would have it, "
                f"and config.json names {named}",
            )

    def _sound(self, name: str, holds: Tensor, problem: str) -> None:
        if _any(~holds):
            raise self._wrong(name, problem)

    def _wrong(self, name: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.checkpoint.path}: tensor {name}: {problem}")


_SCALES_OF_ACTIVATIONS = tuple(
    f".{what}_{part}"
    for what in ("input", "output", "k", "v", "q")
    for part in ("scale", "zero_point", "global_scale")
)
_Reader = Callable[[Stored, str, int, int], Matrix]


def _qweight(stored: Stored, module: str, out: int, into: int) -> Matrix:
    read = stored._awq if stored.method.name == AWQ else stored._gptq
    return read(module, out, into)


_BY_TENSOR: tuple[tuple[str, tuple[str, ...], _Reader], ...] = (
    ("weight_packed", (COMPRESSED,), Stored._packed),
    ("qweight", (GPTQ, AWQ), _qweight),
    *((end, (GGUF,), Stored._gguf) for end in SUFFIXES),
)
_BY_DTYPE: dict[torch.dtype, tuple[tuple[str, ...], _Reader]] = {
    torch.int8: ((COMPRESSED,), Stored._int8),
    torch.float8_e4m3fn: ((FP8, COMPRESSED), Stored._fp8),
}


def _any(x: Tensor) -> bool:
    """False for a tensor without data: a survey of headers has nothing to test."""
    return not x.is_meta and bool(x.any())


def _codes(words: Tensor, bits: int) -> Tensor:
    """uint8 codes along the last dimension of int32 words, the lowest bits first."""
    return unpack_nibbles(_octets(words)) if bits == 4 else _octets(words)


def _octets(words: Tensor) -> Tensor:
    """The bytes of int32 words, lowest first."""
    flat = words.reshape(-1).view(torch.uint8)
    return flat.view(*words.shape[:-1], 4 * words.shape[-1])


def _in_order(codes: Tensor) -> Tensor:
    """AWQ shuffles every eight."""
    return codes.view(len(codes), -1, 8)[..., list(_AWQ_NIBBLE)].flatten(-2)
