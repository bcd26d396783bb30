"""A shift of traffic replayed through the re-planning policy, with no runtime: what it costs.

Recorded routing of one domain after the other (and of mixtures) is what ranks would have counted.
Every ``every_s`` a part of it goes where a running server's sample goes, to ``candidates``, which
says whether a new plan pays. Steps take what ``StepCostModel`` says
of the plan in use, moving what ``MoveCost`` says; both are given, no clock is read.

Three ways through the same traffic are compared, in seconds of steps and of moving:

- ``policy``: what the runtime would have done;
- ``nothing``: the first plan for ever;
- ``hindsight``: the cheapest sequence, moves paid, over every plan that turned up, one fitted to
  each phase and one to all of them. Nobody could have known it.

``nothing - hindsight`` is the cost of the shift, ``policy - hindsight`` the regret. Letters as in
``placement``; I intervals, P plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moeserve.engine.replan.benefit import (
    Conditions,
    MoveCost,
    ReplanPolicy,
    StepCostModel,
    bytes_to_read,
    layers_that_differ,
    moving_s,
    plan_load,
)
from moeserve.engine.replan.candidates import Prices, Solve, consider
from moeserve.errors import PlacementError
from moeserve.placement.plan import Plan
from moeserve.placement.solvers.covariance import WINDOW

I32 = NDArray[np.int32]
F64 = NDArray[np.float64]

LEAST_TOKENS = 16  # of a phase, counted and served each


@dataclass(frozen=True, slots=True, eq=False)
class TrafficPhase:
    """Traffic of one kind, for some intervals. Plans are made from ``counted_TLK`` and pay for
    ``served_TLK``: two parts of it, so that none is fitted to what it is measured on."""

    name: str
    counted_TLK: I32
    served_TLK: I32
    intervals: int

    def __post_init__(self) -> None:
        tokens = min(len(self.counted_TLK), len(self.served_TLK))
        if self.intervals < 1 or tokens < LEAST_TOKENS:
            raise PlacementError(
                f"phase {self.name}: {self.intervals} intervals of {tokens} tokens; a phase needs "
                f"an interval and {LEAST_TOKENS} tokens, counted and served"
            )


def phase_of(name: str, topk_TLK: I32, intervals: int) -> TrafficPhase:
    """Every other window of recorded tokens is counted, the rest is served."""
    odd_T = np.arange(len(topk_TLK)) // WINDOW % 2 == 1
    return TrafficPhase(name, topk_TLK[~odd_T], topk_TLK[odd_T], intervals)


@dataclass(frozen=True, slots=True)
class ReplaySettings:
    """``sampled`` is the most tokens that ranks hand over in an interval."""

    step: StepCostModel
    moving: MoveCost
    expert_bytes: int
    tokens_per_s: float
    tokens_per_step: float
    every_s: float = 60.0
    sampled: int = 4096


@dataclass(frozen=True, slots=True)
class ReplayedChange:
    """At the end of an interval, with what the policy weighed and what it moved."""

    interval: int
    gain_s: float
    cost_s: float
    bytes_read: int
    layers: int


@dataclass(frozen=True, slots=True, eq=False)
class Replay:
    """Seconds for each interval's tokens on the three ways, without moving; moving beside it."""

    phase_I: tuple[str, ...]
    policy_I: F64
    nothing_I: F64
    hindsight_I: F64
    changes: tuple[ReplayedChange, ...]
    hindsight_changes: int
    hindsight_moving_s: float

    @property
    def moving_s(self) -> float:
        return sum(change.cost_s for change in self.changes)

    @property
    def bytes_read(self) -> int:
        return sum(change.bytes_read for change in self.changes)

    @property
    def regret_s(self) -> float:
        return float(self.policy_I.sum()) + self.moving_s - self._best_s

    @property
    def shift_cost_s(self) -> float:
        return float(self.nothing_I.sum()) - self._best_s

    @property
    def _best_s(self) -> float:
        return float(self.hindsight_I.sum()) + self.hindsight_moving_s


@dataclass(slots=True, eq=False)
class _Costs:
    """Plans by number, and what a phase costs under each: computed once."""

    settings: ReplaySettings
    plans: list[Plan] = field(default_factory=list)
    _known: dict[tuple[int, str], float] = field(default_factory=dict)

    def number(self, plan: Plan) -> int:
        for p, known in enumerate(self.plans):
            if (known.expert_LS == plan.expert_LS).all():
                return p
        self.plans.append(plan)
        return len(self.plans) - 1

    def seconds(self, p: int, phase: TrafficPhase) -> float:
        """Of the steps of an interval."""
        key = (p, phase.name)
        if key not in self._known:
            s = self.settings
            batch = max(1, round(s.tokens_per_step / self.plans[p].num_devices))
            load = plan_load(self.plans[p], phase.served_TLK, batch)
            per_token = s.step.fixed / s.tokens_per_step + s.step.token + s.step.moved_s(load)
            self._known[key] = per_token * s.tokens_per_s * s.every_s
        return self._known[key]

    def moving_s(self, a: int, b: int) -> float:
        s = self.settings
        return moving_s(self.plans[a], self.plans[b], s.expert_bytes, s.moving)


