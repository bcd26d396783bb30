"""A round of re-planning: what ranks counted, a plan solved for it, and proposed where it pays."""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moeserve.engine.replan.benefit import ReplanPolicy, StepSample
from moeserve.engine.replan.coordinator import PlanChange
from moeserve.engine.replan.live import LivePlan
from moeserve.engine.replan.replanner import (
    LEAST_TOKENS,
    Replanner,
    ReplanSettings,
    StepHistory,
)
from moeserve.errors import LateRankError, PlacementError
from moeserve.placement.plan import Plan

WORLD, EXPERTS, K, LAYERS = 2, 4, 2, (0, 1)
APART = Plan(np.array([[0, 2, 1, 3]] * 2, np.int32), EXPERTS, WORLD, 1, LAYERS)
TOGETHER = Plan(np.array([[0, 1, 2, 3]] * 2, np.int32), EXPERTS, WORLD, 1, LAYERS)


def counted(tokens: int) -> Mapping[str, Any]:
    """Experts 0 and 1 go together, as do 2 and 3."""
    pairs = np.array([[[0, 1]] * 2, [[2, 3]] * 2], np.int16)
    sample = np.tile(pairs, (tokens // 2, 1, 1))
    return {"tokens": 1000 * tokens, "sample": base64.b64encode(sample.tobytes()).decode()}


@dataclass
class Coordinator:
    plan: Plan = APART
    changing: bool = False
    changes: list[PlanChange] = field(default_factory=list)
    proposed: list[Plan] = field(default_factory=list)
    answers: dict[int, Mapping[str, Any]] = field(
        default_factory=lambda: {rank: counted(LEAST_TOKENS) for rank in range(WORLD)}
    )
    events: list[str] = field(default_factory=list)

    def propose(self, plan: Plan) -> None:
        self.proposed.append(plan)

    def ask(self, timeout_s: float) -> dict[int, Mapping[str, Any]]:
        assert timeout_s == 7.0
        if not self.answers:
            raise LateRankError("ranks [1] gave no routing counts in 7 s", [1])
        return self.answers

    def start(self) -> None:
        self.events.append("start")

    def close(self) -> None:
        self.events.append("close")


def replanner(coordinator: Any, clock: list[float]) -> Replanner:
    """Copies cost; ``TOGETHER`` saves half of them."""
    history, random = StepHistory(), np.random.default_rng(0)
    for _ in range(200):
        tokens = int(random.integers(16, 256))
        copies = int(tokens * random.uniform(1, 4))
        busiest = int(copies * random.uniform(0.5, 1))
        history.record(StepSample(1e-4 + 1e-5 * tokens + 1e-5 * copies, tokens, copies, busiest))
    settings = ReplanSettings(1000, 1e9, K, every_s=0.001, answer_s=7.0)

    asked = []

    def solve(plan: Plan, topk_TLK: NDArray[np.int32]) -> Plan:
        assert plan is APART
        asked.append(len(topk_TLK))
        whole = WORLD * LEAST_TOKENS
        assert asked in ([whole // 2], [whole // 2, whole])  # then again from all of the sample
        return TOGETHER

    return Replanner(coordinator, history, settings, solve, ReplanPolicy(), lambda: clock[0])


def test_a_plan_that_pays_is_proposed_but_not_soon_again() -> None:
    coordinator, clock = Coordinator(), [100.0]
    one = replanner(coordinator, clock)
    clock[0] = 160.0
    found = one.consider()
    assert found.apply, found.why
    assert coordinator.proposed == [TOGETHER]
    clock[0] = 220.0
    assert one.consider().why == "the last change is too recent"
    assert coordinator.proposed == [TOGETHER]
    assert [d.apply for d in one.decisions] == [True, False]


def test_it_waits_for_a_change_under_way_and_for_tokens() -> None:
    coordinator = Coordinator(changing=True)
    one = replanner(coordinator, [0.0])
    assert one.consider().why == "a change is under way"
    coordinator.changing = False
    coordinator.answers = {0: counted(2), 1: counted(4)}
    assert one.consider().why == f"6 tokens were sampled, {LEAST_TOKENS} are few"


def test_the_last_change_tells_what_moving_costs() -> None:
    """A pause of an hour never pays."""
    coordinator, clock = Coordinator(), [0.0]
    coordinator.changes.append(PlanChange(1, 1, bytes_read=10, prepare_s=1.0, paused_s=3600.0))
    one = replanner(coordinator, clock)
    clock[0] = 60.0
    found = one.consider()
    assert not found.apply
    assert found.cost_s >= 2 * 3600


def test_ranks_that_do_not_answer_or_talk_nonsense_cost_a_round(
    caplog: pytest.LogCaptureFixture,
) -> None:
    coordinator: Any = Coordinator(answers={})
    one = replanner(coordinator, [0.0])
    with pytest.raises(LateRankError):
        one.consider()
    coordinator.answers = {0: {"tokens": 1, "sample": "?"}, 1: counted(2)}
    with pytest.raises(PlacementError, match="cannot be read"):
        one.consider()
    live_plan = LivePlan(coordinator, (0, 0), one)
    live_plan.start()
    ends = time.monotonic() + 20
    while "cannot be read" not in caplog.text:
        assert time.monotonic() < ends
        time.sleep(0.001)
    live_plan.close()
    assert coordinator.events == ["start", "close"]


def test_steps_beyond_the_newest_are_forgotten() -> None:
    history = StepHistory(kept=3)
    steps = [StepSample(0.1 * n, n, 2 * n, n) for n in range(5)]
    for one in steps:
        history.record(one)
    assert history.steps == steps[2:]
