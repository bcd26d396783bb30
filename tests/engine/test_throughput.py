"""The policy of throughput: the same tokens, prompts as they pay, KV that holds out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.core import (
    Counters,
    Request,
    RequestId,
    SamplingParams,
)
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.drive import StepOutcome, drive
from moeserve.engine.null import NullExecutor
from moeserve.engine.policies.choices import Admission
from moeserve.engine.policies.throughput import LEARNED, AnswerLengths, Outlook, ThroughputAdmission
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.sequence import SequenceState
from moeserve.engine.step_cost import (
    FIRST_GUESS,
    FittedStepCost,
    PredictedFirst,
    StepCost,
    worthwhile_tokens,
)

VOCAB = 97
EOS = 5


@dataclass(frozen=True)
class Line:
    """Seconds of a step, of a token in it, and of a token of context."""

    step_s: float
    token_s: float
    context_s: float = 0.0

    def seconds(self, prefill_tokens: int, decode_tokens: int, context_tokens: int) -> float:
        tokens = prefill_tokens + decode_tokens
        return self.step_s + self.token_s * tokens + self.context_s * context_tokens


@dataclass(frozen=True)
class Roofline:
    """Reading the weights, or computing, whatever is longer."""

    read_s: float
    token_s: float

    def seconds(self, prefill_tokens: int, decode_tokens: int, context_tokens: int) -> float:
        return max(self.read_s, self.token_s * (prefill_tokens + decode_tokens))


@dataclass
class Ran:
    """All steps of requests that were there from the beginning, and what they made."""

    outcomes: list[StepOutcome]
    tokens: dict[RequestId, list[int]]
    counters: Counters

    @property
    def sizes(self) -> list[int]:
        return [outcome.plan.num_tokens for outcome in self.outcomes]


def run(
    requests: Sequence[Request],
    *,
    admission: Admission | None,
    num_blocks: int,
    config: SchedulerConfig,
    block_size: int = 4,
) -> Ran:
    counters = Counters()
    pool = BlockPool(num_blocks, block_size, counters)
    scheduler = Scheduler(config, pool, counters, admission)
    for request in requests:
        scheduler.add(request)
    tokens: dict[RequestId, list[int]] = {request.id: [] for request in requests}
    outcomes = []
    for outcome in drive(scheduler, NullExecutor(num_blocks, block_size, VOCAB)):
        outcome.raise_failure()
        assert outcome.plan.num_tokens <= config.max_num_batched_tokens
        assert outcome.plan.chunks, "a step for nothing"
        pool.check()
        outcomes.append(outcome)
        for out in outcome.outs:
            tokens[out.request_id].append(out.token_id)
    assert pool.num_free == num_blocks
    assert sum(counters.finished.values()) == len(requests)
    return Ran(outcomes, tokens, counters)


def request(i: int, prompt: int, answer: int, *, ignore_eos: bool = True) -> Request:
    params = SamplingParams(max_tokens=answer, seed=i, ignore_eos=ignore_eos)
    return Request(RequestId(f"r{i}"), tuple((i + j) % VOCAB for j in range(prompt)), params)


ROOMY = SchedulerConfig(256, max_num_seqs=512, max_num_batched_tokens=1024, prefix_cache=False)


@settings(max_examples=120, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=14),
    num_blocks=st.integers(10, 40),
    max_num_seqs=st.integers(1, 20),
    spare=st.integers(0, 40),
    prefix_cache=st.booleans(),
    ignore_eos=st.booleans(),
    cost=st.builds(Line, st.floats(0, 10), st.floats(0, 1), st.floats(0, 1)),
)
def test_the_objective_never_changes_tokens(
    sizes: list[tuple[int, int]],
    num_blocks: int,
    max_num_seqs: int,
    spare: int,
    prefix_cache: bool,
    ignore_eos: bool,
    cost: Line,
) -> None:
    """Every request ends, with what it has in latency's order; blocks are never too few."""
    config = SchedulerConfig(
        40,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + spare,
        eos_ids=frozenset({EOS}),
        prefix_cache=prefix_cache,
    )
    requests = [request(i, p, g, ignore_eos=ignore_eos) for i, (p, g) in enumerate(sizes)]
    runs = [
        run(requests, admission=admission, num_blocks=num_blocks, config=config)
        for admission in (None, ThroughputAdmission(cost, config.max_model_len))
    ]
    assert runs[0].tokens == runs[1].tokens


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=40),
    num_blocks=st.integers(30, 80),
    step_s=st.floats(0, 100),
)
def test_nobody_is_preempted_where_answers_are_as_long_as_they_may_be(
    sizes: list[tuple[int, int]], num_blocks: int, step_s: float
) -> None:
    requests = [request(i, p, g) for i, (p, g) in enumerate(sizes)]
    admission = ThroughputAdmission(Line(step_s, 0.01), ROOMY.max_model_len)
    ran = run(requests, admission=admission, num_blocks=num_blocks, config=ROOMY)
    assert ran.counters.preemptions == 0


