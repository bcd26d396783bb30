"""The native paged cache: shapes are checked here, addresses go to ``_cpu``.

A ``KvCache`` of these functions holds a ``NativeCache``: bytes whose layout only the kernels know.
Letters: see ``ops``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from moeserve.errors import InternalError
from moeserve.kernels.cpu import _cpu
from moeserve.kernels.cpu.packing import empty_bytes
from moeserve.kernels.kv_layout import KvBlockLayout, outside
from moeserve.kernels.ops import AttentionBatch, KvCache, KvShape

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


def new_cache(shape: KvShape) -> KvCache:
    nbytes = shape.num_blocks * bytes_per_block(shape)
    memory = empty_bytes(nbytes)  # what was never written is never read
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
