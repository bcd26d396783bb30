"""The native paged cache: shapes are checked here, addresses go to ``_cpu``.

A ``KvCache`` of these functions holds a ``NativeCache``: bytes whose layout only the kernels know.
Letters: see ``ops``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from moeserve.errors import InternalError
from moeserve.kernels.cpu import _cpu
from moeserve.kernels.cpu.memory import empty_bytes
from moeserve.kernels.kv_layout import KvBlockLayout, outside
from moeserve.kernels.kv_runs import DIGEST_BYTES, check_places
from moeserve.kernels.ops import AttentionBatch, KvCache, KvRuns, KvShape

# Gives so many bytes of memory, uint8.
Room = Callable[[int], Tensor]
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


@dataclass(frozen=True, slots=True)
class NativeCache:
    """The memory, and the handle that native calls get."""

    memory: Tensor
    handle: _cpu.Cache


def bytes_per_block(shape: KvShape) -> int:
    check_shape(shape)
    return _cpu.kv_bytes_per_block(
        shape.block_size,
        shape.kv_heads,
        shape.head_size,
        shape.value_size,
        KINDS[shape.dtype],
        shape.latent,
    )


def new_cache(shape: KvShape, room: Room = empty_bytes) -> KvCache:
    nbytes = shape.num_blocks * bytes_per_block(shape)
    memory = room(nbytes)  # what was never written is never read
    handle = _cpu.Cache(
        memory.data_ptr(),
        shape.num_blocks,
        shape.block_size,
        shape.kv_heads,
        shape.head_size,
        shape.value_size,
        KINDS[shape.dtype],
        shape.latent,
    )
    return KvCache(shape, nbytes, NativeCache(memory, handle))


def write(cache: KvCache, k_TGD: Tensor, v_TGV: Tensor | None, slot_T: Tensor) -> None:
    shape, handle = cache.shape, handle_of(cache)
    rows = len(slot_T)
    assert k_TGD.shape == (rows, shape.kv_heads, shape.head_size), (k_TGD.shape, shape)
    assert (v_TGV is None) is shape.latent, shape
    assert v_TGV is None or v_TGV.shape == (rows, shape.kv_heads, shape.value_size), (
        v_TGV.shape,
        shape,
    )
    k, slots = fp32(k_TGD), slot_T.to(torch.int64).contiguous()
    v = None if v_TGV is None else fp32(v_TGV)
    v_at = 0 if v is None else v.data_ptr()
    if not _cpu.write_kv(handle, k.data_ptr(), v_at, rows, slots.data_ptr()):
        most = shape.num_blocks * shape.block_size - 1
        raise InternalError(f"write_kv: a slot is not in 0..{most}")


def export_blocks(cache: KvCache, blocks_N: Tensor, out_NX: Tensor | None = None) -> Tensor:
    layout, blocks = KvBlockLayout.of(cache.shape), blocks_N.to(torch.int64).contiguous()
    data = layout.room_for(len(blocks), out_NX)
    if not _cpu.export_kv(handle_of(cache), blocks.data_ptr(), len(blocks), data.data_ptr()):
        raise outside("export_kv", cache, blocks)
    return data


def import_blocks(cache: KvCache, blocks_N: Tensor, data_NX: Tensor) -> None:
    blocks = blocks_N.to(torch.int64).contiguous()
    KvBlockLayout.of(cache.shape).check_blocks(data_NX, len(blocks))
    data = data_NX.contiguous()
    if not _cpu.import_kv(handle_of(cache), blocks.data_ptr(), len(blocks), data.data_ptr()):
        raise outside("import_kv", cache, blocks)


def export_runs(caches: Sequence[KvCache], blocks_B: Tensor, runs: KvRuns, out_X: Tensor) -> Tensor:
    digests_RD = torch.empty(len(runs), DIGEST_BYTES, dtype=torch.uint8)
    blocks, data = check_runs(blocks_B, out_X)
    if not _cpu.export_runs(
        handles_of(caches), places_of(blocks, runs, data), digests_RD.data_ptr()
    ):
        raise not_there(caches, blocks, runs, data)
    return digests_RD


def import_runs(
    caches: Sequence[KvCache],
    blocks_B: Tensor,
    runs: KvRuns,
    digests_RD: Tensor,
    data_X: Tensor,
) -> Tensor:
    assert digests_RD.dtype is torch.uint8, digests_RD.dtype
    assert digests_RD.shape == (len(runs), DIGEST_BYTES), digests_RD.shape
    right_R = torch.empty(len(runs), dtype=torch.bool)
    (blocks, data), digests = check_runs(blocks_B, data_X), digests_RD.contiguous()
    if not _cpu.import_runs(
        handles_of(caches),
        places_of(blocks, runs, data),
        digests.data_ptr(),
        right_R.data_ptr(),
    ):
        raise not_there(caches, blocks, runs, data)
    return right_R


def check_runs(blocks_B: Tensor, data_X: Tensor) -> tuple[Tensor, Tensor]:
    """The same, in one piece each; data that is written must be so."""
    if data_X.dtype is not torch.uint8 or data_X.dim() != 1 or not data_X.is_contiguous():
        raise InternalError(
            f"{data_X.dtype} {list(data_X.shape)} with strides {data_X.stride()} is no place for "
            "runs: expected uint8 [X], one byte after the other"
        )
    return blocks_B.to(torch.int64).contiguous(), data_X


def places_of(
    blocks: Tensor, runs: KvRuns, data: Tensor
) -> tuple[int, int, int, int, int, int, int, int]:
    heads = runs.heads_RH
    return (
        blocks.data_ptr(),
        len(blocks),
        runs.runs_R4.data_ptr(),
        len(runs),
        heads.data_ptr(),
        heads.shape[1],
        data.data_ptr(),
        len(data),
    )


def not_there(
    caches: Sequence[KvCache], blocks: Tensor, runs: KvRuns, data: Tensor
) -> InternalError:
    layouts = [KvBlockLayout.of(cache.shape) for cache in caches]
    check_places(layouts, blocks.tolist(), runs, data)
    return outside("runs", caches[0], blocks)


def handles_of(caches: Sequence[KvCache]) -> list[_cpu.Cache]:
    return [handle_of(cache) for cache in caches]


def handle_of(cache: KvCache) -> _cpu.Cache:
    return cast("NativeCache", cache.data).handle


def attend(
    q_TAD: Tensor,
    cache: KvCache,
    batch: AttentionBatch,
    scale: float,
    window: int | None,
    sinks_A: Tensor | None,
) -> Tensor:
    shape, handle = cache.shape, handle_of(cache)
    rows, heads, size = q_TAD.shape
    sequences, width = batch.blocks_SM.shape
    assert size == shape.head_size, (q_TAD.shape, shape)
    assert heads % shape.kv_heads == 0, (heads, shape)
    assert batch.query_start_S1.shape == (sequences + 1,), batch
    assert batch.context_S.shape == (sequences,), batch
    assert int(batch.query_start_S1[-1]) == rows, (batch.query_start_S1, rows)
    assert window is None or window > 0, window
    assert sinks_A is None or sinks_A.shape == (heads,), sinks_A
    q, starts, context, table = (
        fp32(q_TAD),
        int32(batch.query_start_S1),
        int32(batch.context_S),
        int32(batch.blocks_SM),
    )
    sinks = None if sinks_A is None else sinks_A.float().contiguous()
    out = torch.empty(rows, heads, shape.value_size)
    if not _cpu.paged_attention(
        handle,
        q.data_ptr(),
        heads,
        starts.data_ptr(),
        context.data_ptr(),
        table.data_ptr(),
        sequences,
        width,
        scale,
        window or 0,
        0 if sinks is None else sinks.data_ptr(),
        out.data_ptr(),
    ):
        raise InternalError(f"paged_attention: rows, contexts or blocks do not fit: {batch}")
    return out


def check_shape(shape: KvShape) -> None:
    assert shape.dtype in KINDS, shape
    assert min(shape.block_size, shape.kv_heads, shape.head_size, shape.value_size) > 0, shape
    if shape.latent:
        assert shape.kv_heads == 1, shape
        assert shape.value_size <= shape.head_size, shape


def fp32(x: Tensor) -> Tensor:
    assert x.dtype is torch.float32, x.dtype
    return x.contiguous()


def int32(x: Tensor) -> Tensor:
    assert x.dtype is torch.int32, x.dtype
    return x.contiguous()
