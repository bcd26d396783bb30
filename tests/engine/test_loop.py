"""The step loop, over the null executor: every stream gets its tokens and exactly one end."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest

from moeserve.core import (
    Counters,
    Event,
    FinishReason,
    Request,
    RequestId,
    SamplingParams,
    StepPlan,
    StepResult,
    Timing,
)
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.executor import Executor
from moeserve.engine.loop import Engine
from moeserve.engine.null import NullExecutor
from moeserve.engine.request_state import EachEvent
from moeserve.engine.scheduler import Scheduler
from moeserve.errors import InvalidRequestError, UnavailableError

BLOCKS, BLOCK, VOCAB = 32, 4, 26
WAIT_S = 30.0


@dataclass
class Client:
    """Collects a stream's events."""

    events: list[Event] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def deliver(self, events: Sequence[Event]) -> None:
        for event in events:
            assert not self.ended.is_set(), "an event after the last"
            self.events.append(event)
            if event.finish is not None:
                self.ended.set()

    def wait(self) -> Event:
        assert self.ended.wait(WAIT_S), "the stream has no end"
        return self.events[-1]

    @property
    def token_ids(self) -> list[int]:
        return [t for e in self.events for t in e.token_ids]


class Gate:
    """An executor that stands still until it is let go."""

    def __init__(self, inner: Executor) -> None:
        self.inner = inner
        self.entered = threading.Event()
        self.let_go = threading.Event()

    def run(self, plan: StepPlan) -> StepResult:
        self.entered.set()
        assert self.let_go.wait(WAIT_S)
        return self.inner.run(plan)


@dataclass
class Watcher:
    """Remembers what an observer is told."""

    told: list[str] = field(default_factory=list)
    gaps: list[dict[float, int]] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)

    def on_step(self, plan: StepPlan, seconds: float) -> None:
        self.told.append(f"step {plan.num_tokens}")

    def on_gaps(self, gaps: Mapping[float, int]) -> None:
        self.gaps.append(dict(gaps))
        self.told += ["token"] * sum(gaps.values())

    def on_first_token(self, timing: Timing) -> None:
        self.told.append("first")

    def on_finish(self, reason: FinishReason, timing: Timing) -> None:
        self.told.append(f"finish {reason}")
        self.timings.append(timing)


def null() -> NullExecutor:
    return NullExecutor(BLOCKS, BLOCK, VOCAB)


def make_scheduler() -> Scheduler:
    counters = Counters()
    config = SchedulerConfig(64, max_num_seqs=8, max_num_batched_tokens=32)
    return Scheduler(config, BlockPool(BLOCKS, BLOCK, counters), counters)


def make_engine(
    executor: Executor | None = None,
    observer: Watcher | None = None,
    clock: Callable[[], float] = lambda: 0.0,
) -> Engine:
    return Engine(make_scheduler(), executor or null(), observer, clock)


def request(name: str = "r", max_tokens: int = 6, **params: object) -> Request:
    prompt = tuple(ord(c) % VOCAB for c in name)
    return Request(RequestId(name), prompt, SamplingParams(max_tokens=max_tokens, **params))  # type: ignore[arg-type]


def solo(asked: Request) -> Client:
    client = Client()
    with make_engine() as engine:
        engine.submit(asked, client)
        client.wait()
    return client


def assert_empty(engine: Engine) -> None:
    load = engine.load()
    assert (load.running, load.waiting, load.free_blocks) == (0, 0, load.total_blocks)


@contextmanager
def gated() -> Iterator[tuple[Engine, Gate]]:
    gate = Gate(null())
    with make_engine(gate) as engine:
        try:
            yield engine, gate
        finally:
            gate.let_go.set()


def test_a_stream_gets_tokens_and_one_end() -> None:
    client = solo(request())
    assert [len(e.token_ids) for e in client.events] == [1] * 6
    assert len(set(client.token_ids)) > 1
    assert [e.finish for e in client.events] == [None] * 5 + [FinishReason.LENGTH]


def test_64_streams_at_once_equal_their_solo_runs() -> None:
    requests = [request(f"client {i}", 12) for i in range(64)]
    clients = [Client() for _ in requests]
    with make_engine() as engine:
        for asked, client in zip(requests, clients, strict=True):
            engine.submit(asked, client)
        for client in clients:
            client.wait()
        assert_empty(engine)
    for asked, client in zip(requests[::8], clients[::8], strict=True):
        assert client.token_ids == solo(asked).token_ids


def test_a_shared_sink_is_called_once_a_step_with_the_events_of_all() -> None:
    calls: list[list[str]] = []
    ended = threading.Event()

    class Shared:
        def deliver(self, events: Sequence[Event]) -> None:
            calls.append([e.request_id for e in events])
            if all(e.finish is not None for e in events):
                ended.set()

    shared, alone = Shared(), Client()
    with gated() as (engine, gate):
        engine.submit(request("first", 2), Client())
        assert gate.entered.wait(WAIT_S)  # the rest run together from the next step on
        for name in "abc":
            engine.submit(request(name, 4), shared)
        engine.submit(request("alone", 4), alone)
        gate.let_go.set()
        assert ended.wait(WAIT_S)
        alone.wait()
    assert calls == [["a", "b", "c"]] * 4
    assert len(alone.events) == 4


