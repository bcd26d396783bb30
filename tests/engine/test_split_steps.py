"""Two steps under way: whatever happens to requests and to the other process, tokens stay the same,
no block is written by two, and every reference comes back."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moeserve.config.options import LoadOptions
from moeserve.core import (
    BlockId,
    Chunk,
    Counters,
    FinishReason,
    Logprobs,
    Request,
    RequestId,
    Sampled,
    SamplingParams,
    Scored,
    StepPlan,
    StepResult,
)
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.drive import StepOutcome, drive
from moeserve.engine.null import NullExecutor, NullSwapMemory, draw, extend
from moeserve.engine.policies.choices import Drafter
from moeserve.engine.policies.split import FIRST_TOKENS, GAPS, CoreShare
from moeserve.engine.policies.swap import SwapOrCompute
from moeserve.engine.policies.targets import NO_TARGETS, LatencyTargets
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.semi.messages import read_result, read_step, write_result, write_step
from moeserve.engine.semi.process import PromptsProcess
from moeserve.engine.semi.scheduler import SplitScheduler
from moeserve.engine.semi.steps import GONE_S, LOST, STEP_S, Answer, SplitSteps
from moeserve.engine.semi.worker import PromptsModel
from moeserve.engine.sequence import SequenceState
from moeserve.engine.swapping import Swapping
from moeserve.errors import InternalError, UnavailableError
from moeserve.kernels.shared_memory import SharedMemory

BLOCK, VOCAB, EOS = 4, 30, 7
GARBAGE = b"half a chunk"


class AnyOrder(NullExecutor):
    """One of two: what a request did elsewhere it is not told. Slots still say whether all that
    comes before a chunk is there."""

    def run(self, plan: StepPlan) -> StepResult:
        self._next_position.clear()
        return super().run(plan)


@dataclass(frozen=True)
class Guess(Drafter):
    """Two drafts, every third of which is wrong."""

    def propose(self, seqs: Sequence[SequenceState], beside: int) -> Sequence[Sequence[int]]:
        return [self.guess([*seq.request.prompt_ids, *seq.output_ids], seq) for seq in seqs]

    def guess(self, history: list[int], seq: SequenceState) -> Sequence[int]:
        digest, made = b"", []
        for token in history:
            digest = extend(digest, token)
        for _ in range(2):
            token = draw(digest, seq.request.params.seed, VOCAB)
            made.append((token + (len(history) % 3 == 0)) % VOCAB)
            history.append(made[-1])
            digest = extend(digest, made[-1])
        return made


@dataclass
class Elsewhere:
    """The other process, by hand: ``do`` runs its step, ``lose`` ends it in the middle."""

    executor: NullExecutor
    ready: bool = True
    plan: StepPlan | None = None
    answer: Answer | None = None
    threads: list[int] = field(default_factory=list)
    killed: int = 0

    def start(self, plan: StepPlan, threads: int) -> None:
        assert self.plan is None
        assert self.ready
        self.plan, self.ready = plan, False
        self.threads.append(threads)

    def take(self) -> Answer | None:
        answer, self.answer = self.answer, None
        if answer is not None:
            self.plan, self.ready = None, answer is not LOST
        return answer

    def kill(self) -> None:
        self.killed += 1

    def do(self) -> None:
        assert self.plan is not None
        self.answer = self.executor.run(self.plan)

    def lose(self, *, written: bool) -> None:
        if self.plan is not None:
            for chunk in self.plan.chunks if written else ():
                slots = self.executor.slots_of(chunk.blocks, chunk.start, len(chunk.token_ids))
                self.executor.write(slots, [GARBAGE] * len(slots))
            self.answer = LOST
        self.ready = False


class Parts:
    """A scheduler whose steps are made by ``steps``."""

    def __init__(
        self, blocks: int = 64, drafter: Drafter | None = None, swap: int = 0, seqs: int = 4
    ) -> None:
        config = SchedulerConfig(40, seqs, 8, eos_ids=frozenset({EOS}))
        self.pool = BlockPool(blocks, BLOCK, Counters())
        self.here, there = AnyOrder(blocks, BLOCK, VOCAB), AnyOrder(blocks, BLOCK, VOCAB)
        there._slots = self.here._slots
        swapping = Swapping(NullSwapMemory(self.here, swap), SwapOrCompute()) if swap else None
        self.scheduler = SplitScheduler(
            config, self.pool, Counters(), drafter=drafter, swapping=swapping
        )
        self.now = 0.0
        self.elsewhere = Elsewhere(there)
        self.cores = CoreShare(4, NO_TARGETS)
        self.used: list[int] = []
        self.steps = SplitSteps(
            self.scheduler,
            self.here,
            self.elsewhere,
            self.cores,
            self.used.append,
            lambda: self.now,
            contextlib.nullcontext(),
        )
        self.plans: list[StepPlan] = []

    def turn(self) -> StepOutcome | None:
        return self.steps.run(lambda plan, began: self.plans.append(plan))


def ask(name: str, prompt: Sequence[int], max_tokens: int = 6, **more: object) -> Request:
    deadline = more.pop("deadline", None)
    params = SamplingParams(max_tokens=max_tokens, **more)  # type: ignore[arg-type]
    return Request(RequestId(name), tuple(prompt), params, deadline=deadline)  # type: ignore[arg-type]


def alone(request: Request) -> list[int]:
    counters = Counters()
    scheduler = Scheduler(
        SchedulerConfig(40, 4, 64, eos_ids=frozenset({EOS})),
        BlockPool(64, BLOCK, counters),
        counters,
    )
    scheduler.add(Request(request.id, request.prompt_ids, request.params))
    steps = drive(scheduler, NullExecutor(64, BLOCK, VOCAB))
    return [out.token_id for outcome in steps for out in outcome.outs]


class SplitMachine(RuleBasedStateMachine):
    """Requests come and go, steps of the other process end late, fail or are lost with it."""

    @initialize(
        blocks=st.integers(10, 14),
        drafts=st.booleans(),
        swap=st.sampled_from([0, 40]),
        seqs=st.integers(1, 4),
    )
    def begin(self, blocks: int, drafts: bool, swap: int, seqs: int) -> None:
        self.parts = Parts(blocks, Guess() if drafts else None, swap, seqs)
        self.asked: dict[RequestId, Request] = {}
        self.made: dict[RequestId, list[int]] = {}
        self.ended: dict[RequestId, FinishReason] = {}
        self.come = 0

    @rule(
        beginning=st.integers(0, 2),
        more=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=14),
        max_tokens=st.integers(1, 12),
        ends=st.booleans(),
        soon=st.booleans(),
        again=st.booleans(),
        scored=st.booleans(),
    )
    def arrive(
        self,
        beginning: int,
        more: list[int],
        max_tokens: int,
        ends: bool,
        soon: bool,
        again: bool,
        scored: bool,
    ) -> None:
        if len(self.asked) - len(self.ended) >= 6:
            return
        left = [name for name in self.ended if again and not self.parts.scheduler.owns(name)]
        name = left[0] if left else RequestId(f"r{self.come}")
        self.come += 1
        deadline = self.parts.now + 3 if soon else None
        request = ask(
            name,
            [*[beginning] * 6, *more],
            max_tokens,
            seed=len(more),
            ignore_eos=not ends,
            deadline=deadline,
            prompt_logprobs=1 if scored else None,
        )
        self.ended.pop(name, None)
        self.asked[name], self.made[name] = request, []
        self.parts.scheduler.add(request)

    @rule(count=st.integers(1, 8))
    def turns(self, count: int) -> None:
        for _ in range(count):
            self.parts.now += 1
            self.take(self.parts.turn())

    def take(self, outcome: StepOutcome | None) -> None:
        if outcome is None:
            return
        for name in outcome.plan.expired:
            self.ended[name] = FinishReason.DEADLINE
        for name, _ in outcome.failed:
            self.ended[name] = FinishReason.ERROR
        for out in outcome.outs:
            self.made[out.request_id].append(out.token_id)
            if out.finish is not None:
                self.ended[out.request_id] = out.finish
                assert self.made[out.request_id] == alone(self.asked[out.request_id])

    @precondition(lambda self: self.parts.elsewhere.plan and not self.parts.elsewhere.answer)
    @rule()
    def prompts_end(self) -> None:
        self.parts.elsewhere.do()

    @precondition(lambda self: self.parts.elsewhere.plan and not self.parts.elsewhere.answer)
    @rule(failed=st.booleans(), written=st.booleans())
    def prompts_are_lost(self, failed: bool, written: bool) -> None:
        if failed:
            self.parts.elsewhere.answer = InternalError("something is wrong")
        else:
            self.parts.elsewhere.lose(written=written)

    @precondition(lambda self: not self.parts.elsewhere.plan)
    @rule(up=st.booleans())
    def comes_and_goes(self, up: bool) -> None:
        self.parts.elsewhere.ready = up

    @rule(data=st.data(), reason=st.sampled_from([FinishReason.ABORT, FinishReason.ERROR]))
    def cancel(self, data: st.DataObject, reason: FinishReason) -> None:
        here = [name for name in self.asked if name not in self.ended]
        if here:
            name = data.draw(st.sampled_from(here))
            assert self.parts.scheduler.abort(name, reason)
            self.ended[name] = reason

    @invariant()
    def blocks_of_the_step_are_held(self) -> None:
        self.parts.pool.check()
        plan = self.parts.elsewhere.plan
        if plan is not None:
            for chunk in plan.chunks:
                assert not any(map(self.parts.pool.is_free, chunk.blocks))
                mine = set(chunk.blocks[chunk.start // BLOCK :])
                for seq in self.parts.scheduler.sequences:
                    if seq.request is not chunk.request:
                        writes = seq.blocks[seq.computed // BLOCK :]
                        assert mine.isdisjoint(writes), "two requests would write to one block"

    def teardown(self) -> None:
        if not hasattr(self, "parts"):
            return
        for _ in range(2000):
            if self.parts.elsewhere.plan and not self.parts.elsewhere.answer:
                self.parts.elsewhere.do()
            outcome = self.parts.turn()
            if outcome is None:
                break
            self.take(outcome)
        assert set(self.ended) == set(self.asked)
        assert self.parts.pool.num_references() == 0
        assert (self.parts.scheduler.num_tokens, self.parts.scheduler.num_running) == (0, 0)
        self.parts.pool.check()
        if self.parts.scheduler.swap is not None:
            self.parts.scheduler.swap.check()


def test_who_needs_the_blocks_of_a_prompt_under_way_sits_out() -> None:
    parts = Parts(blocks=10)
    parts.scheduler.add(ask("a", range(7), max_tokens=30, ignore_eos=True))
    parts.turn()
    parts.elsewhere.do()
    parts.turn()
    parts.scheduler.add(ask("b", range(9, 29), max_tokens=2, ignore_eos=True))
    made = 0
    for _ in range(20):
        outcome = parts.turn()
        made += len(outcome.outs) if outcome is not None else 0
    # Of ten blocks the prompt has five, and five are full of the first one's tokens.
    assert made + 1 + 7 == 5 * BLOCK + 1
    assert parts.scheduler.counters.preemptions == 0
    parts.elsewhere.do()
    parts.turn()
    parts.turn()
    assert parts.scheduler.counters.preemptions == 1
    assert parts.plans[-1].preempted == ("b",) or parts.plans[-2].preempted == ("b",)
    drain(parts)


def test_a_step_that_never_ends_is_ended_with_its_process() -> None:
    parts = Parts()
    parts.scheduler.add(ask("a", range(7), ignore_eos=True))
    parts.turn()
    parts.now += STEP_S + 1
    for _ in range(3):
        parts.turn()
    assert parts.elsewhere.killed == 1
    assert parts.pool.num_references() > 0, "nobody knows yet that it has ended"
    parts.elsewhere.lose(written=True)
    parts.turn()
    assert parts.scheduler.counters.computed_tokens == 7, "computed here"
    parts.elsewhere.ready = True
    drain(parts)


def test_a_process_that_cannot_be_ended_ends_the_engine() -> None:
    parts = Parts()
    parts.scheduler.add(ask("a", range(7)))
    parts.turn()
    parts.now += STEP_S + GONE_S + 1
    with pytest.raises(UnavailableError, match="could not be ended"):
        parts.turn()


def test_a_process_that_cannot_be_started_is_an_error_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none_left() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("moeserve.engine.semi.process.socket.socketpair", none_left)
    model = PromptsModel(Path("model"), LoadOptions(), 1, BLOCK, frozenset(), 1)
    process = PromptsProcess(model, SharedMemory.make("moeserve-test"), lambda: None)
    with pytest.raises(UnavailableError, match=r"cannot be started.*Too many open files"):
        process.open()
    assert process.counts.started == 0


def test_whoever_is_alone_has_all_cores() -> None:
    parts = Parts()
    parts.scheduler.add(ask("a", range(3), max_tokens=9, ignore_eos=True))
    parts.turn()
    parts.elsewhere.do()
    parts.turn()
    parts.turn()
    parts.scheduler.add(ask("b", range(3), ignore_eos=True))
    parts.turn()
    assert parts.elsewhere.threads == [4, 2]
    assert parts.used == [4, 2]


def test_cores_go_to_who_misses_a_target_and_stay_where_both_do() -> None:
    cores = CoreShare(8, LatencyTargets(ttft_s=1.0, tpot_s=0.1))

    def window(late: bool, over: bool) -> int:
        cores.note_gaps({0.2 if over else 0.05: GAPS - 1})
        for _ in range(FIRST_TOKENS):
            cores.note_first(2.0 if late else 0.5)
        return cores.share

    assert [window(late=True, over=False) for _ in range(4)] == [4, 5, 5, 6]
    assert [window(late=True, over=True) for _ in range(2)] == [6, 6]
    assert [window(late=False, over=True) for _ in range(12)] == [
        6,
        5,
        5,
        4,
        4,
        3,
        3,
        2,
        2,
        1,
        1,
        1,
    ]
    assert [window(late=False, over=False) for _ in range(2)] == [1, 1]
    assert (cores.here(prompts=True), cores.elsewhere(newest=True)) == (7, 1)
    assert (cores.here(prompts=False), cores.elsewhere(newest=False)) == (8, 8)


scores = st.builds(
    Logprobs,
    st.floats(allow_nan=False),
    st.lists(st.tuples(st.integers(0, 99), st.floats(allow_nan=False)), max_size=3).map(tuple),
)
results = st.builds(
    StepResult,
    st.lists(
        st.builds(
            Sampled,
            st.text().map(RequestId),
            st.lists(st.integers(0, 99), max_size=3).map(tuple),
            st.lists(scores, max_size=2).map(tuple),
        ),
        max_size=3,
    ).map(tuple),
    st.lists(st.tuples(st.text().map(RequestId), st.text()), max_size=2).map(tuple),
    st.lists(st.builds(Scored, st.text().map(RequestId), st.tuples(scores)), max_size=2).map(tuple),
    st.frozensets(st.text().map(RequestId), max_size=2),
)


@given(results)
def test_results_come_as_they_went(result: StepResult) -> None:
    assert read_result(write_result(result)) == result


@given(
    prompt=st.lists(st.integers(0, 99), min_size=2, max_size=40).map(tuple),
    made=st.lists(st.integers(0, 99), max_size=5),
    first=st.integers(0, 10),
    samples=st.integers(0, 1),
    scored=st.booleans(),
    threads=st.integers(1, 9),
)
def test_steps_come_as_they_went_and_prompts_only_where_somebody_asks(
    prompt: tuple[int, ...],
    made: list[int],
    first: int,
    samples: int,
    scored: bool,
    threads: int,
) -> None:
    request = ask("é", prompt, seed=2**64 - 1, prompt_logprobs=2 if scored else None)
    blocks = tuple(map(BlockId, range(3, 9)))
    chunk = Chunk(request, prompt[first:], first, blocks, samples, made, 0, first + 1)
    plan, count = read_step(*write_step(StepPlan((chunk,)), threads), 100)
    (found,) = plan.chunks
    assert count == threads
    if not (samples or scored):
        chunk = chunk._replace(request=replace(request, prompt_ids=()), output_ids=[])
    assert found == chunk


def drain(parts: Parts) -> None:
    """Until nothing is left."""
    for _ in range(200):
        if parts.elsewhere.plan and not parts.elsewhere.answer:
            parts.elsewhere.do()
        if parts.turn() is None:
            break
    parts.pool.check()
    assert parts.pool.num_references() == 0


TestSplitMachine = SplitMachine.TestCase
TestSplitMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
