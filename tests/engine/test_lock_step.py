"""Steps over several ranks that schedule by themselves: the tokens of one process, and one end for
every failure.

Ranks are threads with null executors and a mesh in memory; ``test_ranks`` uses real decoders.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.core import (
    Counters,
    Event,
    FinishReason,
    Request,
    RequestId,
    SamplingParams,
    StepPlan,
    StepResult,
)
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.null import NullExecutor
from moeserve.engine.policies.choices import Drafter
from moeserve.engine.ranks.homes import GivenHome, HomePolicy, LeastWork, RandomHomes
from moeserve.engine.ranks.microbatches import FixedMicrobatches, StepShape
from moeserve.engine.ranks.records import RECORD_BYTES, Decision, RankReport, decide, loads_of
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.sequence import History, SequenceState
from moeserve.errors import InvalidRequestError, UnavailableError

RanksOf = Callable[..., Any]
BLOCK, VOCAB, WAIT_S = 4, 50, 20.0
CONFIG = SchedulerConfig(22, max_num_seqs=3, max_num_batched_tokens=10)


def request(name: str, prompt: Sequence[int], max_tokens: int = 8, **params: object) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, **params)  # type: ignore[arg-type]
    return Request(RequestId(name), tuple(prompt), sampling)


def alone(r: Request, max_model_len: int = 64) -> list[int]:
    counters = Counters()
    pool = BlockPool(64, BLOCK, counters)
    scheduler = Scheduler(SchedulerConfig(max_model_len), pool, counters)
    executor, tokens = NullExecutor(64, BLOCK, VOCAB), list[int]()
    scheduler.add(r)
    while scheduler.has_work:
        outs = scheduler.apply(executor.run(scheduler.plan(0.0)))
        tokens += [out.token_id for out in outs]
    return tokens


@st.composite
def workloads(draw: st.DrawFn) -> list[tuple[Request, int, bool]]:
    """Request, door, whether it is aborted once it has begun."""
    found = []
    for i in range(draw(st.integers(1, 10))):
        beginning = [draw(st.integers(0, 1))] * draw(st.integers(0, 8))
        prompt = [*beginning, *draw(st.lists(st.integers(0, 49), min_size=1, max_size=10))]
        asked = request(f"r{i}", prompt, draw(st.integers(1, 10)), seed=i)
        found.append((asked, draw(st.integers(0, 3)), draw(st.booleans()) and i % 3 == 0))
    return found


HOMES: list[Callable[[], HomePolicy]] = [LeastWork, lambda: RandomHomes(3)]


@settings(max_examples=40, deadline=None)
@given(
    workload=workloads(),
    world=st.integers(1, 4),
    blocks=st.integers(6, 12),
    num_doors=st.integers(1, 3),
    homes=st.sampled_from(HOMES),
    drafts=st.sampled_from([0, 0, 1, 3, -3]),
    errs=st.integers(0, 4),
)
def test_ranks_make_the_tokens_of_one_process(
    workload: list[tuple[Request, int, bool]],
    world: int,
    blocks: int,
    num_doors: int,
    homes: Callable[[], HomePolicy],
    drafts: int,
    errs: int,
    ranks_of: RanksOf,
    guessers: Callable[..., Drafter],
) -> None:
    """With few blocks, so that requests are preempted and move; ranks run every step together."""
    drafter = guessers(VOCAB, drafts, errs) if drafts else None
    doors = range(min(world, num_doors))
    with ranks_of(world, blocks, CONFIG, doors=doors, homes=homes, drafter=drafter) as ranks:
        answers = [ranks.submit(r, door % len(doors)) for r, door, _ in workload]
        for answer, (r, door, aborted) in zip(answers, workload, strict=True):
            if aborted and answer.begun.wait(WAIT_S):
                ranks.abort(r.id, door % len(doors))
        lasts = [answer.last for answer in answers]
        for scheduler in ranks.schedulers:
            assert not scheduler.has_work
            assert scheduler.pool.num_free == blocks
    assert len({tuple(executor.microbatches) for executor in ranks.executors}) == 1
    for (r, _, aborted), answer, last in zip(workload, answers, lasts, strict=True):
        expected = alone(r, CONFIG.max_model_len)
        got = answer.token_ids
        if last.finish is FinishReason.ABORT:
            assert aborted
            assert got == expected[: len(got)]
        else:
            assert got == expected
    total = sum(c.prompt_tokens for c in ranks.counters())
    assert total == sum(len(r.prompt_ids) for r, _, _ in workload)


def test_ranks_without_requests_take_part(ranks_of: RanksOf) -> None:
    def two() -> FixedMicrobatches:
        return FixedMicrobatches(2)

    with ranks_of(3, 16, microbatches=two) as ranks:
        assert ranks.submit(request("a", range(5), 4)).last.finish is FinishReason.LENGTH
    first, *others = [executor.steps for executor in ranks.executors]
    # A step may follow that was foreseen before the request had ended.
    assert first[:4] == [5, 1, 1, 1]
    assert sum(first[4:]) == 0
    assert others == [[0] * len(first)] * 2
    assert {m for executor in ranks.executors for m in executor.microbatches} == {2}
    assert {tuple(step.chosen.items()) for step in ranks.steps} == {((2, len(first)),)}


def test_a_request_that_waits_beside_a_free_rank_moves_there(ranks_of: RanksOf) -> None:
    """Both doors send theirs to rank 0 at once, and it has room for one."""
    config = SchedulerConfig(64, max_num_seqs=1, max_num_batched_tokens=10)

    def first() -> HomePolicy:
        return GivenHome(lambda r: 0, LeastWork())

    asked = [request(f"r{i}", range(4), 30, ignore_eos=True) for i in range(4)]
    with ranks_of(2, 16, config, doors=(0, 1), homes=first) as ranks:
        answers = [ranks.submit(r, i % 2) for i, r in enumerate(asked)]
        assert [answer.last.finish for answer in answers] == [FinishReason.LENGTH] * 4
    assert [answer.token_ids for answer in answers] == [alone(r) for r in asked]
    assert {rank for _, rank in ranks.homes} == {0, 1}
    assert all(sum(executor.steps) > 0 for executor in ranks.executors)


def test_doors_may_use_the_same_id(ranks_of: RanksOf) -> None:
    asked = [request("same", [i] * 5, 20, ignore_eos=True) for i in range(2)]
    may_run = threading.Event()

    def held(rank: int) -> Callable[[StepPlan], StepResult | None]:
        def wait(plan: StepPlan) -> StepResult | None:
            assert may_run.wait(WAIT_S)
            return None

        return wait

    def first() -> HomePolicy:
        return GivenHome(lambda r: 0, LeastWork())

    with ranks_of(2, 32, doors=(0, 1), homes=first, before=held) as ranks:
        answers = [ranks.submit(r, door) for door, r in enumerate(asked)]
        with pytest.raises(InvalidRequestError, match=r"request id 'same.*in use"):
            ranks.submit(asked[0], 0)
        may_run.set()
        ends = [answer.last for answer in answers]
    assert {end.request_id for end in ends} == {"same"}
    assert [answer.token_ids for answer in answers] == [alone(r) for r in asked]


def test_a_part_that_fails_ends_its_requests_and_nobody_elses(ranks_of: RanksOf) -> None:
    def spoil(rank: int) -> Callable[[StepPlan], StepResult | None]:
        def failing(plan: StepPlan) -> StepResult | None:
            problems = tuple((c.request.id, "spoiled") for c in plan.chunks)
            return StepResult((), problems) if rank == 1 else None

        return failing

    def by_name() -> HomePolicy:
        return GivenHome(lambda r: int(r.id.startswith("b")), LeastWork())

    with ranks_of(2, 16, before=spoil, homes=by_name) as ranks:
        answers = [ranks.submit(request(name, range(5), 2)) for name in "ab"]
        ends = [answer.last.finish for answer in answers]
    assert ends == [FinishReason.LENGTH, FinishReason.ERROR]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_that_falls_out_of_step_ends_the_run_by_name(rank: int, ranks_of: RanksOf) -> None:
    armed = threading.Event()

    def spoil(own: int) -> Callable[[StepPlan], StepResult | None]:
        def failing(plan: StepPlan) -> StepResult | None:
            if armed.wait(0.01) and own == rank:  # slowly, so that all are submitted before
                raise ZeroDivisionError("a layer broke")
            return None

        return failing

    with ranks_of(3, 16, before=spoil) as ranks:
        answers = [ranks.submit(request(f"r{i}", range(5), 50, ignore_eos=True)) for i in range(12)]
        armed.set()
        ends = [answer.last for answer in answers]
        for engine in ranks.engines:
            engine._thread.join(WAIT_S)
            assert not engine.alive
        late = ranks.submit  # no rank takes requests any more
        with pytest.raises(UnavailableError):
            late(request("late", [1]))
    assert {e.finish for e in ends} == {FinishReason.UNAVAILABLE}
    alarm = ranks.meshes[0].alarm()
    assert alarm is not None
    assert f"rank {rank}" in alarm.message
    assert "a layer broke" in alarm.message


def test_an_alarm_ends_engines_that_have_nothing_to_run(ranks_of: RanksOf) -> None:
    with ranks_of(2, 16) as ranks:
        ranks.meshes[1].fail("rank 1 is gone", [1])
        for engine in ranks.engines:
            engine._thread.join(WAIT_S)
            assert not engine.alive


def test_who_wants_to_leave_goes_on_for_as_long_as_others_need_it(ranks_of: RanksOf) -> None:
    with ranks_of(2, 16, homes=lambda: GivenHome(lambda r: 0, LeastWork())) as ranks:
        answer = ranks.submit(request("a", range(5), 40, ignore_eos=True))
        assert answer.begun.wait(WAIT_S)
        leaving = threading.Thread(target=ranks.engines[1].stop, args=(WAIT_S,))
        leaving.start()
        assert answer.last.finish is FinishReason.LENGTH
        assert ranks.engines[1].alive
        again = ranks.submit(request("b", range(5), 4))
        assert again.last.finish is FinishReason.LENGTH
        assert ranks.engines[0].stop(WAIT_S)
        leaving.join(WAIT_S)
        assert not ranks.engines[1].alive


class Remembered:
    """A policy that is told."""

    def __init__(self) -> None:
        self.learnt: list[tuple[StepShape, int, float, float]] = []

    def choose(self, shape: StepShape) -> int:
        return 1 + len(self.learnt) % 2

    def learn(self, shape: StepShape, count: int, seconds: float, waited: float) -> None:
        self.learnt.append((shape, count, seconds, waited))


def test_all_ranks_learn_the_same_of_every_step_once(ranks_of: RanksOf) -> None:
    policies: list[Remembered] = []

    def policy() -> Remembered:
        policies.append(Remembered())
        return policies[-1]

    with ranks_of(3, 16, microbatches=policy) as ranks:
        for i in range(3):
            ranks.submit(request(f"r{i}", range(5), 5)).last  # noqa: B018
    first, *others = [p.learnt for p in policies]
    assert [other for other in others if other != first] == []
    assert ranks.steps[0].steps - 1 <= len(first) <= ranks.steps[0].steps
    assert [count for _, count, _, _ in first] == ranks.executors[0].microbatches[: len(first)]


U32 = st.integers(0, 2**32 - 1)
REPORTS = st.builds(
    RankReport,
    work=st.booleans(),
    decode=st.booleans(),
    tokens=U32,
    prepared=st.integers(0, 2),
    leaving=st.booleans(),
    seconds=st.floats(0, 1e3, width=32),
    waited=st.floats(0, 1e3, width=32),
    ran=U32,
    came=U32,
    running=U32,
    waiting=U32,
    held=st.integers(0, 2**62),
    foreseen=U32,
    free_blocks=U32,
    queued=U32,
)


@given(st.lists(REPORTS, min_size=1, max_size=9))
def test_records_carry_what_ranks_report(reports: list[RankReport]) -> None:
    records = b"".join(report.pack() for report in reports)
    assert len(records) == RECORD_BYTES * len(reports)
    turns = {report.prepared for report in reports}
    busy = [report for report in reports if report.tokens]
    assert decide(records) == Decision(
        run=any(report.work for report in reports),
        shape=StepShape(
            max(report.tokens for report in reports), all(report.decode for report in busy)
        ),
        turn=turns.pop() if len(turns) == 1 else 0,
        over=all(report.leaving for report in reports),
        seconds=max(report.seconds for report in reports),
        waited=min(report.waited for report in reports),
        ran=sum(report.ran for report in reports),
        came=sum(report.came for report in reports),
        came_most=max(report.came for report in reports),
        waiting=sum(report.waiting for report in reports),
    )
    loads = loads_of(records, 7)
    assert loads.step == 7
    for name in ("running", "waiting", "held", "foreseen", "free_blocks", "queued"):
        column = getattr(loads, f"{name}_R")
        assert column.tolist() == [getattr(report, name) for report in reports]
        assert column.dtype == np.int64


def test_a_record_is_a_few_bytes() -> None:
    assert RECORD_BYTES <= 64
    assert replace(RankReport(), tokens=3).pack() != RankReport().pack()


class Guest:
    """A sink of one request that may be given back."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.finish: FinishReason | None = None
        self.returned = 0
        self.over = threading.Event()

    def deliver(self, events: Sequence[Event]) -> None:
        for event in events:
            assert not self.over.is_set(), "an event after the last"
            self.token_ids += event.token_ids
            if event.finish is not None:
                self.finish = event.finish
                self.over.set()

    def give_back(self, request_id: RequestId, reached: int) -> None:
        self.returned += 1
        self.over.set()


