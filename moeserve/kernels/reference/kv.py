"""The paged cache in plain torch, and attention over it one query head at a time.

An fp32 cache is one softmax over the whole past. The others are taken in the steps and segments
that ``ops`` states, because what is rounded there depends on them. Letters: see ``ops``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from moeserve.core import BlockId
from moeserve.kernels.kv_layout import KvBlockLayout, outside
from moeserve.kernels.kv_runs import (
    check_places,
    export_by_blocks,
    import_by_blocks,
)
from moeserve.kernels.matrix import quantize_rows
from moeserve.kernels.ops import (
    ATTENTION_SEGMENT,
    ATTENTION_STEP,
    AttentionBatch,
    KvCache,
    KvRuns,
    KvShape,
)


@dataclass(frozen=True, slots=True)
class KvPart:
    """Some features of every head and position; ``scale_BPG`` where ``x_BPGD`` are codes."""

    x_BPGD: Tensor
    scale_BPG: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.x_BPGD.nbytes + (0 if self.scale_BPG is None else self.scale_BPG.nbytes)

    def write(self, x_TGD: Tensor, block_T: Tensor, offset_T: Tensor) -> None:
        if self.scale_BPG is None:
            self.x_BPGD[block_T, offset_T] = x_TGD.to(self.x_BPGD.dtype)
            return
        codes, scale = quantize_rows(x_TGD.flatten(0, 1))
        self.x_BPGD[block_T, offset_T] = codes.view(x_TGD.shape)
        self.scale_BPG[block_T, offset_T] = scale.view(x_TGD.shape[:2])

    def of(self, blocks_M: Tensor, head: int, length: int) -> tuple[Tensor, Tensor]:
        """x [length, D] in fp32, and scale [length]."""
        x = self.x_BPGD[blocks_M][:, :, head].flatten(0, 1)[:length].float()
        if self.scale_BPG is None:
            return x, torch.ones(length)
        return x, self.scale_BPG[blocks_M][:, :, head].flatten()[:length]


@dataclass(slots=True)
class Passes:
    """Of attention, over one cache."""

    done: int = 0


@dataclass(frozen=True, slots=True)
class ReferenceCache:
    """``keys`` are one part, or two where the cache is latent; the first is then ``values`` too."""

    keys: tuple[KvPart, ...]
    values: KvPart
    passes: Passes = field(default_factory=Passes)

    @property
    def parts(self) -> tuple[KvPart, ...]:
        """Each once: the order of ``kv_layout``'s scales."""
        return self.keys if self.values is self.keys[0] else (*self.keys, self.values)


def bytes_per_block(shape: KvShape) -> int:
    width = shape.head_size + (0 if shape.latent else shape.value_size)
    parts = len(part_sizes(shape)) + (0 if shape.latent else 1)
    scales = 4 * parts if shape.dtype is torch.int8 else 0
    return shape.block_size * shape.kv_heads * (width * shape.dtype.itemsize + scales)


def new_cache(shape: KvShape) -> KvCache:
    place = (shape.num_blocks, shape.block_size, shape.kv_heads)

    def part(width: int) -> KvPart:
        scale = torch.zeros(place) if shape.dtype is torch.int8 else None
        return KvPart(torch.zeros(*place, width, dtype=shape.dtype), scale)

    values = part(shape.value_size)
    apart = part_sizes(shape)[1:] if shape.latent else part_sizes(shape)
    keys = tuple(part(size) for size in apart)
    nbytes = values.nbytes + sum(key.nbytes for key in keys)
    return KvCache(shape, nbytes, ReferenceCache((values, *keys) if shape.latent else keys, values))


def write(cache: KvCache, k_TGD: Tensor, v_TGV: Tensor | None, slot_T: Tensor) -> None:
    pages, shape = cast("ReferenceCache", cache.data), cache.shape
    place = slot_T.long() // shape.block_size, slot_T.long() % shape.block_size
    if v_TGV is not None:
        pages.values.write(v_TGV, *place)
        pages.keys[0].write(k_TGD, *place)
        return
    for part, x_TGD in zip(pages.keys, parts_of(k_TGD, shape), strict=True):
        part.write(x_TGD, *place)


