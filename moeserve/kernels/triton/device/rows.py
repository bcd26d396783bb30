"""Rows by themselves: one pass per row, whatever the other rows are. Letters: see ``ops``.

A program has ``ROWS`` rows and goes over them ``BLOCK`` features at a time; both follow from the
length of a row alone, so that a row's sum is always added in one order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moeserve.kernels.triton.device import lang


@triton.jit(do_not_specialize=["rows"])
def quantize_kernel(x, codes, scale, rows, size, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """fp32 [rows, size] to int8 and fp32 [rows]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = row[:, None] * size
    most = tl.zeros([ROWS], tl.float32)
    for k in range(0, size, BLOCK):
        at = k + tl.arange(0, BLOCK)
        here = (row < rows)[:, None] & (at < size)[None, :]
        part = tl.load(x + start + at[None, :], mask=here, other=0.0)
        most = tl.maximum(most, tl.max(lang.magnitude(part), 1))
    for k in range(0, size, BLOCK):
        at = k + tl.arange(0, BLOCK)
        here = (row < rows)[:, None] & (at < size)[None, :]
        part = tl.load(x + start + at[None, :], mask=here, other=0.0)
        rounded, _ = lang.quantize(part, most)
        tl.store(codes + start + at[None, :], rounded, mask=here)
    _, factor = lang.quantize(tl.zeros([ROWS, 1], tl.float32), most)
    tl.store(scale + row, factor, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def norm_kernel(
    x, weight, out, codes, scale, rows, eps, size,
    QUANTIZED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x / sqrt(mean(x^2) + eps) * weight, fp32; where ``QUANTIZED`` its codes and scales, and the
    floats only where there is an ``out``."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = row[:, None] * size
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for k in range(0, size, BLOCK):
        at = k + tl.arange(0, BLOCK)
        here = (row < rows)[:, None] & (at < size)[None, :]
        part = tl.load(x + start + at[None, :], mask=here, other=0.0)
        squares += part * part
    mean = tl.div_rn(tl.sum(squares, 1), tl.cast(size, tl.float32))
    root = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    most = tl.zeros([ROWS], tl.float32)
    for k in range(0, size, BLOCK):
        at = k + tl.arange(0, BLOCK)
        here = (row < rows)[:, None] & (at < size)[None, :]
        part = tl.load(x + start + at[None, :], mask=here, other=0.0)
        factor = tl.load(weight + at, mask=at < size, other=0.0)
        normed = (part * root[:, None]) * factor[None, :]
        if out is not None:
            tl.store(out + start + at[None, :], normed, mask=here)
        if QUANTIZED:
            most = tl.maximum(most, tl.max(lang.magnitude(tl.where(here, normed, 0.0)), 1))
    if QUANTIZED:
        for k in range(0, size, BLOCK):
            at = k + tl.arange(0, BLOCK)
            here = (row < rows)[:, None] & (at < size)[None, :]
            part = tl.load(x + start + at[None, :], mask=here, other=0.0)
            factor = tl.load(weight + at, mask=at < size, other=0.0)
            rounded, _ = lang.quantize((part * root[:, None]) * factor[None, :], most)
            tl.store(codes + start + at[None, :], rounded, mask=here)
        _, step = lang.quantize(tl.zeros([ROWS, 1], tl.float32), most)
        tl.store(scale + row, step, mask=row < rows)


@triton.jit
def activate(gate, up, CLAMPED: tl.constexpr):
    """``Activation`` of fp32."""
    if CLAMPED:
        gate = tl.where(gate > 7.0, 7.0, gate)
        up = tl.where(up > 7.0, 7.0, up)
        up = tl.where(up < -7.0, -7.0, up)
        out = (up + 1.0) * (gate * lang.sigmoid(gate * 1.702))
    else:
        out = (gate * lang.sigmoid(gate)) * up
    return out


@triton.jit
def glu_kernel(x, out, inner, CLAMPED: tl.constexpr, BLOCK: tl.constexpr):
    """Gate and up [T, 2I] to [T, I]."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x + row * 2 * inner + at, mask=at < inner, other=0.0)
    up = tl.load(x + row * 2 * inner + inner + at, mask=at < inner, other=0.0)
    tl.store(out + row * inner + at, activate(gate, up, CLAMPED), mask=at < inner)


@triton.jit
def rope_kernel(
    x, cos, sin, position, out, heads, size, pairs, x_row, x_head,
    INTERLEAVED: tl.constexpr, GATHERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One head of one row, read at x + row * x_row + head * x_head, written without gaps. cos and
    sin are of the row, or where ``GATHERED`` of its position."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    turned = at < 2 * pairs
    if INTERLEAVED:
        pair, other, first = at // 2, at ^ 1, at % 2 == 0
    else:
        first = at < pairs
        pair = tl.where(first, at, at - pairs)
        other = tl.where(first, at + pairs, at - pairs)
    place = row
    if GATHERED:
        place = tl.load(position + row)
    x += row * x_row + head * x_head
    mine = tl.load(x + at, mask=at < size, other=0.0)
    partner = tl.load(x + other, mask=turned, other=0.0)
    c = tl.load(cos + place * pairs + pair, mask=turned, other=1.0)
    s = tl.load(sin + place * pairs + pair, mask=turned, other=0.0)
    both = tl.where(first, mine * c - partner * s, mine * c + partner * s)
    to = out + (row * heads + head) * size
    tl.store(to + at, tl.where(turned, both, mine), mask=at < size)


@triton.jit
def units_kernel(x, units, size, GRID_BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The unit of the exact combine (``wire``) of one row."""
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK], tl.float32)
    for k in range(0, size, BLOCK):
        at = k + tl.arange(0, BLOCK)
        part = tl.load(x + row * size + at, mask=at < size, other=0.0)
        squares += part * part
    mean = tl.div_rn(tl.sum(squares, 0), tl.cast(size, tl.float32))
    # Half the exponent, rounded down, is that of the root.
    exponent = ((mean.to(tl.int32, bitcast=True) >> 23) - 127) >> 1
    unit = lang.power_of_two(tl.maximum(exponent, -40) - GRID_BITS)
    tl.store(units + row, tl.where(mean < float("inf"), unit, float("nan")))


@triton.jit
def best_kernel(logits, best, size, BLOCK: tl.constexpr):
    """The first of the greatest of a row; -1 where that is not finite, or one is NaN."""
    row = tl.program_id(0).to(tl.int64)
    greatest = tl.full([BLOCK], float("-inf"), tl.float32)
    place = tl.zeros([BLOCK], tl.int32)
    bad = tl.zeros([BLOCK], tl.int32)
    for k in range(0, size, BLOCK):
        at = k + tl.arange(0, BLOCK)
        value = tl.load(logits + row * size + at, mask=at < size, other=float("-inf"))
        bad |= (value != value).to(tl.int32)
        place = tl.where(value > greatest, at, place)
        greatest = tl.where(value > greatest, value, greatest)
    top = tl.max(greatest, 0)
    first = tl.min(tl.where(greatest == top, place, 2147483647), 0)
    sound = (tl.max(bad, 0) == 0) & (tl.abs(top) < float("inf"))
    tl.store(best + row, tl.where(sound, first, -1))
