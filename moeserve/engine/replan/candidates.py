"""A candidate plan, made and judged on one sample of recent tokens.

Every other token is for the solver and the rest for the judgement, so that no plan is judged on
what it was made from. Where that one pays, another is made from all of the sample: more tokens make
a better plan. Of the two, the one that is better on all of the sample is used: the second was made
from all of it, so where it is the worse one even there, the search went wrong. What moving it costs
is judged again. Where no change may be made yet, nothing is solved.

Letters: T tokens, L layers, K choices per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moeserve.engine.replan.benefit import (
    Conditions,
    MoveCost,
    ReplanDecision,
    ReplanPolicy,
    StepCostModel,
    judge,
    moving_s,
    plan_load,
    too_recent,
)
from moeserve.placement.plan import Plan

Solve = Callable[[Plan, NDArray[np.int32]], Plan]


@dataclass(frozen=True, slots=True)
class Prices:
    """What steps and moves take: measured, or given. ``weights`` None: too few steps were seen."""

    weights: StepCostModel | None
    expert_bytes: int
    moving: MoveCost


def consider(
    policy: ReplanPolicy,
    now: Conditions,
    prices: Prices,
    current: Plan,
    sample_TLK: NDArray[np.int32],
    solve: Solve,
) -> tuple[ReplanDecision, Plan]:
    """Whether to change, and the plan to change to (the current one where not)."""
    if too_recent(policy, now):
        return ReplanDecision(False, "the last change is too recent"), current
    candidate = solve(current, sample_TLK[::2])
    found = judge(
        policy,
        now,
        prices.weights,
        (current, candidate),
        sample_TLK[1::2],
        prices.expert_bytes,
        prices.moving,
    )
    if not found.apply:
        return found, current
    assert prices.weights is not None  # else it would not pay
    batch = max(1, round(now.tokens_per_step / current.num_devices))

    def costs_s(plan: Plan) -> float:
        return weights.moved_s(plan_load(plan, sample_TLK, batch))

    weights = prices.weights
    best = min(solve(current, sample_TLK), candidate, key=costs_s)
    cost_s = moving_s(current, best, prices.expert_bytes, prices.moving)
    if found.gain_s <= cost_s:
        why = f"it would save {found.gain_s:.3g} s within the horizon; moving takes {cost_s:.3g} s"
        return replace(found, apply=False, why=why, cost_s=cost_s), current
    return replace(found, cost_s=cost_s), best