def export_blocks(cache: KvCache, blocks_N: Tensor, out_NX: Tensor | None = None) -> Tensor:
    layout, pages = KvBlockLayout.of(cache.shape), cast("ReferenceCache", cache.data)
    check_inside("export_kv", cache, blocks_N)
    data_NX = layout.room_for(len(blocks_N), out_NX)
    chosen_N = blocks_N.to(pages.values.x_BPGD.device)
    scales = [part.scale_BPG[chosen_N] for part in pages.parts if part.scale_BPG is not None]
    sections = {"keys": torch.cat([key.x_BPGD[chosen_N] for key in pages.keys], -1)}
    if not cache.shape.latent:
        sections["values"] = pages.values.x_BPGD[chosen_N]
    if scales:
        sections["scales"] = torch.stack(scales, -1)
    return data_NX.copy_(layout.join(sections))


def import_blocks(cache: KvCache, blocks_N: Tensor, data_NX: Tensor) -> None:
    layout, pages = KvBlockLayout.of(cache.shape), cast("ReferenceCache", cache.data)
    check_inside("import_kv", cache, blocks_N)
    layout.check_blocks(data_NX, len(blocks_N))
    device = pages.values.x_BPGD.device
    sections, chosen_N = layout.split(data_NX.to(device)), blocks_N.to(device)
    widths = [key.x_BPGD.shape[-1] for key in pages.keys]
    for key, x_NPGD in zip(pages.keys, torch.split(sections["keys"], widths, -1), strict=True):
        key.x_BPGD[chosen_N] = x_NPGD
    if not cache.shape.latent:
        pages.values.x_BPGD[chosen_N] = sections["values"]
    for s, part in enumerate(pages.parts):
        if part.scale_BPG is not None:
            part.scale_BPG[chosen_N] = sections["scales"][..., s]


@dataclass(frozen=True, slots=True)
class CachesByBlocks:
    """A ``kv_runs.BlockKv`` of these caches."""

    caches: Sequence[KvCache]

    @property
    def layouts(self) -> list[KvBlockLayout]:
        return [KvBlockLayout.of(cache.shape) for cache in self.caches]

    def export_kv(self, layer: int, blocks: Sequence[BlockId], out_NX: Tensor, /) -> None:
        export_blocks(self.caches[layer], torch.tensor(blocks), out_NX)

    def import_kv(self, layer: int, blocks: Sequence[BlockId], data_NX: Tensor, /) -> None:
        import_blocks(self.caches[layer], torch.tensor(blocks), data_NX)


def export_runs(caches: Sequence[KvCache], blocks_B: Tensor, runs: KvRuns, out_X: Tensor) -> Tensor:
    by_blocks, blocks = _checked(caches, blocks_B, runs, out_X)
    return export_by_blocks(by_blocks, blocks, runs, out_X)


def import_runs(
    caches: Sequence[KvCache],
    blocks_B: Tensor,
    runs: KvRuns,
    digests_RD: Tensor,
    data_X: Tensor,
) -> Tensor:
    by_blocks, blocks = _checked(caches, blocks_B, runs, data_X)
    return import_by_blocks(by_blocks, blocks, runs, digests_RD, data_X)


