"""Targets of latency: steps of other orders and sizes, the same tokens, gaps as long as may be.

The clock is simulated: a step takes what ``took`` says.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.config.options import StepOptions
from moeserve.core import BudgetBy, Counters, Request, RequestId, SamplingParams, StepChoice
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.build import admission_of, targets_of
from moeserve.engine.null import NullExecutor
from moeserve.engine.policies.choices import Admission
from moeserve.engine.policies.past_future import PastFuture
from moeserve.engine.policies.targets import (
    LEAST_TOKENS,
    OVERDUE,
    PATIENCE_S,
    LatencyTargets,
    StepBudget,
    TargetAdmission,
)
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.sequence import NEW, SequenceState
from moeserve.engine.step_builder import StepBuilder
from moeserve.engine.step_cost import DecodeCost, FittedStepCost, MixedCost

VOCAB, BLOCK, LIMIT = 97, 4, 512
STEP_S, TOKEN_S = 0.004, 0.0002


def took(choice: StepChoice) -> float:
    return STEP_S + TOKEN_S * (choice.decodes + choice.prefill_tokens)


def request(i: int, prompt: int, most: int, arrival: float = 0.0) -> Request:
    params = SamplingParams(max_tokens=most, seed=i, ignore_eos=True)
    tokens = tuple((i + j) % VOCAB for j in range(prompt))
    return Request(RequestId(str(i)), tokens, params, arrival=arrival)


@dataclass
class Simulated:
    """A scheduler with a clock; ``choices`` of its steps."""

    config: SchedulerConfig
    targets: LatencyTargets | None = None
    num_blocks: int = 2000
    now: float = 0.0
    choices: list[StepChoice] = field(default_factory=list)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    came: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.decodes = DecodeCost()
        self.mixed = MixedCost(self.decodes)
        counters, limit = Counters(), self.config.max_model_len
        admission: Admission = PastFuture(limit)
        if self.targets is not None:
            admission = self.policy = TargetAdmission(admission, self.targets, self.mixed, limit)
        self.pool = BlockPool(self.num_blocks, BLOCK, counters)
        self.scheduler = Scheduler(self.config, self.pool, counters, admission)
        self.executor = NullExecutor(self.num_blocks, BLOCK, VOCAB)

    def run(self, requests: Sequence[Request]) -> None:
        coming = sorted(requests, key=lambda r: r.arrival)[::-1]
        while coming or self.scheduler.has_work:
            if not self.scheduler.has_work:
                self.now = max(self.now, coming[-1].arrival)
            while coming and coming[-1].arrival <= self.now:
                self.scheduler.add(coming.pop())
            self.step()

    def step(self) -> None:
        plan = self.scheduler.plan(self.now)
        assert plan.chunks, "a step for nothing"
        choice = plan.choice
        self.choices.append(choice)
        seconds = took(choice)
        self.now += seconds
        if choice.prefill_tokens:
            self.mixed.note(choice.prefill_tokens, choice.decodes, seconds)
        else:
            self.decodes.note(choice.decodes, seconds)
        for out in self.scheduler.apply(self.executor.run(plan)):
            self.tokens.setdefault(out.request_id, []).append(out.token_id)
            self.came.setdefault(out.request_id, []).append(self.now)

    @property
    def order(self) -> list[str]:
        """In which first tokens came."""
        return sorted(self.came, key=lambda name: self.came[name][0])


def mixed_arrivals(count: int) -> list[Request]:
    """Chats, and one in six a long document; the device is busy for most of the time."""
    draw, at, found = random.Random(3), 0.0, []
    for i in range(count):
        at += draw.expovariate(1 / 0.03)
        long = draw.random() < 0.17
        size = (draw.randint(400, 480), 4) if long else (draw.randint(8, 60), draw.randint(4, 30))
        found.append(request(i, *size, at))
    return found


def p95(values: Sequence[float]) -> float:
    return sorted(values)[int(0.95 * len(values))]


def test_first_tokens_come_sooner_at_gaps_that_are_no_longer() -> None:
    """Than first come, first served in chunks of the same bound; all of it is computed exactly."""
    requests = mixed_arrivals(120)
    found = []
    for targets in (None, LatencyTargets(tpot_s=0.055), LatencyTargets(ttft_s=0.15)):
        one = Simulated(SchedulerConfig(LIMIT, 64, 256), targets)
        one.run(requests)
        first = [one.came[r.id][0] - r.arrival for r in requests]
        gaps = [b - a for t in one.came.values() for a, b in itertools.pairwise(t)]
        found.append((one.tokens, p95(first), p95(gaps), sum(t > 0.15 for t in first)))
    (tokens, ttft, itl, late), by_gap, by_first = found
    assert by_gap[0] == by_first[0] == tokens
    assert by_gap[1] <= 0.7 * ttft
    assert by_gap[2] <= 1.05 * itl
    assert by_first[3] <= 0.3 * late


@settings(max_examples=30, deadline=None)
@given(
    asked=st.lists(
        st.tuples(st.integers(1, 60), st.integers(1, 9), st.integers(0, 2), st.floats(0, 0.3)),
        min_size=1,
        max_size=20,
    ),
    num_blocks=st.integers(18, 60),
    ttft_s=st.none() | st.floats(0.001, 1),
    tpot_s=st.none() | st.floats(0.001, 0.02),
)
def test_no_target_changes_tokens_and_everybody_ends(
    asked: list[tuple[int, int, int, float]],
    num_blocks: int,
    ttft_s: float | None,
    tpot_s: float | None,
) -> None:
    """Also where KV is short; and a step is no longer than was allowed, but for the least that it
    may have of prompts."""
    requests = [
        replace(request(i, p, g, at), priority=urgent) for i, (p, g, urgent, at) in enumerate(asked)
    ]
    config = SchedulerConfig(72, 5, 64)
    plain = Simulated(config)
    plain.run(requests)
    one = Simulated(config, LatencyTargets(ttft_s, tpot_s), num_blocks)
    one.run(requests)
    assert one.tokens == plain.tokens
    one.pool.check()
    assert one.pool.num_free == num_blocks
    for choice in one.choices:
        assert choice.decodes + choice.prefill_tokens <= choice.budget
        if choice.budget_by is BudgetBy.TPOT:
            assert tpot_s is not None
            assert choice.budget - choice.decodes >= min(LEAST_TOKENS, 64 - choice.decodes)


def test_who_is_short_goes_first_and_also_overtakes_who_is_in_the_middle() -> None:
    one = Simulated(SchedulerConfig(LIMIT, 8, 32), LatencyTargets(tpot_s=1.0))
    long, middle, short = request(0, 300, 2), request(1, 60, 2), request(2, 5, 2)
    one.scheduler.add(long)
    one.step()
    for other in (middle, short):
        one.scheduler.add(other)
    while one.scheduler.has_work:
        one.step()
    assert one.order == ["2", "1", "0"]


def test_another_admission_may_have_chosen_who_is_next() -> None:
    one = Simulated(SchedulerConfig(LIMIT, 8, 32), LatencyTargets(tpot_s=1.0))
    seqs = {r.id: SequenceState.of(r, NEW) for r in (request(0, 300, 2), request(1, 5, 2))}
    for _ in range(2):
        one.policy.begin(StepBuilder(32, 0), (), seqs, one.pool)
        assert [one.policy.pick({i: seq}, 0.0) for i, seq in seqs.items()] == [*seqs.values()]
        assert one.policy.pick(seqs, 0.0) is seqs[RequestId("1")]
    assert one.policy.pick({}, 0.0) is None


def test_who_has_waited_is_overtaken_by_nobody_who_comes_then() -> None:
    """A long prompt, and more short ones than can be served: it goes first when it has waited."""
    one = Simulated(SchedulerConfig(LIMIT, 2, 5), LatencyTargets(tpot_s=1.0))
    one.policy.aging = 2000
    one.run([request(0, 500, 1), *(request(i, 5, 1, 0.004 * i) for i in range(1, 200))])
    before = [0.004 * int(name) for name in one.order[: one.order.index("0")]]
    assert 0.2 < max(before) <= 500 / one.policy.aging
    assert TargetAdmission(one.policy, LatencyTargets(), one.mixed, 500).aging == 500 / PATIENCE_S


def test_who_is_late_gives_way_but_not_for_ever() -> None:
    """Half as many again come as can be served: more of them are in time, and all are served."""
    requests = [request(i, 60, 1, 0.01 * i) for i in range(100)]
    found = []
    for targets in (None, LatencyTargets(ttft_s=0.1)):
        one = Simulated(SchedulerConfig(LIMIT, 1, 64), targets)
        one.run(requests)
        found.append([one.came[r.id][0] - r.arrival for r in requests])
    in_time, longest = [sum(t <= 0.1 for t in first) for first in found], max(found[1])
    assert in_time[1] >= 2 * in_time[0]
    assert longest <= max(found[0]) + OVERDUE * 0.1


def learned(noise: float, draw: random.Random) -> MixedCost:
    decodes = DecodeCost()
    cost = MixedCost(decodes)
    for n in (1, 4, 8, 16):
        decodes.note(n, STEP_S + n * TOKEN_S)
    for i in range(200):
        p, n = 16 << i % 5, 1 + i % 16
        seconds = took(StepChoice(n, p)) * draw.uniform(1 - noise, 1 + noise)
        cost.note(p, n, seconds)
    return cost


@pytest.mark.parametrize("decode_tokens", [1, 8, 16])
def test_as_many_prompts_fit_as_the_gap_has_room_for(decode_tokens: int) -> None:
    cost = learned(0.0, random.Random(1))
    for seconds in (0.01, 0.03, 0.05):
        fit = cost.prompts_within(seconds, decode_tokens)
        assert fit == pytest.approx((seconds - STEP_S) / TOKEN_S - decode_tokens, abs=0.5)
        assert cost.gap(int(fit), decode_tokens) <= seconds * 1.001


def test_a_budget_does_not_follow_noise() -> None:
    """Of a tenth, over 2,000 steps; and it never is above what is allowed at the moment."""
    draw = random.Random(2)
    cost = learned(0.1, draw)
    budget, found = StepBudget(0.05, cost), []
    for _ in range(2000):
        tokens = budget.tokens(8, 512)
        assert tokens <= max(LEAST_TOKENS, cost.prompts_within(0.05, 8))
        cost.note(tokens, 8, took(StepChoice(8, tokens)) * draw.uniform(0.9, 1.1))
        found.append(tokens)
    changes = sum(a != b for a, b in itertools.pairwise(found))
    assert changes <= 200
    assert min(found[200:]) >= 0.75 * 222


def test_a_budget_that_cannot_be_kept_leaves_the_least() -> None:
    cost = learned(0.0, random.Random(1))
    assert StepBudget(0.0001, cost).tokens(4, 512) == LEAST_TOKENS
    assert StepBudget(10.0, cost).tokens(4, 512) == 512


def test_targets_are_given_in_milliseconds() -> None:
    config, mixed = SchedulerConfig(LIMIT), MixedCost(DecodeCost())
    options = StepOptions(ttft_target=700, tpot_target=45, fairness="off")
    assert targets_of(options) == LatencyTargets(0.7, 0.045)
    assert isinstance(admission_of(options, config, FittedStepCost(), mixed), TargetAdmission)
    plain = admission_of(StepOptions(fairness="off"), config, FittedStepCost(), mixed)
    assert isinstance(plain, PastFuture)