def test_a_request_is_taken_out_of_one_rank_and_goes_on_at_another(ranks_of: RanksOf) -> None:
    """While the step runs that all ranks make: none of them notices."""
    asked, beside = request("a", range(9), 12), request("b", range(20, 26), 12)
    found: list[SequenceState] = []
    house: list[Any] = []

    def before(rank: int) -> Callable[[StepPlan], StepResult | None]:
        def detach(plan: StepPlan) -> None:
            made = [len(c.output_ids) for c in plan.chunks if c.request.id == "a"]
            if rank == 0 and not found and made and made[0] >= 4:
                found.append(house[0].engines[0].detach(asked.id))

        return detach

    with ranks_of(2, 16, before=before) as ranks:
        house.append(ranks)
        first, other, rest = Guest(), Guest(), Guest()
        ranks.engines[1].submit(beside, other)
        ranks.engines[0].submit(asked, first)
        assert first.over.wait(WAIT_S)
        assert (first.returned, first.finish) == (1, None)
        (seq,) = found
        assert seq.output_ids == first.token_ids
        assert seq.computed == 9 + 4 - 1
        held = [scheduler.pool.num_references() for scheduler in ranks.schedulers]
        assert held[0] == len(seq.blocks)
        ranks.schedulers[0].pool.release(seq.blocks)
        ranks.engines[1].submit(asked, rest, History(tuple(seq.output_ids), seq.reached, True))
        assert rest.over.wait(WAIT_S)
        assert other.over.wait(WAIT_S)
        assert first.token_ids + rest.token_ids == alone(asked)
        assert other.token_ids == alone(beside)
        assert [scheduler.pool.num_references() for scheduler in ranks.schedulers] == [0, 0]
