"""The paged cache written, and attention over it (``ops`` says what is rounded). Letters: see
``ops``; a slot is block * P + offset.

A cache holds each part of the keys, and the values, as [slots, G, D] and int8's scales as [slots,
G]. A program of attention has a tile of BM queries: ``BM / HEADS`` consecutive rows of one
sequence, each with HEADS heads of one KV head, over one segment of the past; ``merge_kernel`` joins
segments in ascending order. Every tile has the same shape whatever the rows are, and what a row
does not see adds zeros to it: so its bits do not depend on the rows beside it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moeserve.kernels.triton.device import lang

FP32: tl.constexpr = tl.constexpr(0)
BF16: tl.constexpr = tl.constexpr(1)
INT8: tl.constexpr = tl.constexpr(2)


@triton.jit
def write_kernel(
    x, slots, cache, scales, heads, size, x_row, x_head, most_slots,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row t, head g at x + t * x_row + g * x_head to its slot, rounded; none where there is no such
    slot."""
    t, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + t).to(tl.int64)
    if (slot >= 0) & (slot < most_slots):
        at = tl.arange(0, BLOCK)
        there = at < size
        value = tl.load(x + t * x_row + g * x_head + at, mask=there, other=0.0)
        to = cache + (slot * heads + g) * size + at
        if KIND == INT8:
            most = tl.max(lang.magnitude(value), 0) + tl.zeros([1], tl.float32)
            codes, scale = lang.quantize(value[None, :], most)
            tl.store(to[None, :], codes, mask=there[None, :])
            tl.store(scales + slot * heads + g + tl.arange(0, 1), scale)
        elif KIND == BF16:
            tl.store(to, lang.bf16_value(value).to(tl.bfloat16), mask=there)
        else:
            tl.store(to, value, mask=there)


