"""Admission by what answers were like lately: the same tokens, fewer that start in vain."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.core import (
    Counters,
    Request,
    RequestId,
    Sampled,
    SamplingParams,
    StepPlan,
    StepResult,
)
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.drive import drive
from moeserve.engine.executor import Executor
from moeserve.engine.null import NullExecutor
from moeserve.engine.policies.choices import Admission, FirstComeFirstServed
from moeserve.engine.policies.past_future import (
    LEARNED,
    REMEMBERED,
    AnswerPast,
    PastFuture,
    worst_moment,
)
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.sequence import NEW, SequenceState

VOCAB = 97
EOS = 5
BLOCK = 4


class Scripted:
    """An executor whose answers are as long as was said beforehand."""

    def __init__(self, lengths: Mapping[RequestId, int]) -> None:
        self._lengths = lengths

    def run(self, plan: StepPlan) -> StepResult:
        sampled = []
        for chunk in plan.chunks:
            if chunk.samples:
                ends = len(chunk.output_ids) + 1 == self._lengths[chunk.request.id]
                sampled.append(Sampled(chunk.request.id, (EOS if ends else EOS + 1,)))
        return StepResult(tuple(sampled))


def request(i: int, prompt: int, most: int) -> Request:
    params = SamplingParams(max_tokens=most, seed=i)
    return Request(RequestId(f"r{i}"), tuple((i + j) % VOCAB for j in range(prompt)), params)


def run(
    requests: Sequence[Request],
    admission: Admission,
    executor: Executor,
    num_blocks: int,
    config: SchedulerConfig,
) -> tuple[dict[RequestId, list[int]], Counters]:
    counters = Counters()
    pool = BlockPool(num_blocks, BLOCK, counters)
    scheduler = Scheduler(config, pool, counters, admission)
    tokens: dict[RequestId, list[int]] = {request.id: [] for request in requests}
    for asked in requests:
        scheduler.add(asked)
    for outcome in drive(scheduler, executor):
        outcome.raise_failure()
        assert outcome.plan.chunks, "a step for nothing"
        pool.check()
        for out in outcome.outs:
            tokens[out.request_id].append(out.token_id)
    assert pool.num_free == num_blocks
    return tokens, counters


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=30),
    num_blocks=st.integers(10, 40),
    max_num_seqs=st.integers(1, 20),
    spare=st.integers(0, 40),
    prefix_cache=st.booleans(),
    urgent=st.integers(1, 4),
)
def test_it_never_changes_tokens_and_everybody_ends(
    sizes: list[tuple[int, int]],
    num_blocks: int,
    max_num_seqs: int,
    spare: int,
    prefix_cache: bool,
    urgent: int,
) -> None:
    config = SchedulerConfig(
        40,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + spare,
        eos_ids=frozenset({EOS}),
        prefix_cache=prefix_cache,
    )
    requests = [
        replace(request(i, p, g), priority=i % urgent - 1) for i, (p, g) in enumerate(sizes)
    ]
    runs = [
        run(requests, admission, NullExecutor(num_blocks, BLOCK, VOCAB), num_blocks, config)
        for admission in (FirstComeFirstServed(), PastFuture(config.max_model_len))
    ]
    assert runs[0][0] == runs[1][0]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_fewer_are_preempted_in_no_more_steps_than_it_takes_to_serve_them(seed: int) -> None:
    """Against starting whoever finds room now: lognormal lengths, twelve times what KV holds."""
    draw = random.Random(seed)
    lengths = [max(1, min(500, int(draw.lognormvariate(4, 1)))) for _ in range(300)]
    requests = [request(i, draw.randint(5, 60), 500) for i in range(300)]
    executor = Scripted({r.id: n for r, n in zip(requests, lengths, strict=True)})
    config = SchedulerConfig(600, 64, 128, eos_ids=frozenset({EOS}), prefix_cache=False)
    plain = run(requests, FirstComeFirstServed(), executor, 500, config)[1]
    counts = run(requests, PastFuture(600), executor, 500, config)[1]
    assert counts.preemptions <= 0.7 * plain.preemptions
    assert counts.recomputed_tokens < 0.7 * plain.recomputed_tokens
    assert counts.steps <= 1.15 * plain.steps
    assert counts.computed_tokens < plain.computed_tokens


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=60),
    st.lists(st.tuples(st.integers(0, 80), st.floats(0, 0.999)), min_size=1, max_size=8),
)
def test_an_answer_is_one_of_those_that_were_longer(
    ended: list[int], asked: list[tuple[int, float]]
) -> None:
    past = AnswerPast()
    for made in ended:
        past.note(made)
    made_N = np.array([made for made, _ in asked])
    shares_ND = np.array([[share, 0.0] for _, share in asked])
    for (made, share), row in zip(asked, past.lengths(made_N, shares_ND).tolist(), strict=True):
        longer = sorted(n for n in ended if n > made)
        expected = longer[int(share * len(longer))] if longer else made + made // 10 + 1
        assert row == [expected, longer[0] if longer else expected]


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), min_size=1, max_size=8))
def test_the_worst_moment_is_that_of_all_steps_to_come(running: list[tuple[int, int]]) -> None:
    """Against every step looked at."""
    most = 0
    for step in range(1, max(left for _, left in running) + 1):
        most = max(most, sum(held + step for held, left in running if left >= step))
    held_N = np.array([held for held, _ in running])
    left_N1 = np.array([[left] for _, left in running])
    assert worst_moment(held_N, left_N1).tolist() == [most]


def test_it_has_adapted_once_as_many_have_ended_as_it_remembers() -> None:
    past = AnswerPast()
    for _ in range(500):
        past.note(400)
    for _ in range(REMEMBERED):
        past.note(10)
    assert past.lengths(np.array([0]), np.array([[0.99]])).tolist() == [[10]]


def running(name: str, prompt: int, made: int, priority: int = 0) -> SequenceState:
    asked = Request(RequestId(name), (1,) * prompt, SamplingParams(max_tokens=100))
    seq = SequenceState.of(replace(asked, priority=priority), NEW)
    for _ in range(made):
        seq.append(1)
    seq.computed = seq.length - 1
    return seq


def learned() -> PastFuture:
    """Answers have 50 tokens, as it has seen."""
    policy = PastFuture(1000)
    for i in range(LEARNED):
        seq = running(f"old{i}", 4, 50)
        policy._note(seq)
    return policy


def test_who_is_nearly_done_or_costs_much_to_compute_again_keeps_its_blocks() -> None:
    policy = learned()
    first, done, long, young = (
        running("first", 4, 1),
        running("done", 4, 49),
        running("long", 200, 1),
        running("young", 4, 2),
    )
    assert policy.victim([first, done, long, young]).request.id == "young"
    assert policy.victim([first, done, long]).request.id == "long"
    assert policy.victim([first, done]).request.id == "done"
    assert policy.victim([first]).request.id == "first"


def test_the_least_urgent_gives_way_and_of_those_never_the_first_admitted() -> None:
    policy = learned()
    urgent, later = running("urgent", 4, 1, -1), running("later", 4, 40, 3)
    assert policy.victim([running("a", 4, 1), urgent, later]).request.id == "later"
    assert policy.victim([later, urgent, running("a", 4, 1)]).request.id == "later"
