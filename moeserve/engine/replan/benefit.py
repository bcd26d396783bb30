"""Whether a new plan pays, from what was counted and measured while serving.

A step's seconds are taken to be linear in four counts, with no coefficient below zero::

    seconds = fixed + token * tokens + copy * copies + busiest * busiest

``copies`` are those that ranks sent each other, ``busiest`` those that came to the rank that got
most: what a plan changes. The coefficients are fitted to the steps of the recent past, and each is
trusted only as far as these steps tell it from zero and from the others (its estimate less two
standard errors). A plan's counts per token come from the cost model, on tokens sampled just now;
candidates are judged on tokens that they were not made from.

Moving costs the time to read what ranks lack at the measured rate, though it happens beside the
steps, and the measured pause of every layer. A plan is applied when what it gains over the horizon
exceeds that; not more often than ``min_interval_s``, and not for less than ``min_gain`` of a step.

Pure. Letters: N steps, L layers, T tokens, K choices, D devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from moeserve.placement.layer_use import round_robin_homes, split_uses
from moeserve.placement.plan import Plan, held

F64 = NDArray[np.float64]
LEAST_STEPS = 32
_CERTAIN = 2.0  # standard errors


@dataclass(frozen=True, slots=True)
class StepSample:
    """One step of all ranks."""

    seconds: float
    tokens: int
    copies: int
    busiest: int


@dataclass(frozen=True, slots=True)
class PlanLoad:
    """What a plan does to a token, on average over recent ones: counts as in ``StepSample``."""

    copies: float
    busiest: float


@dataclass(frozen=True, slots=True)
class StepCostModel:
    """Seconds per token, per copy, and per copy at the busiest rank; ``fixed`` per step."""

    fixed: float
    token: float
    copy: float
    busiest: float

    def moved_s(self, load: PlanLoad) -> float:
        """Seconds per token that a plan decides."""
        return self.copy * load.copies + self.busiest * load.busiest


@dataclass(frozen=True, slots=True)
class MoveCost:
    """Measured: bytes that ranks read per second, together, and what switching a layer holds up."""

    bytes_per_s: float
    pause_s: float


@dataclass(frozen=True, slots=True)
class ReplanPolicy:
    horizon_s: float = 600.0
    min_interval_s: float = 120.0
    min_gain: float = 0.03


@dataclass(frozen=True, slots=True)
class Conditions:
    """When, and how much is going on: tokens computed per second by all ranks, and per step."""

    seconds: float
    last_change_s: float | None
    tokens_per_s: float
    tokens_per_step: float


@dataclass(frozen=True, slots=True)
class ReplanDecision:
    """``gain_s`` over the horizon, ``cost_s`` of moving; ``why`` is for the log."""

    apply: bool
    why: str
    gain_s: float = 0.0
    cost_s: float = 0.0


def fit(steps: Sequence[StepSample]) -> StepCostModel | None:
    """None where there are too few steps to tell anything."""
    if len(steps) < LEAST_STEPS:
        return None
    x_N4 = np.array([[1, s.tokens, s.copies, s.busiest] for s in steps], np.float64)
    y_N = np.array([s.seconds for s in steps])
    scale_4 = np.maximum(np.abs(x_N4).max(axis=0), 1e-12)
    best_4, used = _least_squares(x_N4 / scale_4, y_N)
    doubt_4 = _doubt(x_N4 / scale_4, y_N, best_4, used)
    sure_4 = np.maximum(0.0, best_4 - _CERTAIN * doubt_4) / scale_4
    fixed, token = best_4[:2] / scale_4[:2]
    return StepCostModel(float(fixed), float(token), float(sure_4[2]), float(sure_4[3]))


def plan_load(plan: Plan, topk_TLK: NDArray[np.int32], batch: int) -> PlanLoad:
    """Of each token that a rank computes, homes in turn, ``batch`` tokens a rank at a time."""
    home_T = round_robin_homes(len(topk_TLK), plan.num_devices, batch)
    rows_T = np.arange(len(topk_TLK))
    came_D = np.zeros(plan.num_devices)
    for use in split_uses(plan, topk_TLK, home_T, batch):
        away_TD = use.used_TD.copy()
        away_TD[rows_T, home_T] = False
        came_D += away_TD.sum(axis=0)
    tokens = max(1, len(topk_TLK))
    return PlanLoad(float(came_D.sum()) / tokens, float(came_D.max()) / tokens)


def bytes_to_read(current: Plan, candidate: Plan, expert_bytes: int) -> int:
    """A rank whose experts in a layer change reads all of its own there, each once."""
    changed_LD = _by_device(current) != _by_device(candidate)
    reads_LD = changed_LD.any(axis=2)
    return int(held(candidate).sum(axis=2)[reads_LD].sum()) * expert_bytes


def layers_that_differ(current: Plan, candidate: Plan) -> int:
    return int((current.expert_LS != candidate.expert_LS).any(axis=1).sum())


def moving_s(current: Plan, candidate: Plan, expert_bytes: int, moving: MoveCost) -> float:
    """Seconds of reading and of pauses."""
    read = bytes_to_read(current, candidate, expert_bytes)
    return _moving_s((read, layers_that_differ(current, candidate)), moving)


def _moving_s(moves: tuple[int, int], moving: MoveCost) -> float:
    return moves[0] / max(1e-9, moving.bytes_per_s) + moves[1] * moving.pause_s


def too_recent(policy: ReplanPolicy, now: Conditions) -> bool:
    """Whether the last change was made less than ``min_interval_s`` ago."""
    last_s = now.last_change_s
    return last_s is not None and now.seconds - last_s < policy.min_interval_s


def judge(
    policy: ReplanPolicy,
    now: Conditions,
    weights: StepCostModel | None,
    plans: tuple[Plan, Plan],
    judged_TLK: NDArray[np.int32],
    expert_bytes: int,
    moving: MoveCost,
) -> ReplanDecision:
    """``decide`` of the current plan and a candidate, by tokens that it was not made from."""
    current, candidate = plans
    batch = max(1, round(now.tokens_per_step / current.num_devices))
    loads = plan_load(current, judged_TLK, batch), plan_load(candidate, judged_TLK, batch)
    read = bytes_to_read(current, candidate, expert_bytes)
    moves = read, layers_that_differ(current, candidate)
    return decide(policy, now, weights, loads, moves, moving)


def decide(
    policy: ReplanPolicy,
    now: Conditions,
    weights: StepCostModel | None,
    loads: tuple[PlanLoad, PlanLoad],
    moves: tuple[int, int],
    moving: MoveCost,
) -> ReplanDecision:
    """``loads`` of the current plan and the candidate; ``moves`` are bytes to read and layers."""
    if weights is None:
        return ReplanDecision(False, "too few steps were measured")
    if too_recent(policy, now):
        return ReplanDecision(False, "the last change is too recent")
    current, candidate = loads
    per_token = weights.moved_s(current) - weights.moved_s(candidate)
    step_s = weights.fixed + now.tokens_per_step * (weights.token + weights.moved_s(current))
    gain_s = per_token * now.tokens_per_s * policy.horizon_s
    cost_s = _moving_s(moves, moving)
    if per_token * now.tokens_per_step <= policy.min_gain * step_s:
        why = f"it would save {per_token * now.tokens_per_step:.3g} s of steps of {step_s:.3g} s"
        return ReplanDecision(False, why, gain_s, cost_s)
    if gain_s <= cost_s:
        why = f"it would save {gain_s:.3g} s within the horizon, and moving takes {cost_s:.3g} s"
        return ReplanDecision(False, why, gain_s, cost_s)
    return ReplanDecision(
        True, f"it saves {gain_s:.3g} s for {cost_s:.3g} s of moving", gain_s, cost_s
    )


def _by_device(plan: Plan) -> NDArray[np.int32]:
    return plan.expert_LS.reshape(plan.num_layers, plan.num_devices, -1)


def _least_squares(x_N4: F64, y_N: F64) -> tuple[F64, tuple[int, ...]]:
    """The best with no coefficient below zero: of few columns, every subset can be tried."""
    best_4, least = np.zeros(x_N4.shape[1]), float((y_N**2).sum())
    used: tuple[int, ...] = ()
    for count in range(1, x_N4.shape[1] + 1):
        for columns in combinations(range(x_N4.shape[1]), count):
            found = np.linalg.lstsq(x_N4[:, columns], y_N, rcond=None)[0]
            off = float(((x_N4[:, columns] @ found - y_N) ** 2).sum())
            if (found >= 0).all() and off < least * (1 - 1e-12):
                best_4, least, used = np.zeros(x_N4.shape[1]), off, columns
                best_4[list(columns)] = found
    return best_4, used


def _doubt(x_N4: F64, y_N: F64, best_4: F64, used: tuple[int, ...]) -> F64:
    """Standard errors, where all four are in question: what steps cannot tell apart is in doubt."""
    off_N = x_N4 @ best_4 - y_N
    variance = float((off_N**2).sum()) / max(1, len(y_N) - len(used))
    spread_44 = np.linalg.pinv(x_N4.T @ x_N4 + 1e-9 * np.eye(4), hermitian=True)
    doubt_4: F64 = np.sqrt(np.maximum(0.0, np.diag(spread_44)) * variance)
    return doubt_4
