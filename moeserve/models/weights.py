"""Tensors of a checkpoint as the op table takes them: stored codes kept, floats rounded if asked.

Matrices keep how they are stored, or become what ``Rounding`` says. Norms, biases, sinks, routers
and the embedding are small or decide much, so they stay floats. Whatever needs no change goes to
the op table as views of the mapped file, in ``Pieces``. Letters as in ``kernels.ops``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import overload

import torch
from torch import Tensor

from moeserve.config.options import KvDtype, Quantization
from moeserve.errors import CheckpointError
from moeserve.kernels.matrix import (
    Block,
    Int8Matrix,
    Matrix,
    Pieces,
    Rounded,
    form_of,
    joined,
    like,
    tensors_of,
    to_float,
    to_int4,
    to_int8,
)
from moeserve.kernels.ops import Experts, Linear, Ops
from moeserve.kernels.wire import Combine
from moeserve.models.checkpoint import Checkpoint, HeaderView
from moeserve.models.formats.layouts import Stored
from moeserve.models.spec import MoeSpec

FEED_FORWARD = (".mlp.", ".block_sparse_moe.")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def torch_dtype(name: KvDtype) -> torch.dtype | None:
    """Of a setting's word; None is what "auto" leaves to the checkpoint."""
    return DTYPES.get(name)


@dataclass(frozen=True, slots=True)
class Rounding:
    """``to`` is "auto" (as stored), "none" (floats), "int8" per row, or "int4": in groups, where
    it costs least, which is in feed-forward matrices (docs/quantization.md), and int8 elsewhere.

    ``attention`` False leaves attention's matrices in floats when others are rounded.
    """

    to: Quantization = "auto"
    attention: bool = True

    def of(self, module: str) -> Quantization:
        if self.to not in ("int8", "int4"):
            return self.to
        if ".self_attn." in module and not self.attention:
            return "none"
        return self.to if any(part in module for part in FEED_FORWARD) else "int8"


AS_STORED = Rounding()


