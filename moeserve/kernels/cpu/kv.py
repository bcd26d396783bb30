"""The native paged cache: shapes are checked here, addresses go to ``_cpu``.

A ``KvCache`` of these functions holds a ``Blocks``: bytes whose layout only the kernels know.
Letters: see ``ops``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from moeserve.errors import InternalError
from moeserve.kernels.cpu import _cpu
from moeserve.kernels.cpu.packing import fresh
from moeserve.kernels.ops import AttentionBatch, KvCache, KvShape

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
Head = tuple[int, int, int, int, int, int, int, bool]


@dataclass(frozen=True, slots=True)
class Blocks:
    """The memory, and what every native call is told of it first."""

    data: Tensor
    head: Head
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
    data = fresh(nbytes)  # what was never written is never read
    head = (
        data.data_ptr(),
        shape.num_blocks,
        shape.block_size,
        shape.kv_heads,
        shape.head_size,
        shape.value_size,
        KINDS[shape.dtype],
        shape.latent,
    )
    return KvCache(shape, nbytes, Blocks(data, head, _cpu.Cache(*head)))


def write(cache: KvCache, k_TGD: Tensor, v_TGV: Tensor | None, slot_T: Tensor) -> None:
    shape, blocks = cache.shape, cast("Blocks", cache.data)
    rows = len(slot_T)
    assert k_TGD.shape == (rows, shape.kv_heads, shape.head_size), (k_TGD.shape, shape)
    assert (v_TGV is None) is shape.latent, shape
    assert v_TGV is None or v_TGV.shape == (rows, shape.kv_heads, shape.value_size), (
        v_TGV.shape,
        shape,
    )
    k, slots = fp32(k_TGD), slot_T.to(torch.int64).contiguous()
    v = None if v_TGV is None else fp32(v_TGV)
    if not _cpu.write_kv(
        *blocks.head,
        k.data_ptr(),
        0 if v is None else v.data_ptr(),
        rows,
        slots.data_ptr(),
    ):
        most = shape.num_blocks * shape.block_size - 1
        raise InternalError(f"write_kv: a slot is not in 0..{most}")


def attend(
    q_TAD: Tensor,
    cache: KvCache,
    batch: AttentionBatch,
    scale: float,
    window: int | None,
    sinks_A: Tensor | None,
) -> Tensor:
    shape, blocks = cache.shape, cast("Blocks", cache.data)
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
        *blocks.head,
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
