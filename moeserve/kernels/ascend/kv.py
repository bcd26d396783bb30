"""The paged cache in device memory, where fused attention serves its shape, and attention over it.

bf16 alone. Keys [B, P, G, D] and values [B, P, G, V], or of a latent its value part [B, P, 1, 512]
and its rotated rest [B, P, 1, 64]. Latent queries go to the operator in pieces of at most 16 rows,
each with the context that its last row sees; what is not in the operator's reach (windows, sinks)
is attended to by the host's table, over a copy of the blocks in question.

Letters: see ``ops``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from moeserve.core import BlockId
from moeserve.kernels.ascend import calls
from moeserve.kernels.ascend.limits import MLA_MOST_ROWS, MOST_SEQUENCES
from moeserve.kernels.host_kv import HostKv
from moeserve.kernels.kv_layout import KvBlockLayout
from moeserve.kernels.kv_runs import check_places
from moeserve.kernels.ops import AttentionBatch, KvCache, KvRuns, KvShape, Ops
from moeserve.kernels.reference.kv import check_inside


@dataclass(slots=True)
class DeviceKv:
    """``first`` are keys, or a latent's value part; ``second`` values, or a latent's rest.
    ``passes`` of attention were done."""

    first: Tensor
    second: Tensor
    passes: int = 0

    @property
    def nbytes(self) -> int:
        return self.first.nbytes + self.second.nbytes


@dataclass(frozen=True, slots=True)
class QueryPiece:
    """Rows up to ``end``, the last of which sees ``context`` positions of sequence ``s``."""

    s: int
    end: int
    context: int


def widths(shape: KvShape) -> tuple[int, int]:
    """Of both parts."""
    if shape.latent:
        return shape.value_size, shape.head_size - shape.value_size
    return shape.head_size, shape.value_size


def new_cache(shape: KvShape, device: torch.device) -> KvCache:
    place = (shape.num_blocks, shape.block_size, shape.kv_heads)
    first, second = (
        torch.zeros(*place, width, dtype=shape.dtype, device=device) for width in widths(shape)
    )
    data = DeviceKv(first, second)
    return KvCache(shape, data.nbytes, data)


def data_of(cache: KvCache) -> DeviceKv | HostKv:
    return cast("DeviceKv | HostKv", cache.data)


def write(cache: KvCache, k_TGD: Tensor, v_TGV: Tensor | None, slot_T: Tensor) -> None:
    pages = cast("DeviceKv", cache.data)
    if v_TGV is None:
        k_TGD, v_TGV = torch.split(k_TGD, list(widths(cache.shape)), -1)
    kind = cache.shape.dtype
    first, second = k_TGD.to(kind).contiguous(), v_TGV.to(kind).contiguous()
    calls.write_cache(first, second, pages.first, pages.second, slot_T)


def pieces_of(batch: AttentionBatch, most_rows: int | None) -> list[QueryPiece]:
    """Sequences that have rows, cut where they have more than ``most_rows``."""
    starts, contexts = batch.query_start_S1.tolist(), batch.context_S.tolist()
    found: list[QueryPiece] = []
    for s, context in enumerate(contexts):
        begin, end = starts[s], starts[s + 1]
        step = most_rows or max(1, end - begin)
        for at in range(begin, end, step):
            stop = min(at + step, end)
            found.append(QueryPiece(s, stop, context - (end - stop)))
    return found


def attend(
    q_TAD: Tensor, cache: KvCache, batch: AttentionBatch, scale: float, mask_MM: Tensor
) -> Tensor:
    """[T, A, V] in fp32, by the fused operator."""
    pages, shape = cast("DeviceKv", cache.data), cache.shape
    pieces = pieces_of(batch, MLA_MOST_ROWS if shape.latent else None)
    parts: list[Tensor] = []
    begin = 0
    for at in range(0, len(pieces), MOST_SEQUENCES):
        some = pieces[at : at + MOST_SEQUENCES]
        q_some = q_TAD[begin : some[-1].end].to(shape.dtype)
        ends = [piece.end - begin for piece in some]
        lone = all(end - start == 1 for start, end in zip((0, *ends), ends, strict=False))
        tables_SM = batch.blocks_SM[[piece.s for piece in some]].to(q_TAD.device)
        first, second = pages.first.flatten(2), pages.second.flatten(2)
        rope, values = None, second
        if shape.latent:
            q_some, q_rope = torch.split(q_some, list(widths(shape)), -1)
            rope, values = (q_rope.contiguous(), second), first
        out = calls.paged_attention(
            q_some.contiguous(),
            first,
            values,
            rope=rope,
            mask_MM=None if lone else mask_MM,
            ends=ends,
            contexts=[piece.context for piece in some],
            blocks_SM=tables_SM.contiguous(),
            kv_heads=shape.kv_heads,
            scale=scale,
        )
        parts.append(out)
        begin = some[-1].end
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).float()


def copy_to_host(
    cache: KvCache, batch: AttentionBatch, host: Ops
) -> tuple[KvCache, AttentionBatch]:
    """The blocks that the batch sees, in a cache of the host's, and the batch over these."""
    size = cache.shape.block_size
    used_S = [-(-context // size) for context in batch.context_S.tolist()]
    seen = [row[:used] for row, used in zip(batch.blocks_SM, used_S, strict=True)]
    blocks_N, at_N = torch.unique(torch.cat(seen).long(), return_inverse=True)
    copy = host.new_kv(replace(cache.shape, num_blocks=max(1, len(blocks_N))))
    numbers_N = torch.arange(len(blocks_N))
    host.import_kv(copy, numbers_N, export_blocks(cache, blocks_N))
    tables_SM = torch.zeros_like(batch.blocks_SM)
    for row, part in zip(tables_SM, at_N.split(used_S), strict=True):
        row[: len(part)] = part.to(row.dtype)
    return copy, AttentionBatch(batch.query_start_S1, batch.context_S, tables_SM)


def export_blocks(cache: KvCache, blocks_N: Tensor, out_NX: Tensor | None = None) -> Tensor:
    layout, pages = KvBlockLayout.of(cache.shape), cast("DeviceKv", cache.data)
    check_inside("export_kv", cache, blocks_N)
    data_NX = layout.room_for(len(blocks_N), out_NX)
    chosen = blocks_N.to(pages.first.device)
    first, second = (part[chosen].cpu() for part in (pages.first, pages.second))
    if cache.shape.latent:
        sections = {"keys": torch.cat((first, second), -1)}
    else:
        sections = {"keys": first, "values": second}
    return data_NX.copy_(layout.join(sections))


def import_blocks(cache: KvCache, blocks_N: Tensor, data_NX: Tensor) -> None:
    layout, pages = KvBlockLayout.of(cache.shape), cast("DeviceKv", cache.data)
    check_inside("import_kv", cache, blocks_N)
    layout.check_blocks(data_NX, len(blocks_N))
    sections, device = layout.split(data_NX), pages.first.device
    first, second = sections["keys"], sections.get("values")
    if second is None:
        first, second = torch.split(first, list(widths(cache.shape)), -1)
    chosen = blocks_N.to(device)
    pages.first[chosen] = first.to(device)
    pages.second[chosen] = second.to(device)


@dataclass(frozen=True, slots=True)
class CachesOfTable:
    """A ``kv_runs.BlockKv`` of caches of which each is the device's or the host's."""

    table: Ops
    caches: Sequence[KvCache]

    @property
    def layouts(self) -> list[KvBlockLayout]:
        return [KvBlockLayout.of(cache.shape) for cache in self.caches]

    def export_kv(self, layer: int, blocks: Sequence[BlockId], out_NX: Tensor, /) -> None:
        self.table.export_kv(self.caches[layer], torch.tensor(blocks), out_NX)

    def import_kv(self, layer: int, blocks: Sequence[BlockId], data_NX: Tensor, /) -> None:
        self.table.import_kv(self.caches[layer], torch.tensor(blocks), data_NX)


def checked_runs(
    table: Ops, caches: Sequence[KvCache], blocks_B: Tensor, runs: KvRuns, data_X: Tensor
) -> tuple[CachesOfTable, list[BlockId]]:
    """InternalError where a run names what does not exist."""
    own, blocks = CachesOfTable(table, caches), list(map(BlockId, blocks_B.tolist()))
    check_places(own.layouts, blocks, runs, data_X)
    for layer, start, count, _ in runs.runs_R4.tolist():
        size = caches[layer].shape.block_size
        used_B = blocks_B[start // size : (start + count - 1) // size + 1]
        check_inside("runs", caches[layer], used_B)
    return own, blocks
