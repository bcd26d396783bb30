"""KV blocks as bytes: how a block of one layer's cache lies once it has left the cache.

``Ops.export_kv`` writes this layout and ``Ops.import_kv`` reads it, whatever a backend's cache
looks like inside. So two backends that hold the same numbers export the same bytes, and a block may
enter another cache, under another block number, of another backend: what transfer between peers, a
pool of blocks, migration and offload store and send. There is no digest and no header here: whoever
moves blocks adds them.

A block is its sections, one after the other without gaps, little-endian, row-major:

    keys    [P, G, D]   numbers of ``dtype``; of a latent (G = 1) the value part comes first
    values  [P, G, V]   numbers of ``dtype``; a latent has none: they are in the key
    scales  [P, G, S]   fp32, int8 only. S is 2: of the key and of the value, or of a latent's value
                        part and of the rest; 1 where a latent is all value part

int8 numbers are codes -127..127 as ``matrix.quantize_rows`` makes them. A position that was never
written exports whatever bytes the cache holds there. Several blocks are rows [N, ``nbytes``].

Letters: N blocks, P positions per block, G KV heads, D head size, V value size, S scales.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moeserve.errors import InternalError
from moeserve.kernels.ops import KvCache, KvShape

DTYPES = (torch.float32, torch.bfloat16, torch.int8)


@dataclass(frozen=True, slots=True)
class KvSection:
    """``shape`` numbers of ``dtype`` from byte ``start`` of a block on."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        return self.start + self.nbytes


@dataclass(frozen=True, slots=True)
class KvBlockLayout:
    """What a block's bytes mean. Equal layouts can exchange blocks; there is no conversion."""

    dtype: torch.dtype
    block_size: int
    kv_heads: int
    head_size: int
    value_size: int
    latent: bool

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InternalError(f"KV of {self.dtype}: expected one of {DTYPES}")

    @staticmethod
    def of(shape: KvShape) -> KvBlockLayout:
        return KvBlockLayout(
            shape.dtype,
            shape.block_size,
            shape.kv_heads,
            shape.head_size,
            shape.value_size,
            shape.latent,
        )

    @property
    def num_scales(self) -> int:
        """Per position and head."""
        if self.dtype is not torch.int8:
            return 0
        return 1 if self.latent and self.head_size == self.value_size else 2

    @property
    def sections(self) -> tuple[KvSection, ...]:
        """Those that are not empty, in their order."""
        widths = (
            ("keys", self.dtype, self.head_size),
            ("values", self.dtype, 0 if self.latent else self.value_size),
            ("scales", torch.float32, self.num_scales),
        )
        found: list[KvSection] = []
        for name, dtype, width in widths:
            if width:
                start = found[-1].end if found else 0
                found.append(KvSection(name, dtype, (self.block_size, self.kv_heads, width), start))
        return tuple(found)

    @property
    def nbytes(self) -> int:
        """Of one block: where its last section ends."""
        width = self.head_size + (0 if self.latent else self.value_size)
        row = width * self.dtype.itemsize + self.num_scales * torch.float32.itemsize
        return self.block_size * self.kv_heads * row

    def check_blocks(self, data_NX: Tensor, count: int) -> None:
        """InternalError unless ``data_NX`` is uint8 and holds ``count`` blocks of this layout."""
        if data_NX.dtype is not torch.uint8 or data_NX.shape != (count, self.nbytes):
            raise InternalError(
                f"{data_NX.dtype} {list(data_NX.shape)} are not {count} KV blocks of "
                f"{self.nbytes} bytes ({self}): the sender's cache must have the same layout"
            )

    def room_for(self, count: int, out_NX: Tensor | None) -> Tensor:
        """uint8 [N, ``nbytes``] to write ``count`` blocks to: ``out_NX``, InternalError where it is
        something else, or a new one."""
        if out_NX is None:
            return torch.empty(count, self.nbytes, dtype=torch.uint8)
        self.check_blocks(out_NX, count)
        if not out_NX.is_contiguous():
            raise InternalError(
                f"a tensor with strides {out_NX.stride()} cannot take {count} KV blocks: rows must "
                "follow one another"
            )
        return out_NX

    def split(self, data_NX: Tensor) -> dict[str, Tensor]:
        """The sections [N, P, G, ...] of checked blocks, by name; copies."""
        found = {}
        for s in self.sections:
            numbers = data_NX[:, s.start : s.end].clone(memory_format=torch.contiguous_format)
            found[s.name] = numbers.view(s.dtype).view(len(data_NX), *s.shape)  # copies are aligned
        return found

    def join(self, sections: dict[str, Tensor]) -> Tensor:
        """uint8 [N, ``nbytes``] of the sections [N, P, G, ...]."""
        flat = [
            sections[s.name].contiguous().view(-1, math.prod(s.shape)).view(torch.uint8)
            for s in self.sections
        ]
        return torch.cat(flat, 1)


def outside(what: str, cache: KvCache, blocks_N: Tensor) -> InternalError:
    return InternalError(
        f"{what}: a block of {blocks_N.tolist()} is not in 0..{cache.shape.num_blocks - 1}"
    )
