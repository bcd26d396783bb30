"""From logits to experts and weights (``RouterSpec``): one program per token. Letters: see ``ops``.

Scores are found in fp64 and rounded to fp32, as the oracle does, so that equal logits have equal
scores and the order of unequal ones is the oracle's but where two roundings decide. Experts stand
as [groups, width], both padded to powers of two: their order stays that of their ids, and of equals
the first wins. What is NaN is chosen last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moeserve.kernels.triton.device import lang

SOFTMAX: tl.constexpr = tl.constexpr(0)
SIGMOID: tl.constexpr = tl.constexpr(1)
TOPK_SOFTMAX: tl.constexpr = tl.constexpr(2)
LEAST: tl.constexpr = tl.constexpr(-3.0e38)  # above what cannot be chosen


@triton.jit
def scores_of(logits, there, SCORING: tl.constexpr):
    """fp32, of fp32 logits where ``there``."""
    x = tl.where(there, logits, float("-inf")).to(tl.float64)
    if SCORING == SOFTMAX:
        part = lang.exp64(x - tl.max(tl.max(x, 1), 0))
        out = (part / tl.sum(tl.sum(part, 1), 0)).to(tl.float32)
    elif SCORING == SIGMOID:
        part = lang.exp64(-tl.abs(x))
        out = (tl.where(x < 0.0, part, 1.0) / (1.0 + part)).to(tl.float32)
    else:
        out = logits
    return out


@triton.jit
def groups_kept(choice, groups, KEPT: tl.constexpr, TOP2: tl.constexpr, GROUPS: tl.constexpr):
    """Which of [GROUPS] have the greatest sums of their two best (or greatest best)."""
    best = tl.max(choice, 1)
    if TOP2:
        width = tl.arange(0, choice.shape[1])
        first = tl.argmax(choice, 1, tie_break_left=True)
        rest = tl.where(width[None, :] == first[:, None], float("-inf"), choice)
        best = best + tl.max(rest, 1)
    group = tl.arange(0, GROUPS)
    best = tl.where(best > LEAST, best, LEAST)
    best = tl.where(group < groups, best, float("-inf"))
    kept = group < 0
    for _ in tl.static_range(KEPT):
        top = tl.argmax(best, 0, tie_break_left=True)
        kept = kept | (group == top)
        best = tl.where(group == top, float("-inf"), best)
    return kept


@triton.jit
def weights_of(chosen, CHOSEN: tl.constexpr, TOP_K: tl.constexpr, SCORING: tl.constexpr,
               NORMALISE: tl.constexpr):  # fmt: skip
    """[CHOSEN] of the chosen scores, of which the first TOP_K count."""
    there = tl.arange(0, CHOSEN) < TOP_K
    out = chosen
    if SCORING == TOPK_SOFTMAX:
        part = lang.exp(chosen - tl.max(tl.where(there, chosen, float("-inf")), 0))
        out = tl.div_rn(
            part, tl.zeros([CHOSEN], tl.float32) + tl.sum(tl.where(there, part, 0.0), 0)
        )
    elif NORMALISE:
        total = tl.sum(tl.where(there, chosen, 0.0), 0) + 1e-20
        out = tl.div_rn(chosen, tl.zeros([CHOSEN], tl.float32) + total)
    return out


@triton.jit
def route_kernel(
    logits, bias, ids, weights, groups, width, scale,
    SCORING: tl.constexpr, NORMALISE: tl.constexpr, TOP_K: tl.constexpr, KEPT: tl.constexpr,
    TOP2: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, CHOSEN: tl.constexpr,
):  # fmt: skip
    """ids int32 and weights fp32 [T, TOP_K] of logits [T, groups * width]; ``KEPT`` groups may be
    chosen from, 0 where all may."""
    t = tl.program_id(0).to(tl.int64)
    group, place = tl.arange(0, GROUPS)[:, None], tl.arange(0, WIDTH)[None, :]
    there = (group < groups) & (place < width)
    e = group * width + place
    score = tl.load(logits + t * groups * width + e, mask=there, other=0.0)
    score = scores_of(score, there, SCORING)
    choice = score
    if bias is not None:
        choice = choice + tl.load(bias + e, mask=there, other=0.0)
    choice = tl.where(choice > LEAST, choice, LEAST)
    choice = tl.where(there, choice, float("-inf"))
    if KEPT > 0:
        kept = groups_kept(choice, groups, KEPT, TOP2, GROUPS)
        choice = tl.where(kept[:, None], choice, float("-inf"))
    choice = tl.reshape(choice, [GROUPS * WIDTH])
    score = tl.reshape(score, [GROUPS * WIDTH])
    place = tl.arange(0, GROUPS * WIDTH)
    c = tl.arange(0, CHOSEN)
    found = tl.zeros([CHOSEN], tl.float32)
    experts = tl.zeros([CHOSEN], tl.int32)
    for i in tl.static_range(TOP_K):
        top = tl.argmax(choice, 0, tie_break_left=True)
        own = tl.sum(tl.where(place == top, score, 0.0), 0)
        found = tl.where(c == i, own, found)
        experts = tl.where(c == i, (top // WIDTH) * width + top % WIDTH, experts)
        choice = tl.where(place == top, float("-inf"), choice)
    found = weights_of(found, CHOSEN, TOP_K, SCORING, NORMALISE) * scale
    tl.store(ids + t * TOP_K + c, experts, mask=c < TOP_K)
    tl.store(weights + t * TOP_K + c, found, mask=c < TOP_K)
