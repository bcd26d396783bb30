"""Re-planning pays or does not happen: after a drift once, on noise never, for a short horizon no.

The world is synthetic: steps take what hidden coefficients say, plus noise.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moeserve.engine.replan.benefit import (
    LEAST_STEPS,
    Conditions,
    MoveCost,
    PlanLoad,
    ReplanPolicy,
    StepCostModel,
    StepSample,
    bytes_to_read,
    decide,
    fit,
    layers_that_differ,
    plan_load,
)
from moeserve.placement.cluster import Cluster, Dataflow
from moeserve.placement.plan import Plan
from moeserve.placement.problem import Problem
from moeserve.placement.routing import Routing, workload_of_tokens
from moeserve.placement.solvers.portfolio import Budget, solve

DEVICES, EXPERTS, K, LAYERS = 4, 16, 2, (0, 1)
TRUE = StepCostModel(fixed=1e-3, token=2e-5, copy=4e-6, busiest=1e-5)
BATCH = 32


def seconds(weights: StepCostModel, tokens: float, copies: float, busiest: float) -> float:
    return (
        weights.fixed + weights.token * tokens + weights.copy * copies + weights.busiest * busiest
    )


def steps_of(weights: StepCostModel, noise: float, seed: int, count: int = 400) -> list[StepSample]:
    """Steps of all sizes; some crowd one rank more than others do."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        tokens = int(random.integers(1, 512))
        copies = int(tokens * random.uniform(2, 4))
        busiest = int(copies / DEVICES * random.uniform(1, 2))
        exact = seconds(weights, tokens, copies, busiest)
        found.append(StepSample(exact * random.lognormal(0, noise), tokens, copies, busiest))
    return found


def test_coefficients_come_from_measured_steps() -> None:
    found = fit(steps_of(TRUE, 0.0, 0))
    assert found is not None
    for name in ("fixed", "token", "copy", "busiest"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=1e-3)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_what_steps_do_not_show_is_not_believed(seed: int) -> None:
    """Copies that cost nothing, and noise; and steps that cannot tell copies from tokens."""
    free = StepCostModel(1e-3, 4e-5, 0.0, 0.0)
    found = fit(steps_of(free, 0.2, seed))
    assert found is not None
    assert found.copy <= 0.2 * free.token
    assert found.busiest <= 0.2 * free.token
    proportional = [
        StepSample(seconds(TRUE, t, 3 * t, t), t, 3 * t, t)
        for t in np.random.default_rng(seed).integers(1, 512, 100).tolist()
    ]
    noisy = [
        StepSample(s.seconds * (1 + 0.01 * (-1) ** i), s.tokens, s.copies, s.busiest)
        for i, s in enumerate(proportional)
    ]
    found = fit(noisy)
    assert found is not None
    assert found.copy == found.busiest == 0.0


def test_few_steps_tell_nothing() -> None:
    assert fit(steps_of(TRUE, 0.0, 0, LEAST_STEPS - 1)) is None
    loads = (PlanLoad(3.0, 2.0), PlanLoad(1.0, 0.5))
    now = Conditions(0.0, None, 1e4, 100.0)
    assert not decide(ReplanPolicy(), now, None, loads, (0, 1), MoveCost(1e9, 0.0)).apply


def tokens_of(topic: int, count: int, seed: int) -> NDArray[np.int32]:
    """Groups of experts that go together; another topic has other groups."""
    random = np.random.default_rng(seed)
    groups = np.random.default_rng(1000 + topic).permutation(EXPERTS).reshape(DEVICES, -1)
    topk = np.empty((count, len(LAYERS), K), np.int32)
    for t in range(count):
        for l in range(len(LAYERS)):
            topk[t, l] = random.permutation(groups[random.integers(DEVICES)])[:K]
    return topk


def planned(topk: NDArray[np.int32]) -> Plan:
    trace = workload_of_tokens("now", topk, None, num_experts=EXPERTS)
    problem = Problem(Cluster(DEVICES), EXPERTS, Dataflow.HOME_DEDUP, max_imbalance=1.3)
    return solve(problem, Routing((trace,), LAYERS), budget=Budget(None, threads=1))


