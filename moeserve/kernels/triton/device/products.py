"""Tiles of x @ w^T for weights of every kind, as ``ops`` states them. Letters: see ``ops``.

``KIND`` is FP32, BF16, INT8 or INT4. Integer sums are exact, so tiles of these may follow the
number of rows; of the others a tile is one shape whatever the rows are, and K is taken in one
order. Weights are [N, K] without gaps, two features of INT4 in a byte.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moeserve.kernels.triton.device import lang

FP32: tl.constexpr = tl.constexpr(0)
BF16: tl.constexpr = tl.constexpr(1)
INT8: tl.constexpr = tl.constexpr(2)
INT4: tl.constexpr = tl.constexpr(3)


@triton.jit
def load_rows(at, here, inside, K: tl.constexpr, BK: tl.constexpr):
    """A tile of features ``inside`` of rows that are ``here``; where K is whole tiles, all are."""
    if K % BK == 0:
        value = tl.load(at, mask=here, other=0)
    else:
        value = tl.load(at, mask=here & inside, other=0)
    return value


@triton.jit
def float_tile(
    x, row, here, w, n, N, K: tl.constexpr,
    KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """fp32 [BM, BN] of fp32 rows at x + row * K."""
    total = tl.zeros([BM, BN], tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a = load_rows(x + row[:, None] * K + k[None, :], here[:, None], (k < K)[None, :], K, BK)
        b = load_rows(
            w + n[None, :].to(tl.int64) * K + k[:, None], (n < N)[None, :], (k < K)[:, None], K, BK
        )
        if KIND == BF16:
            a = lang.as_bf16(lang.bf16_value(a))
            if lang.INTERPRETED:
                b = b.to(tl.float32)
        total = lang.dot(a, b, total)
    return total


@triton.jit
def int8_tile(
    x, row, here, w, n, N, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """int32 [BM, BN] of codes."""
    total = tl.zeros([BM, BN], tl.int32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a = load_rows(x + row[:, None] * K + k[None, :], here[:, None], (k < K)[None, :], K, BK)
        b = load_rows(
            w + n[None, :].to(tl.int64) * K + k[:, None], (n < N)[None, :], (k < K)[:, None], K, BK
        )
        total = tl.dot(a, b, total, out_dtype=tl.int32)
    return total


@triton.jit
def level_of(code, levels):
    """int8: the number of a code, or what ``levels`` has in its place."""
    if levels is not None:
        value = tl.load(levels + code.to(tl.int32))
    else:
        value = code.to(tl.int8)
    return value


@triton.jit
def int4_tile(
    x, row, here, w, scale, zero, levels, n, N, K: tl.constexpr,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """fp32 [BM, BN] of codes, without the rows' scales: groups ascending, each one fused addition.
    A code of w is its number, or that of ``levels`` (int8 [16])."""
    total = tl.zeros([BM, BN], tl.float32)
    groups = tl.cdiv(K, GROUP)
    there = n < N
    for g in range(groups):
        inner = tl.zeros([BM, BN], tl.int32)
        codes = tl.zeros([BM], tl.int32)
        for start in range(0, GROUP, BK):
            k = g * GROUP + start + tl.arange(0, BK)
            inside = (k < K) & (k < (g + 1) * GROUP)
            a = tl.load(
                x + row[:, None] * K + k[None, :], mask=here[:, None] & inside[None, :], other=0
            )
            codes += tl.sum(a.to(tl.int32), 1)
            # Features 2i lie in the low halves of bytes, 2i + 1 in the high ones.
            even, odd = tl.split(tl.reshape(a, [BM, BK // 2, 2]))
            byte = (g * GROUP + start) // 2 + tl.arange(0, BK // 2)
            b = tl.load(
                w + n[None, :].to(tl.int64) * (K // 2) + byte[:, None],
                mask=there[None, :] & (byte < K // 2)[:, None],
                other=0,
            )
            inner = tl.dot(even, level_of(b & 15, levels), inner, out_dtype=tl.int32)
            inner = tl.dot(odd, level_of(b >> 4, levels), inner, out_dtype=tl.int32)
        place = n.to(tl.int64) * groups + g
        offset = tl.load(zero + place, mask=there, other=0).to(tl.int32)
        step = tl.load(scale + place, mask=there, other=0.0)
        inner = inner - offset[None, :] * codes[:, None]
        total = tl.fma(inner.to(tl.float32), tl.broadcast_to(step[None, :], [BM, BN]), total)
    return total


@triton.jit
def offset_of(offsets, i):
    """Of an array of one matrix among several; all begin on lines, so that reads can be wide."""
    return tl.multiple_of(tl.load(offsets + i), 16)


@triton.jit
def tile(
    x, x_scale, row, here, w, scale, zero, levels, bias, n, N, K: tl.constexpr,
    GROUP: tl.constexpr, KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """fp32 [BM, BN] of rows ``row`` where ``here``, and features ``n`` below N."""
    if KIND == INT8:
        whole = int8_tile(x, row, here, w, n, N, K, BM, BN, BK)
        own = tl.load(x_scale + row, mask=here, other=0.0)
        step = tl.load(scale + n, mask=n < N, other=0.0)
        out = (whole.to(tl.float32) * own[:, None]) * step[None, :]
    elif KIND == INT4:
        out = int4_tile(x, row, here, w, scale, zero, levels, n, N, K, GROUP, BM, BN, BK)
        own = tl.load(x_scale + row, mask=here, other=0.0)
        out = out * own[:, None]
    else:
        out = float_tile(x, row, here, w, n, N, K, KIND, BM, BN, BK)
    if bias is not None:
        out = out + tl.load(bias + n, mask=n < N, other=0.0)[None, :]
    return out


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x, x_scale, w, scale, zero, levels, bias, offsets, out, rows, heads, N, K: tl.constexpr,
    GROUP: tl.constexpr, KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [rows, heads, N]: head a of every row times matrix a, whose arrays begin ``offsets``
    [4, heads] (w, scale, bias, zero) beyond the first one's, in elements."""
    head = tl.program_id(2)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    here = m < rows
    row = m.to(tl.int64) * heads + head
    if offsets is not None:
        w += offset_of(offsets, head)
        if scale is not None:
            scale += offset_of(offsets, heads + head)
        if zero is not None:
            zero += offset_of(offsets, 3 * heads + head)
    y = tile(
        x, x_scale, row, here, w, scale, zero, levels, bias, n, N, K, GROUP, KIND, BM, BN, BK
    )  # fmt: skip
    tl.store(out + row[:, None] * N + n[None, :], y, mask=here[:, None] & (n < N)[None, :])