def test_a_request_whose_text_is_complete_ends_as_stopped() -> None:
    with gated() as (engine, gate):
        client = Client()
        engine.submit(request(max_tokens=30, stop=("not looked for here",)), client)
        assert gate.entered.wait(WAIT_S)
        engine.abort(RequestId("r"), FinishReason.STOP)
        gate.let_go.set()
        last = client.wait()
        assert (last.finish, last.error, last.token_ids) == (FinishReason.STOP, "", ())
        assert_empty(engine)
        assert engine.counters.finished == {FinishReason.STOP: 1}
        assert engine.counters.generated_tokens < 30


def test_a_refused_request_raises_and_leaves_nothing() -> None:
    with make_engine() as engine:
        with pytest.raises(InvalidRequestError, match="no tokens"):
            engine.submit(Request(RequestId("r"), (), SamplingParams()), Client())
        assert_empty(engine)


def test_an_aborted_request_ends_and_frees_its_blocks_at_the_next_step() -> None:
    with gated() as (engine, gate):
        client, other = Client(), Client()
        engine.submit(request("r", 50), client)
        engine.submit(request("other"), other)
        assert gate.entered.wait(WAIT_S)
        engine.abort(RequestId("r"))
        gate.let_go.set()
        last = client.wait()
        assert (last.finish, last.error) == (FinishReason.ABORT, "the request was cancelled")
        assert len(client.token_ids) <= 1
        assert other.wait().finish is FinishReason.LENGTH
        assert_empty(engine)


def test_an_abort_does_not_reach_a_later_request_of_the_same_id() -> None:
    with gated() as (engine, gate):
        first, second = Client(), Client()
        engine.submit(request("r", 1), first)
        assert gate.entered.wait(WAIT_S)
        engine.abort(RequestId("r"))
        gate.let_go.set()
        first.wait()
        engine.submit(request("r", 5), second)
        engine.abort(RequestId("unknown"))
        assert second.wait().finish is FinishReason.LENGTH


def test_an_id_is_in_use_until_its_stream_has_ended() -> None:
    """Also between the step that ends it and its last event."""
    first, refused = Client(), []

    class Hasty(Watcher):
        def on_step(self, plan: StepPlan, seconds: float) -> None:
            try:
                engine.submit(request("r", 1), Client())
            except InvalidRequestError as error:
                refused.append(error.message)

    with make_engine(observer=Hasty()) as engine:
        engine.submit(request("r", 1), first)
        assert first.wait().finish is FinishReason.LENGTH
    assert refused == ["request id 'r' is in use: choose another"]


def test_a_late_request_ends_with_its_deadline() -> None:
    now = [0.0]
    gate = Gate(null())
    client = Client()
    with make_engine(gate, clock=lambda: now[0]) as engine:
        engine.submit(replace(request(max_tokens=50), deadline=5.0), client)
        assert gate.entered.wait(WAIT_S)
        now[0] = 6.0
        gate.let_go.set()
        last = client.wait()
        assert (last.finish, last.error) == (FinishReason.DEADLINE, "the deadline passed")
        assert_empty(engine)


