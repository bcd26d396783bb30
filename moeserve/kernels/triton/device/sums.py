"""Contributions w_c * y_c become rows: in order of c, or exactly on the grid of the row's unit
(``wire``). Letters: see ``wire``; a program has BLOCK features of one row.

Nothing is added by atomics: each row's contributions stand in memory and are added by one program,
which at most costs writing and reading them once more.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moeserve.kernels.triton.device import lang

LOWEST: tl.constexpr = tl.constexpr(-(2**31))


@triton.jit
def chain_kernel(y, ids, weights, out, hidden, chosen, BLOCK: tl.constexpr):
    """out fp32 [T, H]: fma of the contributions of choices that are not -1, c ascending."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for c in range(chosen):
        p = t * chosen + c
        if tl.load(ids + p) >= 0:
            part = tl.load(y + p * hidden + h, mask=h < hidden, other=0.0)
            weight = tl.zeros([BLOCK], tl.float32) + tl.load(weights + p)
            total = tl.fma(weight, part, total)
    tl.store(out + t * hidden + h, total, mask=h < hidden)


@triton.jit
def exact_kernel(
    y, ids, weights, units, out, hidden, chosen, bound,
    LIMBS: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where ``WHOLE`` out is fp32 [T, H], the sums times the unit, else int32 [T, LIMBS, H]."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    unit = tl.load(units + t)
    per_unit = lang.reciprocal(unit)
    high = tl.zeros([BLOCK], tl.int32)
    low = tl.zeros([BLOCK], tl.int32)
    lost = tl.zeros([BLOCK], tl.int32)
    for c in range(chosen):
        p = t * chosen + c
        if tl.load(ids + p) >= 0:
            part = tl.load(y + p * hidden + h, mask=h < hidden, other=0.0)
            share = (part * tl.load(weights + p)) * per_unit
            top = share
            if LIMBS == 2:
                top = share * 1.52587890625e-05  # 2^-16
            fits = tl.abs(top) <= bound  # nor is it NaN
            lost = tl.where(fits, lost, 1)
            whole = lang.rint(tl.where(fits, top, 0.0))
            high += whole.to(tl.int32)
            if LIMBS == 2:
                rest = lang.rint(tl.where(fits, share, 0.0)) - whole * 65536.0
                low += rest.to(tl.int32)
    if WHOLE:
        value = to_float(high, low, LIMBS) * unit
        tl.store(out + t * hidden + h, tl.where(lost > 0, float("nan"), value), mask=h < hidden)
    else:
        high = tl.where(lost > 0, LOWEST, high)
        tl.store(out + t * LIMBS * hidden + h, high, mask=h < hidden)
        if LIMBS == 2:
            tl.store(out + t * LIMBS * hidden + hidden + h, low, mask=h < hidden)


@triton.jit
def to_float(high, low, LIMBS: tl.constexpr):
    if LIMBS == 2:
        out = (high.to(tl.int64) * 65536 + low.to(tl.int64)).to(tl.float32)
    else:
        out = high.to(tl.float32)
    return out


@triton.jit
def gather_kernel(
    sums, first, order, units, out, hidden, LIMBS: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the int32 sums [N, LIMBS, H] of the copies ``order[first[t] : first[t + 1]]`` of row t;
    out as that of ``exact_kernel``."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    high = tl.zeros([BLOCK], tl.int32)
    low = tl.zeros([BLOCK], tl.int32)
    lost = tl.zeros([BLOCK], tl.int32)
    for i in range(tl.load(first + t), tl.load(first + t + 1)):
        at = sums + tl.load(order + i).to(tl.int64) * LIMBS * hidden
        part = tl.load(at + h, mask=h < hidden, other=0)
        lost = tl.where(part == LOWEST, 1, lost)
        high += tl.where(part == LOWEST, 0, part)
        if LIMBS == 2:
            low += tl.load(at + hidden + h, mask=h < hidden, other=0)
    if WHOLE:
        value = to_float(high, low, LIMBS) * tl.load(units + t)
        tl.store(out + t * hidden + h, tl.where(lost > 0, float("nan"), value), mask=h < hidden)
    else:
        high = tl.where(lost > 0, LOWEST, high)
        tl.store(out + t * LIMBS * hidden + h, high, mask=h < hidden)
        if LIMBS == 2:
            tl.store(out + t * LIMBS * hidden + hidden + h, low, mask=h < hidden)