@triton.jit
def load_queries(
    q, row, head, heads, here, first, size, q_size, D: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    """Features first .. first + size - 1 of the tile's queries [BM, D], as operands, and their
    scales [BM]."""
    d = tl.arange(0, D)
    at = q + (row * heads + head)[:, None] * q_size + first + d[None, :]
    value = tl.load(at, mask=here[:, None] & (d < size)[None, :], other=0.0)
    scale = tl.full([value.shape[0]], 1.0, tl.float32)
    if KIND == INT8:
        value, scale = lang.quantize(value, tl.max(lang.magnitude(value), 1))
    elif KIND == BF16:
        value = lang.as_bf16(lang.bf16_value(value))
    return value, scale


@triton.jit
def load_part(cache, scales, slot, there, g, heads, size, D: tl.constexpr, KIND: tl.constexpr):
    """[S, D] of the positions' slots, as operands, and scales [S]; zero where not ``there``."""
    d = tl.arange(0, D)
    at = cache + (slot * heads + g)[:, None] * size + d[None, :]
    scale = tl.full([slot.shape[0]], 1.0, tl.float32)
    if KIND == INT8:
        value = tl.load(at, mask=there[:, None] & (d < size)[None, :], other=0)
        scale = tl.load(scales + slot * heads + g, mask=there, other=0.0)
    else:
        value = tl.load(at, mask=there[:, None] & (d < size)[None, :], other=0.0)
        if lang.INTERPRETED:
            value = value.to(tl.float32)
    return value, scale


@triton.jit
def scores_of(q, q_scale, k, k_scale, KIND: tl.constexpr):
    """fp32 [BM, S]."""
    if KIND == INT8:
        whole = tl.dot(q, tl.trans(k)).to(tl.float32)
        out = whole * (q_scale[:, None] * k_scale[None, :])
    else:
        out = tl.dot(q, tl.trans(k), input_precision="ieee")
    return out


@triton.jit
def add_codes(prob, seen, v, v_scale, mean, total, rescale):
    """``add_values`` of int8: probabilities times scales become 0..255 of the step's greatest."""
    scaled = tl.where(seen, prob * v_scale[None, :], 0.0)
    unit = tl.div_rn(tl.max(scaled, 1), 255.0)
    some = unit > 0.0
    codes = tl.div_rn(scaled, tl.where(some, unit, 1.0)[:, None] + tl.zeros_like(scaled))
    codes = tl.where(some[:, None] & (codes == codes), lang.rint(codes), 0.0).to(tl.int32)
    # 0..255 do not fit int8: twice the product of their halves, and that of what halving lost.
    whole = tl.dot((codes >> 1).to(tl.int8), v)
    whole = tl.dot((codes & 1).to(tl.int8), v, whole + whole, out_dtype=tl.int32)
    bad = tl.sum(scaled * 0.0, 1)  # NaN where one is no number
    mean = mean * rescale[:, None] + whole.to(tl.float32) * (unit + bad)[:, None]
    return mean, total * rescale + (tl.sum(prob, 1) + bad)


@triton.jit
def add_values(
    prob, seen, v, v_scale, mean, total, rescale, KIND: tl.constexpr, GUARDED: tl.constexpr
):
    """The mean [BM, V] and total [BM] so far, times ``rescale``, with one step more. Where it is
    ``GUARDED``, a row that sees a value which is not finite becomes NaN, and others do not multiply
    it by their zero."""
    if KIND == INT8:
        mean, total = add_codes(prob, seen, v, v_scale, mean, total, rescale)
    else:
        if KIND == BF16:
            prob = lang.bf16_value(prob)
        total = total * rescale + tl.sum(prob, 1)
        mean = mean * rescale[:, None]
        if GUARDED:
            finite = tl.abs(v.to(tl.float32)) < float("inf")
            strange = tl.max(tl.where(finite, 0, 1), 1)
            spoiled = tl.max(tl.where(seen, strange[None, :], 0), 1)
            mean = tl.where(spoiled[:, None] > 0, float("nan"), mean)
            v = tl.where(finite, v, 0.0).to(v.dtype)
        if KIND == BF16:
            prob = lang.as_bf16(prob)
        mean = tl.dot(prob, v, mean, input_precision="ieee")
    return mean, total


@triton.jit
def store_rows(to, x, here, size, D: tl.constexpr):
    """x [BM, D], of which ``size`` features count, to rows at ``to`` [BM, 1] where ``here``."""
    d = tl.arange(0, D)
    tl.store(to + d[None, :], x, mask=here[:, None] & (d < size)[None, :])


@triton.jit
def first_seen(end, window):
    """The first position that a row sees which sees those below ``end``."""
    return tl.where(window > 0, tl.maximum(end - window, 0), 0)


@triton.jit
def slots_of(blocks, start, p, there, page: tl.constexpr, STEP: tl.constexpr):
    """Of positions ``p`` from ``start`` on, a multiple of STEP, of a sequence whose blocks are
    listed at ``blocks``. Where they all lie in one block, that takes one address."""
    if page % STEP == 0:
        block = tl.load(blocks + start // page).to(tl.int64)
        slot = block * page + start % page + tl.arange(0, STEP)
    else:
        slot = tl.load(blocks + p // page, mask=there, other=0).to(tl.int64) * page + p % page
    return slot


@triton.jit
def probabilities(score, seen, highest):
    """[BM, S], relative to the highest score so far; what to multiply by what was relative to the
    one before; and the highest."""
    score = tl.where(seen, score, float("-inf"))
    above = tl.maximum(highest, tl.max(score, 1))
    base = tl.where(above > float("-inf"), above, 0.0)
    return lang.exp_below(score - base[:, None]), lang.exp_below(highest - base), above


@triton.jit
def walk(
    q, q_scale, t, t_scale, k, k_scale, r, r_scale, v, v_scale, blocks,
    here, begin, end, g, least, low, high, scale,
    kv_heads: tl.constexpr, d_size: tl.constexpr, r_size: tl.constexpr, v_size: tl.constexpr,
    page: tl.constexpr, KIND: tl.constexpr, LATENT: tl.constexpr, GUARDED: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr, V: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Positions ``low`` to ``high`` in steps: highest scores and totals [BM], and mean [BM, V]."""
    highest = tl.full([q.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([q.shape[0]], tl.float32)
    mean = tl.zeros([q.shape[0], V], tl.float32)
    for start in range(low, high, STEP):
        p = start + tl.arange(0, STEP)
        there = (p >= least) & (p < high)
        slot = slots_of(blocks, start, p, there, page, STEP)
        key, key_scale = load_part(k, k_scale, slot, there, g, kv_heads, d_size, D, KIND)
        score = scores_of(q, q_scale, key, key_scale, KIND)
        if R > 0:
            rest, rest_scale = load_part(r, r_scale, slot, there, g, kv_heads, r_size, R, KIND)
            score += scores_of(t, t_scale, rest, rest_scale, KIND)
        if LATENT:
            value, value_scale = key, key_scale
        else:
            value, value_scale = load_part(v, v_scale, slot, there, g, kv_heads, v_size, V, KIND)
        seen = here[:, None] & (p[None, :] >= begin[:, None]) & (p[None, :] < end[:, None])
        prob, rescale, highest = probabilities(score * scale, seen, highest)
        mean, total = add_values(
            prob, seen, value, value_scale, mean, total, rescale, KIND, GUARDED
        )
    return highest, total, mean


@triton.jit
def attend_kernel(
    q, k, k_scale, r, r_scale, v, v_scale, blocks, tiles, highs, totals, means,
    scale, window, table, segments, base_row,
    heads: tl.constexpr, kv_heads: tl.constexpr, group: tl.constexpr, d_size: tl.constexpr,
    r_size: tl.constexpr, v_size: tl.constexpr, page: tl.constexpr, KIND: tl.constexpr,
    LATENT: tl.constexpr, SHARED: tl.constexpr, BM: tl.constexpr, HEADS: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr, V: tl.constexpr, SEGMENT: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One segment of one tile: its highest score and total [rows, A, segments], and mean [.., V].
    ``tiles`` int32 [.., 4]: sequence, first row, number of rows, position of the first. ``r`` is
    the second part of a latent's keys (R is 0 where there is none), ``v`` its first.

    A value that is not finite makes something of the mean so, of every row. Where the tile is
    ``SHARED`` by several rows, they are then gone over again, guarded: of finite values both give
    the same bits.
    """
    entry = tiles + tl.program_id(0) * 4
    sequence, first = tl.load(entry).to(tl.int64), tl.load(entry + 1)
    count, position = tl.load(entry + 2), tl.load(entry + 3)
    over = tl.cdiv(group, HEADS)
    g, part, segment = tl.program_id(1) // over, tl.program_id(1) % over, tl.program_id(2)
    m = tl.arange(0, BM)
    own = part * HEADS + m % HEADS
    here = (m // HEADS < count) & (own < group)
    row, head = (first + m // HEADS).to(tl.int64), g * group + own
    end = position + m // HEADS + 1
    begin, least = first_seen(end, window), first_seen(position + 1, window)
    low = tl.maximum(segment * SEGMENT, least // STEP * STEP)
    high = tl.minimum((segment + 1) * SEGMENT, position + count)
    if (count > 0) & (low < high):
        q_size = d_size + r_size
        query, q_scale = load_queries(q, row, head, heads, here, 0, d_size, q_size, D, KIND)
        turned, t_scale = query, q_scale
        if R > 0:
            turned, t_scale = load_queries(
                q, row, head, heads, here, d_size, r_size, q_size, R, KIND
            )
        own_blocks = blocks + sequence * table
        highest, total, mean = walk(
            query, q_scale, turned, t_scale, k, k_scale, r, r_scale, v, v_scale, own_blocks,
            here, begin, end, g, least, low, high, scale,
            kv_heads, d_size, r_size, v_size, page, KIND, LATENT, False, D, R, V, STEP,
        )  # fmt: skip
        if SHARED and KIND != INT8:  # noqa: SIM102 - known as it is compiled
            if tl.max(tl.max(tl.where(tl.abs(mean) < float("inf"), 0, 1), 1), 0) > 0:
                highest, total, mean = walk(
                    query, q_scale, turned, t_scale, k, k_scale, r, r_scale, v, v_scale,
                    own_blocks, here, begin, end, g, least, low, high, scale,
                    kv_heads, d_size, r_size, v_size, page, KIND, LATENT, True, D, R, V, STEP,
                )  # fmt: skip
        place = ((row - base_row) * heads + head) * segments + segment
        tl.store(highs + place, highest, mask=here)
        tl.store(totals + place, total, mask=here)
        store_rows(means + place[:, None] * v_size, mean, here, v_size, V)


@triton.jit
def merge_kernel(
    highs, totals, means, sinks, ends, out, window, heads, v_size, segments,
    V: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """[rows, A, V] of one row and head: its segments in ascending order, then its sink; 0 of a row
    that sees nothing."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    end = tl.load(ends + row)
    begin = first_seen(end, window)
    d = tl.arange(0, V)
    highest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    mean = tl.zeros([V], tl.float32)
    for segment in range(begin // SEGMENT, tl.cdiv(end, SEGMENT)):
        place = (row * heads + head) * segments + segment
        other = tl.load(highs + place) + tl.zeros([1], tl.float32)
        above = tl.maximum(highest, other)
        base = tl.where(above > float("-inf"), above, 0.0)
        mine, theirs = lang.exp(highest - base), lang.exp(other - base)
        total = total * mine + tl.load(totals + place) * theirs
        added = tl.load(means + place * v_size + d, mask=d < v_size, other=0.0)
        mean = mean * mine + added * theirs
        highest = above
    if sinks is not None:
        sink = tl.load(sinks + head) + tl.zeros([1], tl.float32)
        above = tl.maximum(highest, sink)
        mine = lang.exp(highest - above)
        total = total * mine + lang.exp(sink - above)
        mean = mean * mine
    total = tl.where(end > 0, total, 1.0)
    value = tl.div_rn(mean, total + tl.zeros([V], tl.float32))
    tl.store(out + (row * heads + head) * v_size + d, value, mask=d < v_size)