def test_generating_ones_come_first_and_prompts_fill_what_pays() -> None:
    admission = ThroughputAdmission(Roofline(100.0, 1.0), ROOMY.max_model_len)
    requests = [request(i, 40, 30) for i in range(60)]
    ran = run(requests, admission=admission, num_blocks=2000, config=ROOMY)
    assert max(ran.sizes) == 96
    assert sum(size == 96 for size in ran.sizes) > len(ran.sizes) // 2
    for outcome in ran.outcomes:
        newest = [chunk.output_ids != [] for chunk in outcome.plan.chunks]
        assert newest == sorted(newest, reverse=True), "prompts stand behind"


def test_where_steps_cost_nothing_by_themselves_they_stay_small() -> None:
    admission = ThroughputAdmission(Line(0.0, 1.0), ROOMY.max_model_len)
    requests = [request(i, 40, 30) for i in range(20)]
    ran = run(requests, admission=admission, num_blocks=2000, config=ROOMY)
    assert max(ran.sizes) <= 33


def test_staggered_requests_take_fewer_steps_than_waves_and_none_is_preempted() -> None:
    """KV binds: 240 requests of 16 and 32 tokens, and room for 21 of full length."""
    requests = [request(i, 16, 32) for i in range(240)]
    setting = {"num_blocks": 252, "config": ROOMY}
    even = run(requests, admission=ThroughputAdmission(Line(1.0, 1e-6), 256), **setting)
    waves = run(requests, admission=Waves(21), **setting)
    assert even.counters.preemptions == 0
    predicted = (16 + 32) / (16 + 32 / 2)  # eq 7
    fewer = len(waves.outcomes) / len(even.outcomes)
    # Blocks that are half full, and a beginning and an end where fewer run.
    assert 0.85 * predicted < fewer < predicted
    assert even.tokens == waves.tokens


class Waves(ThroughputAdmission):
    """So many start together, when all others have ended."""

    def __init__(self, size: int) -> None:
        super().__init__(Line(1.0, 0.0), 256)
        self._size = size
        self._left = 0

    def begin(self, builder, running, waiting, pool) -> None:  # type: ignore[no-untyped-def]
        self._left = 0 if running else self._size

    def pick(self, waiting, now):  # type: ignore[no-untyped-def]
        self._left -= 1
        return next(iter(waiting.values()), None) if self._left >= 0 else None


def test_where_all_find_room_nobody_waits() -> None:
    admission = ThroughputAdmission(Line(1000.0, 0.001), 256)
    requests = [request(i, 16, 32) for i in range(30)]
    ran = run(requests, admission=admission, num_blocks=500, config=ROOMY)
    assert len(ran.outcomes[0].plan.chunks) == 30
    assert len(ran.outcomes) == 32