@dataclass(frozen=True, slots=True)
class Weights:
    """Reads and packs; ``progress`` is called with (bytes read, bytes in all).

    ``own`` are the experts wanted of each layer, in their order, by layer number; all of a layer
    that is not there. ``combine`` is how what they make is added.
    """

    checkpoint: Checkpoint
    stored: Stored
    ops: Ops
    dtype: torch.dtype
    rounding: Rounding = AS_STORED
    progress: Callable[[int, int], None] | None = None
    own: Mapping[int, Sequence[int]] = field(default_factory=dict)
    combine: Combine = Combine.EXACT

    def headers(self) -> Weights:
        """The same, with tensors that have a shape and no data."""
        view = HeaderView(self.checkpoint)
        stored = replace(self.stored, checkpoint=view, rounded=Counter())
        return replace(self, checkpoint=view, stored=stored, progress=None)

    def has(self, name: str) -> bool:
        return self.checkpoint.has(name)

    def has_module(self, module: str) -> bool:
        """Whether it is there, as floats or as blocks of GGUF."""
        return self.has(f"{module}.weight") or self.stored.in_blocks(module)

    def matrix(self, module: str, out: int, into: int) -> Block:
        """[N, K] of ``module``, as it will be packed."""
        as_stored = self.rounding.of(module) == "auto"
        read = self.stored.linear if as_stored else self.stored.exactly
        matrix = read(module, out, into)
        self._report_progress()
        return self.held(module, matrix)

    def rows(self, modules: Sequence[str], outs: Sequence[int], into: int) -> Pieces:
        """Several modules of one input, one under the other."""
        parts = [self.matrix(m, out, into) for m, out in zip(modules, outs, strict=True)]
        return Pieces((tuple(alike(parts)),), stacked=False)

    def floats(self, module: str, out: int, into: int) -> Tensor:
        """In fp32, however it is stored: routers, and what is never rounded."""
        matrix = self.stored.exactly(module, out, into)
        self._report_progress()
        return to_float(matrix)

    def embedding(self, module: str, vocab: int, hidden: int) -> Tensor:
        """A view of the file where that has the weight dtype: only rows looked up are read."""
        table = self.stored.table(module, vocab, hidden, self.dtype)
        self._report_progress()
        return table

    def vector(self, name: str, size: int) -> Tensor:
        return self.exact(name, size)

    def vectors(self, names: Sequence[str | None], sizes: Sequence[int]) -> Tensor:
        """Several, one behind the other; zeros for one without a name."""
        both = zip(names, sizes, strict=True)
        return torch.cat(
            [torch.zeros(n) if name is None else self.vector(name, n) for name, n in both]
        )

    def exact(self, name: str, *shape: int) -> Tensor:
        """A plain tensor in fp32."""
        tensor = self.checkpoint.get(name, shape).float()
        self._report_progress()
        return tensor

    def exact_rows(self, name: str, rows: Sequence[int], *shape: int) -> Tensor:
        """Some rows of a plain tensor, in fp32."""
        tensor = torch.stack(self.checkpoint.rows(name, shape, rows)).float()
        self._report_progress()
        return tensor

    def has_experts(self, name: str) -> bool:
        """Whether the experts of a layer lie in one tensor of this name."""
        return self.has(name) or self.stored.has_experts(name)

    def experts(
        self, name: str, num: int, out: int, into: int, own: Sequence[int], *, transposed: bool,
        paired: bool = False,
    ) -> Pieces:  # fmt: skip
        """[E, N, K] of ``own`` of the experts in one tensor. ``transposed`` plain ones lie as
        [E, K, N], and then ``paired`` rows alternate gate and up: ours are all gates first
        (GPT-OSS)."""
        found: Sequence[Matrix]
        if self.stored.has_experts(name):
            found = self.stored.experts(name, num, out, into, own)
        elif transposed:
            found = [x.mT for x in self.checkpoint.rows(name, (num, into, out), own)]
        else:
            found = self.checkpoint.rows(name, (num, out, into), own)
        self._report_progress()
        cut = apart if transposed and paired else undivided
        return stacked([cut(self.held(name, matrix)) for matrix in found])

    def routed(self, prefix: str, spec: MoeSpec, hidden: int, own: Sequence[int]) -> Experts | None:
        """Routed experts ``own`` of the layer ``prefix`` where they need no packing; None where
        they are read tensor by tensor."""
        return None

    def linear(self, module: str, out: int, into: int, *, bias: bool = False) -> Linear:
        packed_bias = self.vector(f"{module}.bias", out) if bias else None
        return self.ops.pack_linear(self.matrix(module, out, into), packed_bias)

    def held(self, module: str, matrix: Matrix) -> Block:
        """What is kept of a matrix that was read: codes, or floats of the weight dtype."""
        to = self.rounding.of(module)
        if to == "auto" and not isinstance(matrix, Tensor):
            return matrix
        if to in ("auto", "none"):
            return (matrix if isinstance(matrix, Tensor) else to_float(matrix)).to(self.dtype)
        if to == "int8" and isinstance(matrix, Int8Matrix):
            return matrix
        name = f"{self.checkpoint.path}: {module}"
        plain = isinstance(matrix, Tensor) and matrix.dtype in (torch.bfloat16, torch.float32)
        floats = matrix if isinstance(matrix, Tensor) and plain else to_float(matrix)
        if to == "int8" or floats.shape[-1] % 2:
            return Rounded(floats, name)
        if not floats.is_meta and not bool(floats.abs().amax().isfinite()):
            raise CheckpointError(
                f"{name} holds NaN or infinity and cannot be rounded to {to}; load it with "
                f"quantization none"
            )
        return to_int4(floats)

    def _report_progress(self) -> None:
        if self.progress is not None:
            self.progress(self.checkpoint.bytes_read, self.checkpoint.total_bytes)


def alike(parts: Sequence[Block]) -> list[Block]:
    """Parts of one form: where they differ, floats if any is, otherwise int8."""
    if len({form_of(p) for p in parts}) == 1:
        return list(parts)
    whole = [joined(p) for p in parts]
    dtypes = {p.dtype for p in whole if isinstance(p, Tensor)}
    if dtypes:
        common = dtypes.pop() if len(dtypes) == 1 else torch.float32
        return [to_float(p).to(common) for p in whole]
    return [p if isinstance(p, Int8Matrix) else to_int8(to_float(p)) for p in whole]


def stacked(parts: Sequence[Sequence[Block]], own: Sequence[int] | None = None) -> Pieces:
    """Matrices cut alike, each in one block of rows or more; only ``own``, in the form that all of
    them have."""
    same, cuts = alike([block for blocks in parts for block in blocks]), len(parts[0])
    wanted = range(len(parts)) if own is None else own
    return Pieces(tuple(tuple(same[i * cuts : (i + 1) * cuts]) for i in wanted), stacked=True)


def apart(matrix_NK: Block) -> list[Block]:
    """Even rows, then odd ones."""
    return [pick(matrix_NK, slice(i, None, 2)) for i in (0, 1)]


def undivided(matrix_NK: Block) -> list[Block]:
    return [matrix_NK]


@overload
def pick(matrix: Matrix, *index: int | slice) -> Matrix: ...
@overload
def pick(matrix: Block, *index: int | slice) -> Block: ...
def pick(matrix: Block, *index: int | slice) -> Block:
    """Rows, experts or heads of a matrix: any index that leaves the last dimension whole."""
    if isinstance(matrix, Rounded):
        return Rounded(matrix.floats[index], matrix.name)
    return like(matrix, [t[index] for t in tensors_of(matrix)])