@dataclass
class World:
    """Serves by a plan, measures, considers another every ``every_s``."""

    plan: Plan
    policy: ReplanPolicy
    noise: float = 0.05
    changes: list[float] = field(default_factory=list)
    whys: list[str] = field(default_factory=list)

    def consider(self, now_s: float, topic: int, seed: int) -> None:
        topk = tokens_of(topic, 600, seed)
        candidate = planned(topk[::2])
        loads = (plan_load(self.plan, topk[1::2], BATCH), plan_load(candidate, topk[1::2], BATCH))
        random = np.random.default_rng(seed)
        steps = []
        for _ in range(200):
            tokens = int(random.integers(16, 256))
            copies = int(tokens * loads[0].copies * random.uniform(0.7, 1.3))
            busiest = int(tokens * loads[0].busiest * random.uniform(0.7, 1.3))
            exact = seconds(TRUE, tokens, copies, busiest)
            steps.append(
                StepSample(exact * random.lognormal(0, self.noise), tokens, copies, busiest)
            )
        last = self.changes[-1] if self.changes else None
        now = Conditions(now_s, last, tokens_per_s=2e4, tokens_per_step=128.0)
        moves = (bytes_to_read(self.plan, candidate, 10**6), 2)
        found = decide(self.policy, now, fit(steps), loads, moves, MoveCost(1e8, 1e-3))
        self.whys.append(found.why)
        if found.apply:
            self.plan = candidate
            self.changes.append(now_s)


def test_after_a_drift_it_changes_once() -> None:
    world = World(planned(tokens_of(0, 600, 1)), ReplanPolicy(horizon_s=600))
    for tick in range(12):
        world.consider(60.0 * tick, topic=0 if tick < 4 else 1, seed=100 + tick)
    assert world.changes == [240.0], world.whys


@pytest.mark.parametrize("seed", range(3))
def test_on_noise_it_never_changes(seed: int) -> None:
    world = World(planned(tokens_of(0, 600, seed)), ReplanPolicy(horizon_s=1e6), noise=0.2)
    for tick in range(6):
        world.consider(60.0 * tick, topic=0, seed=1000 * seed + tick)
    assert world.changes == [], world.whys


def test_never_when_the_horizon_is_too_short() -> None:
    world = World(planned(tokens_of(0, 600, 1)), ReplanPolicy(horizon_s=0.5))
    for tick in range(4):
        world.consider(60.0 * tick, topic=1, seed=tick)
    assert world.changes == []
    assert all("within the horizon" in why for why in world.whys)


def test_changes_keep_their_distance() -> None:
    world = World(planned(tokens_of(0, 600, 1)), ReplanPolicy(min_interval_s=200.0))
    for tick in range(9):
        world.consider(60.0 * tick, topic=1 + tick % 2, seed=tick)
    assert len(world.changes) > 1
    assert min(np.diff(world.changes)) >= 200.0


def test_moving_is_counted_where_a_rank_reads() -> None:
    old = Plan(np.array([[0, 1, 2, 3], [0, 1, 2, 3]], np.int32), 4, 2, 1, (0, 1))
    new = Plan(np.array([[0, 1, 3, 2], [0, 1, 2, 3]], np.int32), 4, 2, 1, (0, 1))
    assert bytes_to_read(old, new, 10) == 20
    assert layers_that_differ(old, new) == 1
    assert bytes_to_read(old, old, 10) == layers_that_differ(old, old) == 0


def test_a_plans_load_is_what_ranks_would_count() -> None:
    plan = Plan(np.array([[0, 1, 2, 3]], np.int32), 4, 4, 1, (0,))
    topk = np.array([[[0, 1]], [[1, 2]], [[1, 3]], [[1, 3]]], np.int32)
    # One token at each home: away from it go 1, 2 (1 is home), 1 and 3, 1 (3 is home).
    assert plan_load(plan, topk, batch=1) == PlanLoad(copies=5 / 4, busiest=3 / 4)
