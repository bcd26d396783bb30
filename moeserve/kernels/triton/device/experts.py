"""Who goes to which expert, and the two products of experts. Letters: see ``ops``; P pairs (row t,
choice c) are numbered t * C + c, those of expert -1 go nowhere.

The pairs of an expert are cut into tiles of BM, pairs ascending; a tile has one expert. Counts and
places are found on the device, and a grid has room for the most tiles there could be: programs
beyond the last have expert -1 and leave.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moeserve.kernels.triton.device import products, rows


@triton.jit(do_not_specialize=["pairs"])
def count_kernel(ids, counts, pairs, BLOCK: tl.constexpr):
    """How many pairs each expert has."""
    e = tl.program_id(0)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, pairs, BLOCK):
        p = start + tl.arange(0, BLOCK)
        count += (tl.load(ids + p, mask=p < pairs, other=-1) == e).to(tl.int32)
    tl.store(counts + e, tl.sum(count, 0))


@triton.jit(do_not_specialize=["pairs"])
def order_kernel(
    ids, counts, order, expert, pairs, experts,
    BM: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Fills the expert's tiles: ``expert`` [tiles] and ``order`` [tiles, BM], which are -1."""
    e = tl.program_id(0)
    other = tl.arange(0, EXPERTS)
    before = tl.load(counts + other, mask=other < tl.minimum(e, experts), other=0)
    first = tl.sum((before + BM - 1) // BM, 0)
    mine = (tl.load(counts + e) + BM - 1) // BM
    for t in range(mine):
        tl.store(expert + first + t, e)
    place = first * BM
    for start in range(0, pairs, BLOCK):
        p = start + tl.arange(0, BLOCK)
        here = tl.load(ids + p, mask=p < pairs, other=-1) == e
        rank = tl.cumsum(here.to(tl.int32), 0) - 1
        tl.store(order + place + rank, p, mask=here)
        place += tl.sum(here.to(tl.int32), 0)


@triton.jit
def up_kernel(
    x, x_scale, w, scale, zero, levels, bias, offsets, order, expert, out,
    experts, chosen, inner, K: tl.constexpr,
    GROUP: tl.constexpr, KIND: tl.constexpr, CLAMPED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [P, I] of pairs: GLU of gate and up, which are rows i and I + i of w [2I, K]."""
    t = tl.program_id(0)
    e = tl.load(expert + t)
    if e >= 0:
        p = tl.load(order + t * BM + tl.arange(0, BM))
        here = p >= 0
        row = (tl.where(here, p, 0) // chosen).to(tl.int64)
        n = tl.program_id(1) * BN + tl.arange(0, BN)
        w += products.offset_of(offsets, e)
        up_w = w + inner.to(tl.int64) * (K // 2 if KIND == products.INT4 else K)
        up_scale, up_zero, up_bias = scale, zero, bias
        if scale is not None:
            scale += products.offset_of(offsets, experts + e)
            up_scale = scale + inner * (tl.cdiv(K, GROUP) if KIND == products.INT4 else 1)
        if bias is not None:
            bias += products.offset_of(offsets, 2 * experts + e)
            up_bias = bias + inner
        if zero is not None:
            zero += products.offset_of(offsets, 3 * experts + e)
            up_zero = zero + inner * tl.cdiv(K, GROUP)
        gate = products.tile(
            x, x_scale, row, here, w, scale, zero, levels, bias, n, inner, K, GROUP,
            KIND, BM, BN, BK,
        )  # fmt: skip
        up = products.tile(
            x, x_scale, row, here, up_w, up_scale, up_zero, levels, up_bias, n, inner, K, GROUP,
            KIND, BM, BN, BK,
        )  # fmt: skip
        y = rows.activate(gate, up, CLAMPED)
        to = out + p.to(tl.int64)[:, None] * inner + n[None, :]
        tl.store(to, y, mask=here[:, None] & (n < inner)[None, :])


@triton.jit
def down_kernel(
    x, x_scale, w, scale, zero, levels, bias, offsets, order, expert, out,
    experts, N, K: tl.constexpr,
    GROUP: tl.constexpr, KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [P, N] of x [P, K]."""
    t = tl.program_id(0)
    e = tl.load(expert + t)
    if e >= 0:
        p = tl.load(order + t * BM + tl.arange(0, BM))
        here = p >= 0
        row = tl.where(here, p, 0).to(tl.int64)
        n = tl.program_id(1) * BN + tl.arange(0, BN)
        w += products.offset_of(offsets, e)
        if scale is not None:
            scale += products.offset_of(offsets, experts + e)
        if bias is not None:
            bias += products.offset_of(offsets, 2 * experts + e)
        if zero is not None:
            zero += products.offset_of(offsets, 3 * experts + e)
        y = products.tile(
            x, x_scale, row, here, w, scale, zero, levels, bias, n, N, K, GROUP, KIND, BM, BN, BK
        )  # fmt: skip
        tl.store(out + row[:, None] * N + n[None, :], y, mask=here[:, None] & (n < N)[None, :])
