"""How many drafts a step makes and checks, where what steps cost is stated and time is counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.core import (
    Counters,
    Drafted,
    Request,
    RequestId,
    Sampled,
    SamplingParams,
    StepPlan,
    StepResult,
)
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.executor import count_accepted
from moeserve.engine.policies.choices import Drafter
from moeserve.engine.policies.made import MadeDrafts
from moeserve.engine.policies.ngrams import NgramDrafts
from moeserve.engine.policies.speculation import (
    LONGEST_REST,
    TRIAL,
    FixedDrafts,
    Rest,
    Speculation,
)
from moeserve.engine.rates import is_decode
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.sequence import SequenceState
from moeserve.engine.step_cost import DecodeCost, FittedStepCost

VOCAB = 1000
FIXED = (0, 1, 3, 5)
LOADS = (1, 4, 8, 16, 32)
ANSWER = 90


def flat(tokens: int) -> float:
    """Weights are read once for all."""
    return 1.0 + 0.01 * tokens


def knee(tokens: int) -> float:
    """So too, up to 16 tokens; then arithmetic counts."""
    return 1.0 + 0.01 * tokens + 0.06 * max(0, tokens - 16)


def steep(tokens: int) -> float:
    """A token more costs a third of the first, as on few cores."""
    return 0.7 + 0.3 * tokens


@dataclass
class Simulated:
    """Runs steps without a model. A guess is right with the chance ``accepts``, if those before it
    are; so many guesses of all cost ``making`` each."""

    seconds: Callable[[int], float]
    accepts: float
    making: float = 0.1
    now: float = 0.0
    steps: int = 0

    def run(self, plan: StepPlan) -> StepResult:
        self.steps += 1
        sampled, drafted = [], []
        for chunk in plan.chunks:
            if not chunk.samples:
                continue
            first = chunk.start + len(chunk.token_ids) - chunk.samples + 1
            true = [token_at(chunk.request.id, first + i) for i in range(chunk.samples)]
            made = count_accepted(chunk.draft_ids, true)
            sampled.append(Sampled(chunk.request.id, tuple(true[:made])))
            if plan.draft_next:
                behind = range(first + made, first + made + plan.draft_next)
                guesses = tuple(self._guess(chunk.request.id, p) for p in behind)
                drafted.append(Drafted(chunk.request.id, guesses))
        draft_s = self.making * plan.draft_next * (1 + 0.02 * len(drafted)) if drafted else 0.0
        self.now += self.seconds(plan.num_tokens) + draft_s
        return StepResult(tuple(sampled), drafted=tuple(drafted), draft_s=draft_s)

    def _guess(self, request_id: RequestId, position: int) -> int:
        true = token_at(request_id, position)
        drawn = (position * 2654435761 + int(request_id) * 40503) % 2**32 * 0x9E3779B1 >> 13
        return true if drawn % 1000 < 1000 * self.accepts else (true + 1) % VOCAB


def token_at(request_id: RequestId, position: int) -> int:
    return (position * 7919 + int(request_id) * 104729) % VOCAB


def took(
    executor: Simulated, load: int, drafter: Drafter, decodes: DecodeCost, waves: int = 0
) -> float:
    """For ``waves`` times the requests that run at once, after as many that are not counted."""
    counters = Counters()
    config = SchedulerConfig(4096, load, 512, prefix_cache=False)
    pool = BlockPool(load * 16, 16, counters)
    scheduler = Scheduler(config, pool, counters, drafter=drafter)
    params = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
    waves = waves or max(2, 7 // load)
    for i in range((1 + waves) * load):
        scheduler.add(Request(RequestId(str(i)), (1, 2, 3), params))
    warm = 0.0
    while scheduler.has_work:
        if sum(counters.finished.values()) < load:
            warm = executor.now
        began, plan = executor.now, scheduler.plan(executor.now)
        scheduler.apply(executor.run(plan))
        if all(map(is_decode, plan.chunks)):
            decodes.note(plan.num_tokens, executor.now - began - decodes.drafting_s)
    return executor.now - warm


def chosen(seconds: Callable[[int], float], accepts: float, load: int) -> float:
    decodes = DecodeCost()
    drafter = Speculation(None, decodes, FittedStepCost(), made=MadeDrafts())
    return took(Simulated(seconds, accepts), load, drafter, decodes)


@pytest.mark.parametrize(("seconds", "accepts"), [(flat, 0.9), (knee, 0.6), (steep, 0.6)])
def test_as_many_drafts_as_pay_are_never_much_dearer_than_the_best_fixed_number(
    seconds: Callable[[int], float], accepts: float
) -> None:
    """At every load; over all of them no dearer than any fixed number, none included."""
    ours = 0.0
    fixed = dict.fromkeys(FIXED, 0.0)
    for load in LOADS:
        times = {
            count: took(
                Simulated(seconds, accepts),
                load,
                FixedDrafts(None, count, MadeDrafts()),
                DecodeCost(),
            )
            for count in FIXED
        }
        mine = chosen(seconds, accepts, load)
        assert mine <= 1.05 * min(times.values()), (load, mine, times)
        ours += mine
        fixed = {count: fixed[count] + times[count] for count in FIXED}
    assert ours < 1.01 * min(fixed.values()), (ours, fixed)


class Asked(Speculation):
    """Counts the steps that it is asked for."""

    asked = 0

    def propose(self, seqs: Sequence[SequenceState], beside: int) -> Sequence[Sequence[int]]:
        self.asked += 1
        return super().propose(seqs, beside)


@pytest.mark.parametrize("source", [lambda: None, NgramDrafts])
def test_where_nothing_pays_hardly_any_step_asks_for_drafts(
    source: Callable[[], NgramDrafts | None],
) -> None:
    decodes = DecodeCost()
    drafter = Asked(source(), decodes, FittedStepCost(), made=MadeDrafts())
    executor = Simulated(lambda tokens: float(tokens**2), 0.5)
    ours = took(executor, 2, drafter, decodes, waves=8)
    plain = took(Simulated(executor.seconds, 0.5), 2, FixedDrafts(None, 0), DecodeCost(), waves=8)
    assert drafter.asked < 0.1 * executor.steps
    assert ours < 1.02 * plain


def test_a_rest_ends_early_once_few_generate_for_some_steps() -> None:
    rest = Rest()
    for _ in range(200):  # until it is a long one
        if rest.over(8):
            rest.note(8, paid=False)
    while rest.over(8):
        rest.note(8, paid=False)
    few = [4, 4, 4, 5, 4, 4, 4, 4]
    assert [rest.over(generating) for generating in few] == [False] * len(few)
    assert rest.over(4)


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=300))
def test_a_rest_is_bounded(seen: list[tuple[int, bool]]) -> None:
    """And there is none where drafts paid within the last steps."""
    rest, waited, since = Rest(), 0, 0
    for generating, paid in seen:
        if rest.over(generating):
            rest.note(generating, paid=paid)
            waited, since = 0, 0 if paid else since + 1
        else:
            waited += 1
            assert since >= TRIAL - 1
        assert waited <= LONGEST_REST
