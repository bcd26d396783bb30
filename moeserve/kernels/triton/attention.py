"""The paged cache on a device, and attention over it. Letters: see ``ops``.

Which rows go into which tile follows from an ``AttentionBatch``, whose numbers are on the host: it
is found out once for a step and copied to the device. What tiles make of each segment stands in
memory until the segments are merged; where that would be more than ``MOST_PARTIAL`` bytes, rows are
taken in several turns.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeserve.errors import InternalError
from moeserve.kernels.ops import (
    ATTENTION_SEGMENT,
    ATTENTION_STEP,
    AttentionBatch,
    KvCache,
    KvShape,
)
from moeserve.kernels.reference.kv import KvPart, ReferenceCache, parts_of
from moeserve.kernels.triton.device import pages as kernels
from moeserve.kernels.triton.launch import BACKEND, launch, power_at_least
from moeserve.kernels.triton.tiles import query_tile

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
LEAST_SIZE = {torch.float32: 16, torch.bfloat16: 16, torch.int8: 32}  # of a product
# Over fp32 nothing is rounded by steps: they are as long as registers allow.
STEPS = {torch.float32: 16, torch.bfloat16: ATTENTION_STEP, torch.int8: ATTENTION_STEP}
MOST_PARTIAL = 1 << 28


@dataclass(frozen=True, slots=True)
class Tiles:
    """``tiles`` int32 [n, 4]: sequence, first row, rows and position of the first; on the device.
    ``rows[i]`` is the first row of tile i, and at the end their number; on the host."""

    tiles: Tensor
    rows: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class DeviceBatch(AttentionBatch):
    """An ``AttentionBatch`` with what kernels read of it: blocks, and how many positions each row
    sees (``ends_T``; ``most`` of them all). Where it is ``checked``, whoever made it answers for
    its numbers, which are on the device alone."""

    blocks: Tensor
    ends_T: Tensor
    rows: int
    most: int
    shares: dict[int, Tiles] = field(default_factory=dict)
    bounds: dict[int, int] = field(default_factory=dict)
    checked: bool = False

    @staticmethod
    def of(batch: AttentionBatch, device: torch.device) -> DeviceBatch:
        starts, contexts = batch.query_start_S1.numpy(), batch.context_S.numpy()
        count = np.diff(starts)
        sequence = np.repeat(np.arange(len(count)), np.maximum(count, 0))
        ends = contexts[sequence] - starts[1:][sequence] + np.arange(len(sequence)) + 1
        return DeviceBatch(
            batch.query_start_S1,
            batch.context_S,
            batch.blocks_SM,
            blocks=batch.blocks_SM.to(device).contiguous(),
            ends_T=torch.from_numpy(ends.astype(np.int32)).to(device),
            rows=len(sequence),
            most=int(contexts.max(initial=0)),
        )

    def blocks_needed(self, page: int) -> int:
        """Where blocks have so many positions, a cache must have more than the greatest number in
        the tables; far too many where no cache can fit."""
        if self.checked:
            return 0
        if page not in self.bounds:
            count, contexts = np.diff(self.query_start_S1.numpy()), self.context_S.numpy()
            table, needed = self.blocks_SM.numpy(), -(-contexts // page)
            used = table[np.arange(table.shape[1])[None, :] < needed[:, None]]
            sound = (count >= 0) & (contexts >= count) & (needed <= table.shape[1])
            fits = bool(sound.all()) and int(used.min(initial=0)) >= 0
            self.bounds[page] = int(used.max(initial=-1)) + 1 if fits else sys.maxsize
        return self.bounds[page]

    def shared_by(self, rows: int) -> Tiles:
        """Tiles of at most so many rows of one sequence."""
        if rows not in self.shares:
            self.shares[rows] = self._cut(rows)
        return self.shares[rows]

    def _cut(self, rows: int) -> Tiles:
        starts, contexts = self.query_start_S1.numpy(), self.context_S.numpy()
        count = np.diff(starts).astype(np.int64)
        pieces = -(-count // rows)
        sequence = np.repeat(np.arange(len(count)), pieces)
        turn = np.arange(len(sequence)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        first = starts[sequence] + turn * rows
        taken = np.minimum(rows, count[sequence] - turn * rows)
        position = contexts[sequence] - count[sequence] + turn * rows
        tiles = np.stack((sequence, first, taken, position), 1).astype(np.int32)
        where = np.append(first, self.rows).astype(np.int64)
        return Tiles(torch.from_numpy(tiles).to(self.blocks.device), where)


def write(cache: KvCache, k_TGD: Tensor, v_TGV: Tensor | None, slot_T: Tensor) -> None:
    """The last dimensions have no gaps. InternalError for a slot that is not one of the
    cache, where the slots are on the host."""
    pages, shape = cast("ReferenceCache", cache.data), cache.shape
    slots = shape.num_blocks * shape.block_size
    if slot_T.is_cpu and len(slot_T):
        least, most = slot_T.aminmax()
        if least < 0 or most >= slots:
            raise InternalError(
                f"write_kv: a slot of {int(least)}..{int(most)} is not in 0..{slots - 1}"
            )
    if v_TGV is not None:
        write_part(pages.values, v_TGV, slot_T, shape)
        write_part(pages.keys[0], k_TGD, slot_T, shape)
        return
    for part, x_TGD in zip(pages.keys, parts_of(k_TGD, shape), strict=True):
        write_part(part, x_TGD, slot_T, shape)


def write_part(part: KvPart, x_TGD: Tensor, slot_T: Tensor, shape: KvShape) -> None:
    rows, heads, size = x_TGD.shape
    launch(
        kernels.write_kernel,
        (rows, heads),
        x_TGD.device,
        *(x_TGD, slot_T, part.x_BPGD, part.scale_BPG, heads, size),
        *(x_TGD.stride(0), x_TGD.stride(1), shape.num_blocks * shape.block_size),
        KIND=KINDS[shape.dtype],
        BLOCK=power_at_least(size, 16),
    )


def attend(
    q_TAD: Tensor,
    cache: KvCache,
    batch: DeviceBatch,
    scale: float,
    window: int | None,
    sinks_A: Tensor | None,
) -> Tensor:
    """[T, A, V]. InternalError where the batch and the cache do not fit."""
    shape = cache.shape
    rows, heads, _ = q_TAD.shape
    if batch.blocks_needed(shape.block_size) > shape.num_blocks or batch.rows != rows:
        raise InternalError(f"paged_attention: contexts or blocks do not fit {shape}: {rows} rows")
    device = q_TAD.device
    out = torch.empty(rows, heads, shape.value_size, device=device)
    segments = -(-batch.most // ATTENTION_SEGMENT)
    together = heads * segments * (shape.value_size + 2) * 4
    group = heads // shape.kv_heads
    queries = query_tile(shape.dtype, shape.latent, BACKEND).queries
    each = min(queries, power_at_least(group))
    tiles = batch.shared_by(queries // each)
    at, end = 0, len(tiles.rows) - 1
    while at < end:
        last = int(np.searchsorted(tiles.rows, tiles.rows[at] + MOST_PARTIAL // together, "right"))
        last = min(end, max(at + 1, last - 1))
        turn = slice(int(tiles.rows[at]), int(tiles.rows[last]))
        partial = Partial.of(turn, heads, segments, shape.value_size, device)
        run_tiles(q_TAD, cache, batch, tiles.tiles[at:last], partial, (scale, window or 0, each))
        launch(
            kernels.merge_kernel,
            (turn.stop - turn.start, heads),
            device,
            *(partial.highs, partial.totals, partial.means, sinks_A),
            *(batch.ends_T[turn], out[turn], window or 0, heads, shape.value_size, segments),
            V=power_at_least(shape.value_size, 16),
            SEGMENT=ATTENTION_SEGMENT,
        )
        at = last
    return out


@dataclass(frozen=True, slots=True)
class Partial:
    """Of rows ``first`` and on: highest scores and totals [rows, A, segments], means [.., V]."""

    first: int
    segments: int
    highs: Tensor
    totals: Tensor
    means: Tensor

    @staticmethod
    def of(turn: slice, heads: int, segments: int, size: int, device: torch.device) -> Partial:
        places = (turn.stop - turn.start, heads, segments)
        highs, totals = torch.empty(2, *places, device=device)
        return Partial(
            turn.start, segments, highs, totals, torch.empty(*places, size, device=device)
        )


def run_tiles(
    q_TAD: Tensor,
    cache: KvCache,
    batch: DeviceBatch,
    tiles: Tensor,
    partial: Partial,
    how: tuple[float, int, int],
) -> None:
    """``how``: scale, window (0: none), and heads of a row in a tile."""
    pages, shape, (scale, window, each) = cast("ReferenceCache", cache.data), cache.shape, how
    heads, least = q_TAD.shape[1], LEAST_SIZE[shape.dtype]
    tile, group = query_tile(shape.dtype, shape.latent, BACKEND), heads // shape.kv_heads
    rest = pages.keys[1] if len(pages.keys) > 1 else None
    sizes = [part.x_BPGD.shape[-1] for part in pages.keys] + [0]
    launch(
        kernels.attend_kernel,
        (len(tiles), shape.kv_heads * -(-group // each), partial.segments),
        q_TAD.device,
        *(q_TAD, *of_part(pages.keys[0]), *of_part(rest), *of_part(pages.values)),
        *(batch.blocks, tiles, partial.highs, partial.totals, partial.means),
        *(scale, window, batch.blocks.shape[1], partial.segments, partial.first),
        heads=heads,
        kv_heads=shape.kv_heads,
        group=group,
        d_size=sizes[0],
        r_size=sizes[1],
        v_size=shape.value_size,
        page=shape.block_size,
        KIND=KINDS[shape.dtype],
        LATENT=shape.latent,
        SHARED=each < tile.queries,
        BM=tile.queries,
        HEADS=each,
        D=power_at_least(sizes[0], least),
        R=power_at_least(sizes[1], least) if sizes[1] else 0,
        V=power_at_least(sizes[0] if shape.latent else shape.value_size, least),
        SEGMENT=ATTENTION_SEGMENT,
        STEP=STEPS[shape.dtype],
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def of_part(part: KvPart | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if part is None else (part.x_BPGD, part.scale_BPG)
