"""Tensors of a checkpoint as the op table takes them: stored codes kept, floats rounded if asked.

Matrices keep how they are stored, or become what ``Rounding`` says. Norms, biases, sinks, routers
and the embedding are small or decide much, so they stay floats. Letters as in ``kernels.ops``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeserve.errors import CheckpointError
from moeserve.kernels.matrix import (
    Int4Matrix,
    Int8Matrix,
    Matrix,
    rows_of,
    to_float,
    to_int4,
    to_int8,
)
from moeserve.kernels.ops import Linear, Ops
from moeserve.models.checkpoint import Checkpoint
from moeserve.models.formats.layouts import Stored

FEED_FORWARD = (".mlp.", ".block_sparse_moe.")
QUANTIZATIONS = ("auto", "none", "int8", "int4")


@dataclass(frozen=True, slots=True)
class Rounding:
    """``to`` is "auto" (as stored), "none" (floats), "int8" per row, or "int4": in groups, where
    it costs least, which is in feed-forward matrices (docs/quantization.md), and int8 elsewhere.

    ``attention`` False leaves attention's matrices in floats when others are rounded.
    """

    to: str = "auto"
    attention: bool = True

    def __post_init__(self) -> None:
        assert self.to in QUANTIZATIONS, self.to

    def of(self, module: str) -> str:
        if self.to not in ("int8", "int4"):
            return self.to
        if ".self_attn." in module and not self.attention:
            return "none"
        return self.to if any(part in module for part in FEED_FORWARD) else "int8"


AS_STORED = Rounding()


@dataclass(frozen=True, slots=True)
class Weights:
    """Reads and packs; ``progress`` hears (bytes read, bytes in all)."""

    checkpoint: Checkpoint
    stored: Stored
    ops: Ops
    dtype: torch.dtype
    rounding: Rounding = AS_STORED
    progress: Callable[[int, int], None] | None = None

    def has(self, name: str) -> bool:
        return self.checkpoint.has(name)

    def matrix(self, module: str, out: int, into: int) -> Matrix:
        """[N, K] of ``module``, as it will be packed."""
        as_stored = self.rounding.of(module) == "auto"
        read = self.stored.linear if as_stored else self.stored.exactly
        matrix = read(module, out, into)
        self._heard()
        return self.held(module, matrix)

    def rows(self, modules: Sequence[str], outs: Sequence[int], into: int) -> Matrix:
        """Several modules of one input, one under the other."""
        parts = [self.matrix(m, out, into) for m, out in zip(modules, outs, strict=True)]
        return rows_of(alike(parts))

    def floats(self, module: str, out: int, into: int) -> Tensor:
        """In fp32, however it is stored: routers, and what is never rounded."""
        matrix = self.stored.exactly(module, out, into)
        self._heard()
        return to_float(matrix)

    def embedding(self, module: str, vocab: int, hidden: int) -> Tensor:
        """A copy: rows are looked up as long as the model serves."""
        table = self.checkpoint.get(f"{module}.weight", (vocab, hidden))
        self._heard()
        return table.to(self.dtype, copy=True)

    def vector(self, name: str, size: int) -> Tensor:
        return self.exact(name, size)

    def exact(self, name: str, *shape: int) -> Tensor:
        """A plain tensor in fp32."""
        tensor = self.checkpoint.get(name, shape).float()
        self._heard()
        return tensor

    def has_experts(self, name: str) -> bool:
        """Whether the experts of a layer lie in one tensor of this name."""
        return self.has(name) or self.stored.has_experts(name)

    def experts(
        self, name: str, num: int, out: int, into: int, *, transposed: bool, paired: bool = False
    ) -> Matrix:
        """[E, N, K] of experts in one tensor. ``transposed`` plain ones lie as [E, K, N], and then
        ``paired`` rows alternate gate and up: ours are all gates first (GPT-OSS)."""
        if self.stored.has_experts(name):
            whole: Matrix = self.stored.experts(name, num, out, into)
        elif transposed:
            whole = self.checkpoint.get(name, (num, into, out)).mT
        else:
            whole = self.checkpoint.get(name, (num, out, into))
        self._heard()
        if transposed and paired:
            return stack(num, lambda e: self.held(name, apart(pick(whole, e))))
        return stack(num, lambda e: self.held(name, pick(whole, e)))

    def linear(self, module: str, out: int, into: int, *, bias: bool = False) -> Linear:
        packed_bias = self.vector(f"{module}.bias", out) if bias else None
        return self.ops.pack_linear(self.matrix(module, out, into), packed_bias)

    def held(self, module: str, matrix: Matrix) -> Matrix:
        """What is kept of a matrix that was read: codes, or floats of the weight dtype."""
        to = self.rounding.of(module)
        if to == "auto" and not isinstance(matrix, Tensor):
            return matrix
        if to in ("auto", "none"):
            return (matrix if isinstance(matrix, Tensor) else to_float(matrix)).to(self.dtype)
        if to == "int8" and isinstance(matrix, Int8Matrix):
            return matrix
        floats = to_float(matrix)
        if not floats.is_meta and not bool(floats.abs().amax().isfinite()):
            raise CheckpointError(
                f"{self.checkpoint.path}: {module} holds NaN or infinity and cannot be rounded to "
                f"{to}; load it with quantization none"
            )
        return to_int4(floats) if to == "int4" and floats.shape[-1] % 2 == 0 else to_int8(floats)

    def _heard(self) -> None:
        if self.progress is not None:
            self.progress(self.checkpoint.bytes_read, self.checkpoint.total_bytes)


def alike(parts: Sequence[Matrix]) -> list[Matrix]:
    """Parts of one kind: where they differ, floats if any is, otherwise int8."""
    if len({kind(p) for p in parts}) == 1:
        return list(parts)
    dtypes = {p.dtype for p in parts if isinstance(p, Tensor)}
    if dtypes:
        common = dtypes.pop() if len(dtypes) == 1 else torch.float32
        return [to_float(p).to(common) for p in parts]
    return [p if isinstance(p, Int8Matrix) else to_int8(to_float(p)) for p in parts]


def kind(matrix: Matrix) -> tuple[object, ...]:
    """Equal for matrices that can lie in one stack."""
    if isinstance(matrix, Tensor):
        return (matrix.dtype,)
    if isinstance(matrix, Int8Matrix):
        return (Int8Matrix,)
    return (Int4Matrix, matrix.group, matrix.levels)


def stack(count: int, read: Callable[[int], Matrix]) -> Matrix:
    """[count, N, K], read one by one into place. Kinds that differ are made alike."""
    first = read(0)
    room = [torch.empty((count, *part.shape), dtype=part.dtype) for part in tensors(first)]
    for e in range(count):
        matrix = read(e) if e else first
        if kind(matrix) != kind(first):
            both = first, matrix
            return stack(count, lambda e, both=both: alike([read(e), *both])[0])  # type: ignore[misc]
        for whole, part in zip(room, tensors(matrix), strict=True):
            whole[e].copy_(part)
    if isinstance(first, Tensor):
        return room[0]
    if isinstance(first, Int8Matrix):
        return Int8Matrix(room[0], room[1])
    return Int4Matrix(room[0], room[1], room[2], first.group, first.levels)


def apart(matrix_NK: Matrix) -> Matrix:
    """Even rows, then odd ones."""
    return rows_of([pick(matrix_NK, slice(i, None, 2)) for i in (0, 1)])


def tensors(matrix: Matrix) -> tuple[Tensor, ...]:
    if isinstance(matrix, Tensor):
        return (matrix,)
    if isinstance(matrix, Int8Matrix):
        return matrix.codes, matrix.scale
    return matrix.packed, matrix.scale, matrix.zero


def pick(matrix: Matrix, *index: int | slice | None) -> Matrix:
    """Rows, experts or heads of a matrix: any index that leaves the last dimension whole."""
    parts = [t[index] for t in tensors(matrix)]
    if isinstance(matrix, Tensor):
        return parts[0]
    if isinstance(matrix, Int8Matrix):
        return Int8Matrix(parts[0], parts[1])
    return Int4Matrix(parts[0], parts[1], parts[2], matrix.group, matrix.levels)