def test_shorter_answers_are_learned_and_more_requests_fit() -> None:
    config = replace(ROOMY, eos_ids=frozenset(range(0, VOCAB, 6)))
    requests = [request(i, 8, 120, ignore_eos=False) for i in range(300)]
    admission = ThroughputAdmission(Line(100.0, 0.001), 256)
    ran = run(requests, admission=admission, num_blocks=160, config=config)
    most = max(len(outcome.plan.chunks) for outcome in ran.outcomes)
    assert admission.lengths.share < 0.5
    assert most > 2 * (160 * 4 // 128)
    latency = run(requests, admission=None, num_blocks=160, config=config)
    assert ran.tokens == latency.tokens
    assert ran.counters.recomputed_tokens < 0.05 * ran.counters.computed_tokens


def test_a_shared_prefix_is_counted_once() -> None:
    config = replace(ROOMY, prefix_cache=True)
    system = tuple(range(80))
    requests = [
        Request(
            RequestId(f"r{i}"),
            (*system, i % VOCAB, i // VOCAB),
            SamplingParams(max_tokens=12, ignore_eos=True),
        )
        for i in range(120)
    ]
    admission = ThroughputAdmission(Line(1.0, 0.001), 256)
    ran = run(requests, admission=admission, num_blocks=120, config=config)
    most = max(len(outcome.plan.chunks) for outcome in ran.outcomes)
    assert most > 12, "five are all that fit without what they share"


def test_blocks_that_were_missing_make_it_careful() -> None:
    lengths = AnswerLengths()
    assert lengths.share == 1.0
    for _ in range(LEARNED - 1):
        lengths.note(10, 100)
    assert lengths.share == 1.0
    for _ in range(100):
        lengths.note(10, 100)
    assert lengths.share == pytest.approx(0.1, abs=0.02)
    lengths.fell_short()
    assert lengths.share == pytest.approx(0.2, abs=0.02)
    seq = SequenceState(request(0, 8, 100), output_ids=[1] * 5)
    assert lengths.left(seq, 256) == round(lengths.share * 100) - 5
    assert lengths.left(SequenceState(request(0, 8, 100), output_ids=[1] * 99), 256) == 1


@given(
    stays=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 30)), min_size=1, max_size=12),
    block_size=st.sampled_from([1, 4, 16]),
)
def test_an_outlook_is_what_will_be_held_at_the_worst_moment(
    stays: list[tuple[int, int]], block_size: int
) -> None:
    outlook = Outlook(block_size)
    for length, left in stays[:-1]:
        outlook.add(length, left)
    peak = outlook.peak(*stays[-1])
    held = [
        sum(-(-(length + t) // block_size) for length, left in stays if t < left) for t in range(30)
    ]
    assert peak == max(held)
    assert outlook.has_room(*stays[-1], peak)
    assert not outlook.has_room(*stays[-1], peak - 1)
    outlook.add(*stays[-1])
    assert outlook.peak() == peak


@given(
    step_s=st.floats(0.001, 1000),
    token_s=st.floats(0.001, 10),
    decode=st.integers(0, 300),
    most=st.integers(300, 5000),
)
def test_the_least_size_whose_double_brings_little(
    step_s: float, token_s: float, decode: int, most: int
) -> None:
    cost = Line(step_s, token_s)
    found = worthwhile_tokens(cost, decode, 0, most)
    assert 1 <= found <= most

    def gains(tokens: int) -> float:
        return 2 * cost.seconds(tokens, 0, 0) / cost.seconds(2 * tokens, 0, 0) - 1

    if found < most:
        assert gains(found) <= 0.05 + 1e-9
    if found > max(1, decode):
        assert gains(found - 1) > 0.05 - 1e-9


def test_reading_the_weights_makes_steps_as_large_as_what_is_computed_meanwhile() -> None:
    assert worthwhile_tokens(Roofline(10.0, 0.01), 0, 0, 8192) == 953
    assert worthwhile_tokens(Roofline(100.0, 0.01), 0, 0, 8192) == 8192
    assert worthwhile_tokens(Line(0.0, 1.0), 7, 0, 8192) == 7


def test_a_fit_is_of_all_sizes_that_were_measured() -> None:
    cost = FittedStepCost()
    assert worthwhile_tokens(cost, 0, 0, 4096) <= FIRST_GUESS
    for _ in range(5):
        cost.note(0, 1.0)
        cost.note(40, 2 + 0.01 * 40)
    assert cost.line is None
    cost.note(600, 2 + 0.01 * 600)
    assert cost.line == pytest.approx((2, 0.01))
    for _ in range(1000):  # all of one size: what larger ones cost is not forgotten
        cost.note(40, 2 + 0.01 * 40)
    assert cost.line == pytest.approx((2, 0.01))
    assert cost.seconds(100, 28, 10**6) == pytest.approx(2 + 1.28)


def counted_seconds(true: StepCost, predicted: StepCost | None, requests: int) -> float:
    """Of all steps, which take what ``true`` says; the policy knows ``predicted`` beforehand."""
    measured = FittedStepCost()
    cost = measured if predicted is None else PredictedFirst(predicted, measured)
    config = SchedulerConfig(256, 512, 4096, prefix_cache=False)
    counters = Counters()
    admission = ThroughputAdmission(cost, 256)
    scheduler = Scheduler(config, BlockPool(4000, 4, counters), counters, admission)
    for i in range(requests):
        scheduler.add(request(i, 100, 6))
    executor, now = NullExecutor(4000, 4, VOCAB), 0.0
    while scheduler.has_work:
        plan = scheduler.plan(now)
        seconds = true.seconds(plan.num_tokens, 0, 0)
        now += seconds
        measured.note(plan.num_tokens, seconds)
        scheduler.apply(executor.run(plan))
    return now


@pytest.mark.parametrize("off", [0.85, 1.15])
def test_what_is_predicted_before_anything_was_measured_costs_nothing_and_may_gain(
    off: float,
) -> None:
    """``off`` is how many times as long a token is predicted to take."""
    for step_s, token_s, gains in ((1.0, 0.001, True), (0.01, 0.01, False), (0.0, 0.01, False)):
        true, predicted = Line(step_s, token_s), Line(step_s, off * token_s)
        for requests in (3, 16):
            without = counted_seconds(true, None, requests)
            beside = counted_seconds(true, predicted, requests)
            assert beside <= without * (1 + 1e-9)
            if gains and requests == 16:
                assert beside < 0.85 * without


def test_a_fit_has_no_negative_costs() -> None:
    falling, through = FittedStepCost(), FittedStepCost()
    falling.note(10, 5.0)
    falling.note(1000, 1.0)
    assert falling.line is not None
    assert falling.line[1] == 0.0
    assert worthwhile_tokens(falling, 0, 0, 4096) == 4096
    through.note(10, 0.1)
    through.note(1000, 30.0)
    assert through.line is not None
    assert through.line[0] == 0.0