class ReferenceKv:
    """What of an op table its caches are asked for, where they are ``ReferenceCache``: blocks as
    bytes, on whichever device they lie."""

    def kv_bytes_per_block(self, shape: KvShape) -> int:
        return bytes_per_block(shape)

    def export_kv(self, cache: KvCache, blocks_N: Tensor, out_NX: Tensor | None = None) -> Tensor:
        return export_blocks(cache, blocks_N, out_NX)

    def import_kv(self, cache: KvCache, blocks_N: Tensor, data_NX: Tensor) -> None:
        import_blocks(cache, blocks_N, data_NX)

    def export_runs(
        self, caches: Sequence[KvCache], blocks_B: Tensor, runs: KvRuns, out_X: Tensor
    ) -> Tensor:
        return export_runs(caches, blocks_B, runs, out_X)

    def import_runs(
        self,
        caches: Sequence[KvCache],
        blocks_B: Tensor,
        runs: KvRuns,
        digests_RD: Tensor,
        data_X: Tensor,
    ) -> Tensor:
        return import_runs(caches, blocks_B, runs, digests_RD, data_X)

    def kv_passes(self, cache: KvCache) -> int:
        return passes_of(cache).done


def _checked(
    caches: Sequence[KvCache], blocks_B: Tensor, runs: KvRuns, data_X: Tensor
) -> tuple[CachesByBlocks, list[BlockId]]:
    by_blocks, blocks = CachesByBlocks(caches), list(map(BlockId, blocks_B.tolist()))
    check_places(by_blocks.layouts, blocks, runs, data_X)
    for layer, start, count, _ in runs.runs_R4.tolist():
        size = caches[layer].shape.block_size
        used_B = blocks_B[start // size : (start + count - 1) // size + 1]
        check_inside("runs", caches[layer], used_B)
    return by_blocks, blocks


def passes_of(cache: KvCache) -> Passes:
    return cast("ReferenceCache", cache.data).passes


def check_inside(what: str, cache: KvCache, blocks_N: Tensor) -> None:
    if any(not 0 <= block < cache.shape.num_blocks for block in blocks_N.tolist()):
        raise outside(what, cache, blocks_N)


def part_sizes(shape: KvShape) -> list[int]:
    """Of a key: a latent's value comes first."""
    rest = shape.head_size - shape.value_size
    return [shape.value_size, rest] if shape.latent and rest else [shape.head_size]


def parts_of(x: Tensor, shape: KvShape) -> list[Tensor]:
    first, *_ = sizes = part_sizes(shape)
    return [x[..., :first], x[..., first:]][: len(sizes)]


def attend(
    q_TAD: Tensor,
    cache: KvCache,
    batch: AttentionBatch,
    scale: float,
    window: int | None,
    sinks_A: Tensor | None,
) -> Tensor:
    pages, shape = cast("ReferenceCache", cache.data), cache.shape
    heads, group = q_TAD.shape[1], q_TAD.shape[1] // shape.kv_heads
    out = torch.empty(len(q_TAD), heads, shape.value_size)
    starts, contexts = batch.query_start_S1.tolist(), batch.context_S.tolist()
    for s, context in enumerate(contexts):
        blocks = batch.blocks_SM[s, : -(-context // shape.block_size)].long()
        for g in range(shape.kv_heads):
            keys = [part.of(blocks, g, context) for part in pages.keys]
            values = pages.values.of(blocks, g, context)
            for t in range(starts[s], starts[s + 1]):
                end = context - (starts[s + 1] - t) + 1
                first = 0 if window is None else max(0, end - window)
                for a in range(g * group, (g + 1) * group):
                    score_P = scores(q_TAD[t, a], keys, shape, first, end) * scale
                    sink = None if sinks_A is None else sinks_A[a : a + 1].float()
                    out[t, a] = attend_row(score_P, values, shape.dtype, first, end, sink)
    return out


def scores(
    q_D: Tensor, keys: list[tuple[Tensor, Tensor]], shape: KvShape, first: int, end: int
) -> Tensor:
    total = torch.zeros(end - first)
    for q, (key, key_scale) in zip(parts_of(q_D, shape), keys, strict=True):
        rounded, factor = q.to(shape.dtype).float() if shape.dtype.is_floating_point else q, None
        if shape.dtype is torch.int8:
            codes, scale = quantize_rows(q[None])
            rounded, factor = codes[0].float(), scale[0] * key_scale[first:end]
        dot = torch.mv(key[first:end].contiguous(), rounded.clone())
        total = total + (dot if factor is None else dot * factor)
    return total


def attend_row(
    score_P: Tensor,
    values: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    first: int,
    end: int,
    sink: Tensor | None,
) -> Tensor:
    """[V]: the softmax's mean of the values at positions first .. end - 1."""
    v_PV, v_scale_P = values
    if dtype is torch.float32:
        logits = score_P if sink is None else torch.cat((score_P, sink))
        return torch.mv(v_PV[first:end].T.contiguous(), logits.softmax(0)[: end - first])
    whole = OnlineSoftmax.empty(v_PV.shape[1])
    for segment in cut(first, end, ATTENTION_SEGMENT):
        part = OnlineSoftmax.empty(v_PV.shape[1])
        for step in cut(segment.start, segment.stop, ATTENTION_STEP):
            score = score_P[step.start - first : step.stop - first]
            part = part.update(score, v_PV[step], v_scale_P[step], dtype)
        whole = whole.merge(part)
    if sink is not None:
        whole = whole.with_sink(sink[0])
    return whole.mean_V / whole.total


def cut(first: int, end: int, size: int) -> list[slice]:
    """first .. end - 1 in pieces that begin at multiples of ``size``, but for the first."""
    starts = range(first // size * size, end, size)
    return [slice(max(start, first), min(start + size, end)) for start in starts]


@dataclass(frozen=True, slots=True)
class OnlineSoftmax:
    """The softmax of the scores so far, from which it goes on without the scores themselves
    (Milakov and Gimelshein, 2018; with values: FlashAttention, Dao et al., 2022).

    ``highest`` is m, the greatest score; ``total`` is l, the sum of exp(score - m); ``mean_V`` the
    sum of exp(score - m) * value, which the caller divides by l at the end.
    """

    highest: Tensor
    total: Tensor
    mean_V: Tensor

    @staticmethod
    def empty(size: int) -> OnlineSoftmax:
        return OnlineSoftmax(torch.tensor(-torch.inf), torch.tensor(0.0), torch.zeros(size))

    def update(
        self, score_P: Tensor, v_PV: Tensor, v_scale_P: Tensor, dtype: torch.dtype
    ) -> OnlineSoftmax:
        """With more positions, whose probabilities are rounded as a cache of ``dtype`` has it."""
        highest = torch.maximum(self.highest, score_P.amax())
        rescale = (self.highest - highest).exp()
        weight_P, counted_P = round_probs((score_P - highest).exp(), v_scale_P, dtype)
        return OnlineSoftmax(
            highest,
            self.total * rescale + counted_P.sum(),
            self.mean_V * rescale + torch.mv(v_PV.T.contiguous(), weight_P),
        )

    def merge(self, later: OnlineSoftmax) -> OnlineSoftmax:
        """With the softmax of positions that were taken apart."""
        highest = torch.maximum(self.highest, later.highest)
        mine, theirs = (self.highest - highest).exp(), (later.highest - highest).exp()
        return OnlineSoftmax(
            highest,
            self.total * mine + later.total * theirs,
            self.mean_V * mine + later.mean_V * theirs,
        )

    def with_sink(self, sink: Tensor) -> OnlineSoftmax:
        """With one more score that has no value."""
        highest = torch.maximum(self.highest, sink)
        rescale = (self.highest - highest).exp()
        total = self.total * rescale + (sink - highest).exp()
        return OnlineSoftmax(highest, total, self.mean_V * rescale)


def round_probs(prob_P: Tensor, v_scale_P: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What multiplies the values (or their codes), and what is added up below the line."""
    if dtype is torch.bfloat16:
        rounded = prob_P.bfloat16().float()
        return rounded, rounded
    scaled = prob_P * v_scale_P
    unit = scaled.amax() / 255
    codes = (scaled / unit).round() if unit > 0 else torch.zeros_like(scaled)
    return codes * unit, prob_P + scaled * 0