def replay(
    phases: Sequence[TrafficPhase],
    first: Plan,
    settings: ReplaySettings,
    solve: Solve,
    policy: ReplanPolicy | None = None,
) -> Replay:
    """Through all ``phases``, from plan ``first`` on. ``solve`` is asked as the runtime asks it."""
    if not phases or len({phase.name for phase in phases}) < len(phases):
        raise PlacementError("a replay needs phases, each with a name of its own")
    policy = policy or ReplanPolicy()
    costs = _Costs(settings)
    costs.number(first)
    intervals = [phase for phase in phases for _ in range(phase.intervals)]
    policy_I, changes = _policy(policy, costs, intervals, solve)
    for phase in phases:
        costs.number(solve(first, phase.counted_TLK))
    costs.number(solve(first, np.concatenate([phase.counted_TLK for phase in phases])))
    every_P = range(len(costs.plans))
    cost_IP = np.array([[costs.seconds(p, phase) for p in every_P] for phase in intervals])
    move_PP = np.array([[costs.moving_s(a, b) for b in every_P] for a in every_P])
    path_I, moving_s = cheapest_path(cost_IP, move_PP)
    rows_I = np.arange(len(cost_IP))
    moves = int((np.diff(np.concatenate(([0], path_I))) != 0).sum())
    return Replay(
        tuple(phase.name for phase in intervals),
        policy_I,
        cost_IP[:, 0],
        cost_IP[rows_I, path_I],
        tuple(changes),
        moves,
        moving_s,
    )


def _policy(
    policy: ReplanPolicy, costs: _Costs, intervals: Sequence[TrafficPhase], solve: Solve
) -> tuple[F64, list[ReplayedChange]]:
    """Seconds of each interval, and the changes, as the runtime goes."""
    s, now, changed_s = costs.settings, 0, None
    solved: dict[tuple[int, str, int], Plan] = {}
    seconds, changes = [], []
    prices = Prices(s.step, s.expert_bytes, s.moving)
    for i, phase in enumerate(intervals):
        seconds.append(costs.seconds(now, phase))
        current, at_s = costs.plans[now], (i + 1) * s.every_s

        def once(plan: Plan, topk_TLK: I32, of: tuple[int, str] = (now, phase.name)) -> Plan:
            """The same traffic gives the same plan."""
            key = (*of, len(topk_TLK))
            if key not in solved:
                solved[key] = solve(plan, topk_TLK)
            return solved[key]

        found, plan = consider(
            policy,
            Conditions(at_s, changed_s, s.tokens_per_s, s.tokens_per_step),
            prices,
            current,
            _sample(phase.counted_TLK, s.sampled),
            once,
        )
        if found.apply:
            read = bytes_to_read(current, plan, s.expert_bytes)
            layers = layers_that_differ(current, plan)
            changes.append(ReplayedChange(i, found.gain_s, found.cost_s, read, layers))
            now, changed_s = costs.number(plan), at_s
    return np.array(seconds), changes


def _sample(topk_TLK: I32, most: int) -> I32:
    """Evenly chosen tokens, at most so many."""
    tokens = len(topk_TLK)
    picked_N = np.unique(np.linspace(0, tokens - 1, min(tokens, most)).astype(int))
    found_NLK: I32 = topk_TLK[picked_N]
    return found_NLK


def cheapest_path(cost_IP: F64, move_PP: F64) -> tuple[NDArray[np.intp], float]:
    """[I] the plan of each interval, starting from plan 0 before the first, and what moving costs:
    the least sum of both (dynamic programming)."""
    best_P = move_PP[0] + cost_IP[0]
    came_IP = np.zeros(cost_IP.shape, np.intp)
    for i in range(1, len(cost_IP)):
        through_PP = best_P[:, None] + move_PP
        came_IP[i] = through_PP.argmin(axis=0)
        best_P = through_PP.min(axis=0) + cost_IP[i]
    path_I = np.zeros(len(cost_IP), np.intp)
    path_I[-1] = best_P.argmin()
    for i in range(len(cost_IP) - 1, 0, -1):
        path_I[i - 1] = came_IP[i, path_I[i]]
    moving = float(move_PP[np.concatenate(([0], path_I[:-1])), path_I].sum())
    return path_I, moving