class Breaking:
    """An executor that fails once."""

    def __init__(self) -> None:
        self.inner = null()
        self.plans: list[StepPlan] = []

    def run(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        if len(self.plans) == 2:
            raise RuntimeError("the device is gone")
        return self.inner.run(plan)


def test_a_failing_step_ends_its_requests_and_the_engine_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    client, after = Client(), Client()
    with make_engine(Breaking()) as engine:
        engine.submit(request("r", 50), client)
        last = client.wait()
        assert last.finish is FinishReason.ERROR
        assert "gone" not in last.error
        assert_empty(engine)
        engine.submit(request("after"), after)
        assert after.wait().finish is FinishReason.LENGTH
    assert "the device is gone" in caplog.text


class Failing:
    """An executor that cannot sample for one request."""

    def __init__(self) -> None:
        self.inner = null()

    def run(self, plan: StepPlan) -> StepResult:
        result = self.inner.run(plan)
        kept = tuple(s for s in result.sampled if s.request_id != "bad")
        failed = tuple((c.request.id, "NaN") for c in plan.chunks if c.request.id == "bad")
        return StepResult(kept, failed)


def test_a_request_that_fails_alone_ends_alone(caplog: pytest.LogCaptureFixture) -> None:
    bad, good = Client(), Client()
    with make_engine(Failing()) as engine:
        engine.submit(request("bad"), bad)
        engine.submit(request("good"), good)
        assert bad.wait().finish is FinishReason.ERROR
        assert good.wait().finish is FinishReason.LENGTH
        assert_empty(engine)
    assert "NaN" in caplog.text


def test_a_sink_that_breaks_loses_its_request_only(caplog: pytest.LogCaptureFixture) -> None:
    def broken(event: Event) -> None:
        raise ConnectionError("nobody listens")

    good = Client()
    with make_engine() as engine:
        engine.submit(request("bad", 60), EachEvent(broken))
        engine.submit(request("good", 12), good)
        assert good.wait().finish is FinishReason.LENGTH
        assert engine.counters.finished[FinishReason.ABORT] == 1
    assert "nobody listens" in caplog.text


def test_an_engine_that_stops_refuses_what_comes() -> None:
    with gated() as (engine, gate):
        client = Client()
        engine.submit(request(), client)
        assert gate.entered.wait(WAIT_S)
        stopping = threading.Thread(target=engine.stop, args=(WAIT_S,))
        assert engine.load().accepting
        stopping.start()
        until = time.monotonic() + WAIT_S
        while engine.load().accepting and time.monotonic() < until:
            time.sleep(0.001)
        with pytest.raises(UnavailableError, match="stopping or stopped"):
            engine.submit(request("late"), Client())
        gate.let_go.set()
        stopping.join(WAIT_S)
        assert client.wait().finish is FinishReason.UNAVAILABLE


def test_stopping_ends_every_stream() -> None:
    clients = [Client() for _ in range(12)]
    with gated() as (engine, gate):
        for i, client in enumerate(clients):
            engine.submit(request(f"r{i}", 20), client)
        assert gate.entered.wait(WAIT_S)
        gate.let_go.set()
        assert engine.stop(WAIT_S)
        assert {c.wait().finish for c in clients} <= {
            FinishReason.UNAVAILABLE,
            FinishReason.LENGTH,
        }
        assert_empty(engine)
        assert not engine.alive


def test_stopping_does_not_wait_for_a_step_that_hangs(caplog: pytest.LogCaptureFixture) -> None:
    client = Client()
    with gated() as (engine, gate):
        engine.submit(request(), client)
        assert gate.entered.wait(WAIT_S)
        assert not engine.stop(timeout=0.01)
        assert client.wait().finish is FinishReason.UNAVAILABLE
    assert "did not end" in caplog.text


def test_an_engine_that_never_started_ends_its_streams_too() -> None:
    engine, client = make_engine(), Client()
    engine.submit(request(), client)
    assert engine.stop()
    assert client.wait().finish is FinishReason.UNAVAILABLE


class Senseless(Scheduler):
    def plan(self, now: float) -> StepPlan:
        raise AssertionError("a bug of ours")


def test_even_a_bug_in_planning_leaves_no_stream_open(caplog: pytest.LogCaptureFixture) -> None:
    counters, client = Counters(), Client()
    scheduler = Senseless(SchedulerConfig(64), BlockPool(BLOCKS, BLOCK, counters), counters)
    with caplog.at_level(logging.CRITICAL), Engine(scheduler, null()) as engine:
        engine.submit(request(), client)
        assert client.wait().finish is FinishReason.UNAVAILABLE
        with pytest.raises(UnavailableError):
            engine.submit(request("late"), Client())
    assert "a bug of ours" in caplog.text


def test_the_observer_hears_of_steps_tokens_and_ends() -> None:
    watcher, client, again = Watcher(), Client(), Client()
    prompt = "a prompt of 3 blocks"
    with make_engine(observer=watcher) as engine:
        engine.submit(request(prompt, 3), client)
        client.wait()
        engine.submit(request(prompt, 1), again)
        again.wait()
    assert watcher.told == [
        *("step 20", "first", "step 1", "token", "step 1", "token", "finish length"),
        *("step 4", "first", "finish length"),
    ]
    assert [(t.prompt_tokens, t.cached_tokens, t.output_tokens) for t in watcher.timings] == [
        (20, 0, 3),
        (20, 16, 1),
    ]
    assert again.events[-1].cached_tokens == 16


def test_tokens_of_a_step_are_told_by_how_long_after_the_last_they_came() -> None:
    now = [0.0]

    class Watched(Gate):
        def run(self, plan: StepPlan) -> StepResult:
            result = super().run(plan)
            now[0] += 1.0
            return result

    gate, watcher, clients = Watched(null()), Watcher(), [Client() for _ in range(3)]
    with make_engine(gate, watcher, lambda: now[0]) as engine:
        engine.submit(request("early", 3), clients[0])
        assert gate.entered.wait(WAIT_S)
        engine.submit(request("a", 2), clients[1])
        engine.submit(request("b", 2), clients[2])
        gate.let_go.set()
        for client in clients:
            client.wait()
    assert watcher.gaps == [{1.0: 1}, {1.0: 3}]
