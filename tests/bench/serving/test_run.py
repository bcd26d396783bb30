"""The loop that sends, on a clock that jumps from one event to the next: times are exact."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.bench.serving.outcomes import AnswerRecord, Outcome, RequestFailed
from moeserve.bench.serving.plan import PlannedRequest
from moeserve.bench.serving.run import LoadRun, RunOptions

T = TypeVar("T")


class JumpingLoop(asyncio.SelectorEventLoop):
    """Whose time passes only where it would wait, and then at once."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_Jumping(self))

    def time(self) -> float:
        return self._now

    def wait(self, timeout: float) -> None:
        self._now += timeout


class _Jumping(selectors.SelectSelector):
    def __init__(self, loop: JumpingLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "everything waits, and for nothing"
        self._loop.wait(max(0.0, timeout))
        return super().select(0)


def at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        return runner.run(coroutine)


class Scripted:
    """A target whose answers take as long as ``times`` says for each request in turn."""

    def __init__(self, *times: float, fails: str = "") -> None:
        self.outstanding = self.most = 0
        self._times = list(times)
        self._fails = fails
        self._next = 0

    def prepare(self, request: PlannedRequest) -> float:
        self._next += 1
        return self._times[(self._next - 1) % len(self._times)]

    async def send(self, prepared: float, record: AnswerRecord) -> None:
        self.outstanding += 1
        self.most = max(self.most, self.outstanding)
        now = asyncio.get_running_loop().time
        try:
            await asyncio.sleep(prepared / 2)
            record.message(now(), 1)
            if self._fails:
                raise RequestFailed(self._fails, "as the script says")
            await asyncio.sleep(prepared / 2)
            record.message(now(), 3)
            record.usage(2, 4)
        finally:
            self.outstanding -= 1

    async def close(self) -> None:
        pass


def due(*times: float) -> list[PlannedRequest]:
    return [PlannedRequest(at_s, 4, text="Once") for at_s in times]


def driven(
    target: Scripted, requests: Sequence[PlannedRequest], **options: Any
) -> tuple[Outcome, ...]:
    made = RunOptions(**({"timeout_s": 100.0} | options))
    return at_once(LoadRun(target, made).drive(requests))


def times(outcomes: Sequence[Outcome], of: Callable[[Outcome], float | None]) -> list[float | None]:
    return [None if (x := of(o)) is None else round(x, 9) for o in outcomes]


def test_requests_are_sent_when_due_whatever_is_outstanding() -> None:
    target = Scripted(50.0)
    outcomes = driven(target, due(0.0, 1.0, 1.0, 2.5))
    assert times(outcomes, lambda o: o.sent_s) == [0.0, 1.0, 1.0, 2.5]
    assert times(outcomes, lambda o: o.lag_s) == [0.0] * 4
    assert target.most == 4
    assert times(outcomes, lambda o: o.ttft_s) == [25.0] * 4
    assert times(outcomes, lambda o: o.e2el_s) == [50.0] * 4
    assert {o.output_tokens for o in outcomes} == {4}


def test_a_closed_loop_sends_the_next_when_one_has_ended() -> None:
    target = Scripted(4.0)
    outcomes = driven(target, due(0.0, 0.0, 0.0, 1.0), most_outstanding=2)
    assert times(outcomes, lambda o: o.sent_s) == [0.0, 0.0, 4.0, 4.0]
    assert times(outcomes, lambda o: o.lag_s) == [0.0] * 4, "waiting for a place is no lateness"
    assert target.most == 2


@given(
    gaps=st.lists(st.floats(0, 3), min_size=1, max_size=20),
    lasts=st.lists(st.floats(0.1, 5), min_size=1, max_size=5),
    most=st.none() | st.integers(1, 4),
)
def test_no_request_is_early_and_no_place_is_left_empty(
    gaps: list[float], lasts: list[float], most: int | None
) -> None:
    at, planned = 0.0, []
    for gap in gaps:
        at += gap
        planned.append(at)
    target = Scripted(*lasts)
    outcomes = driven(target, due(*planned), most_outstanding=most)
    assert [o.index for o in outcomes] == list(range(len(planned)))
    for o in outcomes:
        assert o.sent_s >= o.due_s - 1e-9
        if o.sent_s > o.due_s + 1e-6:
            assert most is not None, "an open loop never waits"
            assert sum(x.sent_s <= o.due_s + 1e-6 and x.end_s > o.due_s for x in outcomes) >= most
    assert target.most <= (most or len(planned))
    assert target.outstanding == 0


def test_what_takes_too_long_is_a_timeout_and_is_cancelled() -> None:
    target = Scripted(8.0, 2.0)
    slow, quick = driven(target, due(0.0, 1.0), timeout_s=6.0)
    assert (slow.failure, slow.end_s, slow.output_tokens) == ("timeout", 6.0, 1)
    assert slow.ttft_s is None
    assert quick.ok
    assert target.outstanding == 0


def test_failures_are_outcomes_and_give_their_place_back() -> None:
    told: list[Outcome] = []
    run = LoadRun(Scripted(2.0, fails="reset"), RunOptions(9.0, 1), told.append)
    outcomes = at_once(run.drive(due(0.0, 0.0, 0.0)))
    assert [o.failure for o in outcomes] == ["reset"] * 3
    assert outcomes[0].detail == "as the script says"
    assert times(outcomes, lambda o: o.sent_s) == [0.0, 1.0, 2.0]
    assert told == list(outcomes)
    assert (run.sent, run.ended, run.failed, run.tokens) == (3, 3, 3, 3)


def test_a_slow_target_to_prepare_for_makes_requests_late_and_that_is_told() -> None:
    class Slow(Scripted):
        def prepare(self, request: PlannedRequest) -> float:
            loop = asyncio.get_running_loop()
            assert isinstance(loop, JumpingLoop)
            loop.wait(0.75)
            return super().prepare(request)

    outcomes = driven(Slow(1.0), due(0.0, 1.0, 1.0))
    assert times(outcomes, lambda o: o.lag_s) == [0.75, 0.5, 1.25]


def test_a_bug_ends_the_run() -> None:
    class Broken(Scripted):
        async def send(self, prepared: float, record: AnswerRecord) -> None:
            raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as caught:
        driven(Broken(1.0), due(0.0))
    assert caught.group_contains(ZeroDivisionError)
