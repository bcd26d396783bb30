"""Steps that are planned while the one before runs make what steps one after the other make."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

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
from moeserve.engine.ahead import StepsAhead
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.drive import StepOutcome, drive
from moeserve.engine.executor import Executor
from moeserve.engine.loop import Engine
from moeserve.engine.model_runner import ModelRunner
from moeserve.engine.null import NullExecutor
from moeserve.engine.policies.choices import Drafter
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.sequence import History, SequenceState
from moeserve.engine.threaded import ThreadedExecutor
from moeserve.errors import UnavailableError
from moeserve.kernels.select import choose_ops
from moeserve.models.decoder import load_decoder
from moeserve.models.library import resolve_model

BLOCK, VOCAB, EOS, WAIT_S = 4, 50, 7, 30.0
CONFIG = SchedulerConfig(40, max_num_seqs=4, max_num_batched_tokens=16, eos_ids=frozenset({EOS}))


def ask(name: str, prompt: Sequence[int] = (1, 2, 3), **params: object) -> Request:
    return Request(RequestId(name), tuple(prompt), SamplingParams(**params))  # type: ignore[arg-type]


def scheduler_of(
    blocks: int = 64, config: SchedulerConfig = CONFIG, drafter: Drafter | None = None
) -> Scheduler:
    counters = Counters()
    return Scheduler(config, BlockPool(blocks, BLOCK, counters), counters, drafter=drafter)


@contextlib.contextmanager
def threaded(inner: Executor) -> Iterator[ThreadedExecutor]:
    executor = ThreadedExecutor(inner)
    try:
        yield executor
    finally:
        executor.close()


@dataclass
class Run:
    """Steps ahead, by hand; what every request made, and how it ended."""

    scheduler: Scheduler
    executor: ThreadedExecutor
    tokens: dict[str, list[int]] = field(default_factory=dict)
    finish: dict[str, FinishReason] = field(default_factory=dict)
    plans: list[StepPlan] = field(default_factory=list)
    now: float = 0.0

    def __post_init__(self) -> None:
        self.steps = StepsAhead(
            self.scheduler, self.executor, lambda: self.now, contextlib.nullcontext()
        )

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.scheduler.add(request)
            self.tokens[request.id] = []

    def abort(self, request_id: str) -> None:
        if self.scheduler.abort(RequestId(request_id), FinishReason.ABORT):
            self.finish[request_id] = FinishReason.ABORT

    def step(self) -> StepOutcome | None:
        outcome = self.steps.run(lambda plan, began: self.plans.append(plan))
        if outcome is None:
            return None
        for request_id in outcome.plan.expired:
            self.finish[request_id] = FinishReason.DEADLINE
        for out in outcome.outs:
            assert out.request_id not in self.finish, "a token after the end"
            self.tokens[out.request_id].append(out.token_id)
            if out.finish is not None:
                self.finish[out.request_id] = out.finish
        for request_id, _ in outcome.failed:
            assert request_id not in self.finish, "ended twice"
            self.finish[request_id] = FinishReason.ERROR
        self.scheduler.pool.check()
        return outcome

    def to_the_end(self) -> Run:
        while self.step() is not None:
            pass
        self.assert_nothing_leaked()
        return self

    def assert_nothing_leaked(self) -> None:
        scheduler = self.scheduler
        scheduler.pool.check()
        assert scheduler.pool.num_free == scheduler.pool.num_blocks
        assert (scheduler.num_running, scheduler.num_waiting, scheduler.num_tokens) == (0, 0, 0)


def one_by_one(requests: Sequence[Request], config: SchedulerConfig) -> dict[str, list[int]]:
    """What they make in steps one after the other, without others."""
    made: dict[str, list[int]] = {}
    for request in requests:
        scheduler = scheduler_of(config=config)
        scheduler.add(request)
        steps = drive(scheduler, NullExecutor(64, BLOCK, VOCAB))
        made[request.id] = [out.token_id for step in steps for out in step.outs]
    return made


@dataclass(frozen=True)
class Arrival:
    step: int
    request: Request
    deadline: float | None
    abort_at: int | None


@st.composite
def arrivals(draw: st.DrawFn) -> list[Arrival]:
    found = []
    for i in range(draw(st.integers(1, 7))):
        beginning = [draw(st.integers(0, 2))] * draw(st.integers(0, 8))
        prompt = [*beginning, *draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6))]
        request = ask(
            f"r{i}",
            prompt,
            max_tokens=draw(st.integers(1, 16)),
            seed=draw(st.integers(0, 2)),
            ignore_eos=draw(st.booleans()),
            stop_token_ids=tuple(draw(st.lists(st.integers(0, VOCAB - 1), max_size=4))),
        )
        at = draw(st.integers(0, 20))
        deadline = draw(st.none() | st.integers(at + 1, 50))
        abort_at = draw(st.none() | st.integers(at, at + 20))
        found.append(Arrival(at, request, deadline, abort_at))
    return found


@settings(max_examples=80, deadline=None)
@given(
    arrivals=arrivals(),
    num_blocks=st.integers(10, 20),
    max_num_seqs=st.integers(1, 5),
    spare=st.integers(0, 20),
    prefix_cache=st.booleans(),
    drafts=st.sampled_from([0, 0, 0, 2]),
)
def test_planning_ahead_never_changes_tokens(
    arrivals: list[Arrival],
    num_blocks: int,
    max_num_seqs: int,
    spare: int,
    prefix_cache: bool,
    drafts: int,
    guessers: Callable[..., Drafter],
) -> None:
    """Under preemption, stops, cancels, deadlines, shared prefixes, and drafts, which have no step
    ahead. The null executor checks that every row finds what it needs in its blocks."""
    config = SchedulerConfig(
        max_model_len=40,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + spare,
        eos_ids=frozenset({EOS}),
        prefix_cache=prefix_cache,
    )
    drafter = guessers(VOCAB, drafts, 3) if drafts else None
    with threaded(NullExecutor(num_blocks, BLOCK, VOCAB)) as executor:
        run = Run(scheduler_of(num_blocks, config, drafter), executor)
        for now in range(600):
            run.now = now
            for a in arrivals:
                if a.step == now:
                    run.add(with_deadline(a))
                if a.abort_at == now:
                    run.abort(a.request.id)
            if run.step() is None and now > 40:
                break
        run.assert_nothing_leaked()
    expected = one_by_one([a.request for a in arrivals], config)
    for a in arrivals:
        made, name = run.tokens[a.request.id], a.request.id
        if run.finish[name] in (FinishReason.STOP, FinishReason.LENGTH):
            assert made == expected[name]
        else:
            assert made == expected[name][: len(made)]
            assert run.finish[name] in (FinishReason.ABORT, FinishReason.DEADLINE)
    counters = run.scheduler.counters
    assert counters.generated_tokens == sum(map(len, run.tokens.values()))
    assert sum(counters.finished.values()) == len(arrivals)
    if drafts:
        assert run.steps.planned_ahead == 0


def with_deadline(a: Arrival) -> Request:
    r = a.request
    return Request(r.id, r.prompt_ids, r.params, deadline=a.deadline)


def test_steps_of_newest_tokens_are_planned_ahead_also_where_others_wait() -> None:
    """And who waits starts a step later than else where a place has fallen free."""
    requests = [ask(f"r{i}", max_tokens=9 + i, ignore_eos=True) for i in range(6)]
    with threaded(NullExecutor(64, BLOCK, VOCAB)) as executor:
        run = Run(scheduler_of(), executor)
        run.add(*requests)
        run.to_the_end()
    assert run.tokens == one_by_one(requests, CONFIG)
    ahead = [plan.ahead for plan in run.plans]
    assert ahead[:12] == [False] * 2 + [True] * 8 + [False] * 2  # behind prompts there is none
    assert all(ahead[12:])
    who = [[c.request.id for c in plan.chunks] for plan in run.plans]
    assert who[8] == ["r0", "r1", "r2", "r3"]  # the last token of the first
    assert who[9] == ["r1", "r2", "r3"]
    assert who[10] == ["r2", "r3", "r4", "r5"]


def test_whoever_stops_is_in_one_more_step_for_nothing() -> None:
    endless = ask("a", max_tokens=30, ignore_eos=True)
    free = one_by_one([endless], CONFIG)["a"]
    stop = next(i for i in range(2, 30) if free[i] not in free[:i])
    stopping = ask("a", max_tokens=30, ignore_eos=True, stop_token_ids=(free[stop],))
    with threaded(NullExecutor(64, BLOCK, VOCAB)) as executor:
        run = Run(scheduler_of(), executor)
        run.add(stopping, ask("b", (9,), max_tokens=25, ignore_eos=True))
        run.to_the_end()
    assert run.tokens["a"] == free[: stop + 1]
    assert run.finish["a"] is FinishReason.STOP
    rows = [sum(c.request.id == "a" for c in plan.chunks) for plan in run.plans]
    assert sum(rows) == stop + 2
    counters = run.scheduler.counters
    assert counters.generated_tokens == stop + 1 + 25
    # The row for nothing is not counted, nor is the KV of an answer's last token.
    assert counters.computed_tokens == 3 + stop + 1 + 24
    cached = run.scheduler.pool.num_cached
    assert cached == (3 + stop) // BLOCK + 25 // BLOCK


class Spoilt:
    """An executor whose ``at``-th step goes wrong."""

    def __init__(self, at: int, spoil: Callable[[StepResult], StepResult]) -> None:
        self._inner, self._left, self._spoil = NullExecutor(64, BLOCK, VOCAB), at, spoil

    def run(self, plan: StepPlan) -> StepResult:
        self._left -= 1
        result = self._inner.run(plan)
        return self._spoil(result) if self._left == 0 else result


def test_a_step_that_fails_ends_its_requests_once_and_others_go_on() -> None:
    def raise_it(result: StepResult) -> StepResult:
        raise RuntimeError("spoilt")

    with threaded(Spoilt(4, raise_it)) as executor:
        run = Run(scheduler_of(), executor)
        run.add(ask("a", ignore_eos=True), ask("b", ignore_eos=True))
        outcomes = [run.step() for _ in range(4)]
        assert [str(o.error) for o in outcomes if o and o.error] == ["spoilt"]
        assert run.finish == dict.fromkeys("ab", FinishReason.ERROR)
        run.assert_nothing_leaked()
        assert run.scheduler.pool.num_cached == 0
        again = ask("a", (5,), ignore_eos=True)
        run.finish.clear()
        run.add(again)
        run.to_the_end()
    assert run.tokens["a"] == one_by_one([again], CONFIG)["a"]


def test_a_row_that_fails_ends_its_request_alone() -> None:
    def fail_first(result: StepResult) -> StepResult:
        first, *others = result.sampled
        return StepResult(tuple(others), ((first.request_id, "spoilt"),))

    other = ask("b", (4,), max_tokens=12, ignore_eos=True)
    with threaded(Spoilt(4, fail_first)) as executor:
        run = Run(scheduler_of(), executor)
        run.add(ask("a", ignore_eos=True), other)
        run.to_the_end()
    assert run.finish == {"a": FinishReason.ERROR, "b": FinishReason.LENGTH}
    assert len(run.tokens["a"]) == 3
    assert run.tokens["b"] == one_by_one([other], CONFIG)["b"]


def test_an_executor_that_is_lost_is_raised() -> None:
    def lose(result: StepResult) -> StepResult:
        raise UnavailableError("lost")

    with threaded(Spoilt(2, lose)) as executor:
        run = Run(scheduler_of(), executor)
        run.add(ask("a"))
        run.step()
        with pytest.raises(UnavailableError, match="lost"):
            run.step()


class Held:
    """An executor that waits in its third step until it is let go."""

    def __init__(self) -> None:
        self.inner, self.steps, self.let_go = NullExecutor(64, BLOCK, VOCAB), 0, threading.Event()

    def run(self, plan: StepPlan) -> StepResult:
        self.steps += 1
        if self.steps == 3:
            assert self.let_go.wait(WAIT_S), "nobody came while the step ran"
        return self.inner.run(plan)


class Answer:
    """A sink that lets a step go when it has the tokens of the one before."""

    def __init__(self, held: Held) -> None:
        self._held, self.token_ids, self.ended = held, list[int](), threading.Event()

    def deliver(self, events: Sequence[Event]) -> None:
        for event in events:
            self.token_ids += event.token_ids
            if len(self.token_ids) == 2:
                self._held.let_go.set()
            if event.finish is not None:
                self.ended.set()


def test_an_engine_sends_the_tokens_of_a_step_while_the_next_one_runs() -> None:
    held = Held()
    with threaded(held) as executor, Engine(scheduler_of(), executor) as engine:
        request, answer = ask("a", max_tokens=12, ignore_eos=True), Answer(held)
        engine.submit(request, answer)
        assert answer.ended.wait(WAIT_S)
        assert answer.token_ids == one_by_one([request], CONFIG)["a"]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_model_makes_the_same_tokens_and_logprobs_ahead(ahead: bool) -> None:
    decoder = load_decoder(resolve_model("demo"), choose_ops())
    config = SchedulerConfig(96, max_num_seqs=3, max_num_batched_tokens=16)
    kinds: tuple[dict[str, object], ...] = (
        {"temperature": 0, "logprobs": 2},
        {"temperature": 0.8, "seed": 3, "frequency_penalty": 0.5, "min_tokens": 8},
        {"temperature": 1.0, "seed": 5, "logprobs": 0, "repetition_penalty": 1.2},
        {"temperature": 0, "ignore_eos": True},
    )
    requests = [
        ask(str(i), range(3 + i, 20 + 2 * i), max_tokens=20 + i, **k) for i, k in enumerate(kinds)
    ]

    def outs(steps: Iterator[StepOutcome]) -> dict[str, list[tuple[int, object]]]:
        made: dict[str, list[tuple[int, object]]] = {r.id: [] for r in requests}
        for step in steps:
            step.raise_failure()
            for out in step.outs:
                made[out.request_id].append((out.token_id, out.logprobs))
        return made

    def added() -> Scheduler:
        scheduler = scheduler_of(24, config)
        for request in requests:
            scheduler.add(request)
        return scheduler

    expected = outs(drive(added(), ModelRunner(decoder, 24, BLOCK)))
    with threaded(ModelRunner(decoder, 24, BLOCK)) as executor:
        scheduler = added()
        if ahead:
            run = Run(scheduler, executor, {r.id: [] for r in requests})
            found = outs(iter(run.step, None))
            assert run.steps.planned_ahead > 20
        else:
            found = outs(drive(scheduler, executor))
        assert found == expected
        assert scheduler.pool.num_free == 24


def test_who_is_detached_while_two_steps_are_under_way_has_no_more_tokens() -> None:
    """Its blocks are lent to nobody before both are over."""
    with threaded(NullExecutor(64, BLOCK, VOCAB)) as executor:
        run = Run(scheduler_of(), executor)
        one, other = ask("a", ignore_eos=True), ask("b", ignore_eos=True)
        run.add(one, other)
        while run.steps.planned_ahead < 2:
            run.step()
        seq = run.scheduler.detach(RequestId("a"))
        assert seq is not None
        assert seq.output_ids == run.tokens["a"]
        run.scheduler.pool.release(seq.blocks)
        assert run.scheduler.blocks_in_use() == {*seq.blocks}
        run.step()
        assert run.scheduler.blocks_in_use() == set()
        run.step()
        assert ("a",) in {plan.ended for plan in run.plans}
        run.scheduler.add(one, History(tuple(run.tokens["a"]), seq.reached, moved=True))
        run.to_the_end()
    assert run.tokens == one_by_one([one, other], CONFIG)


class Rarely(Drafter):
    """Is asked for drafts once in some steps."""

    def __init__(self) -> None:
        self.calls = self.asked = 0

    def awake(self, generating: int) -> bool:
        self.calls += 1
        return self.calls % 6 in (0, 1)  # in the plan that is refused ahead, and the one after it

    def propose(self, seqs: Sequence[SequenceState], beside: int) -> Sequence[Sequence[int]]:
        self.asked += 1
        return [(1, 2)] * len(seqs)


def test_steps_are_planned_ahead_while_nobody_is_to_be_asked_for_drafts() -> None:
    requests = [ask(name, max_tokens=30, ignore_eos=True, seed=i) for i, name in enumerate("ab")]
    drafter = Rarely()
    with threaded(NullExecutor(64, BLOCK, VOCAB)) as executor:
        run = Run(scheduler_of(drafter=drafter), executor)
        run.add(*requests)
        run.to_the_end()
    assert run.tokens == one_by_one(requests, CONFIG)
    assert run.steps.planned_ahead > drafter.asked > 1
