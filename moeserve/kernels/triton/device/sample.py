"""Tokens drawn from rows of logits, by themselves (``reference.sampling`` says what is computed).

A program has one row and walks it in blocks of one length, so that its sums are added in one order
whatever the other rows are. fp64 throughout, ``exp`` written out: a weight is the oracle's within a
few units in the last place, so a token is another only where two roundings decide. What is compared
(greatest logits, top-k, equal ones by their ids) is exact.

``asked`` fp64 [rows, 5]: temperature (0 takes the best), top-k (0 is all), top-p, min-p, and the
quantile that is drawn. ``edges`` fp64 [rows, 2]: the least logit that is kept, and of those equal
to it the last id.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moeserve.kernels.triton.device import lang

ASKED: tl.constexpr = tl.constexpr(5)
FAR: tl.constexpr = tl.constexpr(2147483647)


@triton.jit
def weight_of(x, highest, temperature, there):
    """exp((x - highest) / temperature) where ``there``, else 0."""
    return tl.where(there, lang.exp64((tl.where(there, x, highest) - highest) / temperature), 0.0)


@triton.jit
def cut_kernel(x, ids, asked, edges, size, BLOCK: tl.constexpr):
    """What top-k, min-p and top-p keep of a row sorted from the greatest on, of equals the lower id
    first: its greatest at least, so that nothing is read from before the row."""
    row = tl.program_id(0).to(tl.int64)
    x += row * size
    temperature, top_k = tl.load(asked + row * ASKED), tl.load(asked + row * ASKED + 1)
    top_p, min_p = tl.load(asked + row * ASKED + 2), tl.load(asked + row * ASKED + 3)
    highest = tl.load(x)
    most = tl.where(top_k > 0.0, tl.minimum(top_k, size), size).to(tl.int32)
    total = tl.zeros([1], tl.float64)
    kept = tl.zeros([1], tl.int32)
    for start in range(0, most, BLOCK):
        at = start + tl.arange(0, BLOCK)
        weight = weight_of(
            tl.load(x + at, mask=at < most, other=0.0), highest, temperature, at < most
        )
        good = (at < most) & (weight >= min_p)
        total += tl.sum(tl.where(good, weight, 0.0), 0)
        kept += tl.sum(good.to(tl.int32), 0)
    count = tl.max(kept, 0)
    if top_p < 1.0:
        target = tl.max(total, 0) * top_p
        done = tl.zeros([1], tl.float64)
        first = tl.full([1], FAR, tl.int32)
        for start in range(0, count, BLOCK):
            at = start + tl.arange(0, BLOCK)
            weight = weight_of(
                tl.load(x + at, mask=at < count, other=0.0), highest, temperature, at < count
            )
            reaches = (done + tl.cumsum(weight, 0) >= target) & (at < count)
            first = tl.minimum(first, tl.min(tl.where(reaches, at, FAR), 0))
            done += tl.sum(weight, 0)
        count = tl.minimum(count, tl.min(first, 0) + 1 - (tl.min(first, 0) == FAR).to(tl.int32))
    last = tl.maximum(count - 1, 0)  # of a row that is no numbers nothing is kept
    tl.store(edges + row * 2, tl.load(x + last))
    tl.store(edges + row * 2 + 1, tl.load(ids + row * size + last).to(tl.float64))


@triton.jit
def draw_kernel(x, asked, edges, tokens, size, BLOCK: tl.constexpr):
    """The token at the quantile of what is kept, in order of ids; the first of the greatest where
    the temperature is 0. -1 where the greatest is not finite."""
    row = tl.program_id(0).to(tl.int64)
    x += row * size
    temperature, quantile = tl.load(asked + row * ASKED), tl.load(asked + row * ASKED + 4)
    edge, last = tl.load(edges + row * 2), tl.load(edges + row * 2 + 1)
    greatest = tl.full([BLOCK], float("-inf"), tl.float64)
    place = tl.zeros([BLOCK], tl.int32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < size, other=float("-inf"))
        place = tl.where(value > greatest, at, place)
        greatest = tl.where(value > greatest, value, greatest)
    highest = tl.max(greatest, 0)
    token = tl.min(tl.where(greatest == highest, place, FAR), 0)
    sound = tl.abs(highest) < float("inf")
    if sound & (temperature > 0.0):
        total = tl.zeros([1], tl.float64)
        for start in range(0, size, BLOCK):
            at = start + tl.arange(0, BLOCK)
            value = tl.load(x + at, mask=at < size, other=float("-inf"))
            here = (at < size) & ((value > edge) | ((value == edge) & (at <= last)))
            total += tl.sum(weight_of(value, highest, temperature, here), 0)
        target = tl.max(total, 0) * quantile
        done = tl.zeros([1], tl.float64)
        first = tl.full([1], FAR, tl.int32)
        end = tl.zeros([1], tl.int32)
        for start in range(0, size, BLOCK):
            at = start + tl.arange(0, BLOCK)
            value = tl.load(x + at, mask=at < size, other=float("-inf"))
            here = (at < size) & ((value > edge) | ((value == edge) & (at <= last)))
            weight = weight_of(value, highest, temperature, here)
            past = (done + tl.cumsum(weight, 0) > target) & (weight > 0.0)
            first = tl.minimum(first, tl.min(tl.where(past, at, FAR), 0))
            end = tl.maximum(end, tl.max(tl.where(weight > 0.0, at, 0), 0))
            done += tl.sum(weight, 0)
        token = tl.minimum(tl.min(first, 0), tl.max(end, 0))
    tl.store(tokens + row, tl.where(sound, token, -1))


@triton.jit
def spread_kernel(logits, spread, size, BLOCK: tl.constexpr):
    """fp64 [rows, 2] of fp32 logits: the greatest, and the sum of exp(logit - greatest)."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * size
    greatest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(logits + at, mask=at < size, other=float("-inf"))
        greatest = tl.maximum(greatest, value)
    highest = tl.max(greatest, 0).to(tl.float64)
    total = tl.zeros([1], tl.float64)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(logits + at, mask=at < size, other=float("-inf")).to(tl.float64)
        total += tl.sum(tl.where(at < size, lang.exp64(value - highest), 0.0), 0)
    tl.store(spread + row * 2, highest)
    tl.store(spread + row * 2 + 1, tl.max(total, 0))
