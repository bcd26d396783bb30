"""A step is planned, run and applied in one way, whoever takes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from moeserve.core import (
    Counters,
    FinishReason,
    Request,
    RequestId,
    SamplingParams,
    StepPlan,
    StepResult,
)
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.drive import drive, run_step
from moeserve.engine.null import NullExecutor
from moeserve.engine.scheduler import Scheduler
from moeserve.errors import InternalError, UnavailableError


def scheduler_of(*names: str, deadline: float | None = None) -> Scheduler:
    counters = Counters()
    made = Scheduler(SchedulerConfig(64), BlockPool(16, 4, counters), counters)
    params = SamplingParams(max_tokens=3)
    for name in names:
        made.add(Request(RequestId(name), (1, 2, 3), params, deadline=deadline))
    return made


class Spoilt:
    """An executor that spoils its first step."""

    def __init__(self, spoil: Callable[[StepPlan], StepResult]) -> None:
        self._inner = NullExecutor(16, 4, 50)
        self._spoil: Callable[[StepPlan], StepResult] | None = spoil

    def run(self, plan: StepPlan) -> StepResult:
        spoil, self._spoil = self._spoil, None
        return self._inner.run(plan) if spoil is None else spoil(plan)


def raising(error: Exception) -> Callable[[StepPlan], StepResult]:
    def spoil(plan: StepPlan) -> StepResult:
        raise error

    return spoil


def test_steps_come_until_no_request_is_left() -> None:
    scheduler = scheduler_of("a", "b")
    steps = list(drive(scheduler, NullExecutor(16, 4, 50)))
    assert [[out.request_id for out in step.outs] for step in steps] == [["a", "b"]] * 3
    assert [out.finish for out in steps[-1].outs] == [FinishReason.LENGTH] * 2
    assert all(step.failed == () and step.error is None for step in steps)
    assert run_step(scheduler, NullExecutor(16, 4, 50), lambda: 0.0) is None


def test_requests_may_come_between_two_steps() -> None:
    scheduler, seen = scheduler_of("a"), []
    for step in drive(scheduler, NullExecutor(16, 4, 50)):
        seen.append([c.request.id for c in step.plan.chunks])
        if len(seen) == 1:
            scheduler.add(Request(RequestId("b"), (1,), SamplingParams(max_tokens=1)))
    assert seen == [["a"], ["a", "b"], ["a"]]


def test_an_expired_request_is_in_a_plan_that_runs_nothing() -> None:
    scheduler = scheduler_of("a", deadline=1.0)
    (step,) = drive(scheduler, NullExecutor(16, 4, 50), clock=lambda: 2.0)
    assert (step.plan.expired, step.plan.chunks, step.outs) == (("a",), (), ())
    step.raise_failure()


def test_what_fails_alone_ends_alone_before_the_others_are_served() -> None:
    def spoil(plan: StepPlan) -> StepResult:
        result = NullExecutor(16, 4, 50).run(plan)
        return StepResult(result.sampled[1:], ((plan.chunks[0].request.id, "no number"),))

    scheduler = scheduler_of("a", "b")
    step = run_step(scheduler, Spoilt(spoil), lambda: 0.0)
    assert step is not None
    assert (step.failed, [out.request_id for out in step.outs]) == ((("a", "no number"),), ["b"])
    assert scheduler.counters.finished == {FinishReason.ERROR: 1}
    with pytest.raises(InternalError, match="no number"):
        step.raise_failure()


def test_a_step_that_fails_ends_its_requests_and_the_next_one_runs() -> None:
    scheduler = scheduler_of("a", "b")
    executor = Spoilt(raising(ZeroDivisionError("a layer broke")))
    step = run_step(scheduler, executor, lambda: 0.0)
    assert step is not None
    assert [request_id for request_id, _ in step.failed] == ["a", "b"]
    with pytest.raises(ZeroDivisionError, match="a layer broke"):
        step.raise_failure()
    assert not scheduler.has_work
    assert scheduler.pool.num_free == scheduler.pool.num_blocks
    scheduler.add(Request(RequestId("a"), (1,), SamplingParams(max_tokens=2)))
    assert sum(len(step.outs) for step in drive(scheduler, executor)) == 2


def test_an_executor_that_runs_no_more_says_so_to_the_caller() -> None:
    scheduler = scheduler_of("a")
    with pytest.raises(UnavailableError, match="rank 1 is gone"):
        run_step(scheduler, Spoilt(raising(UnavailableError("rank 1 is gone"))), lambda: 0.0)
    assert scheduler.has_work


def test_the_lock_is_held_to_plan_and_to_apply_and_not_while_the_executor_runs() -> None:
    held, seen = [False], []

    class Lock:
        def __enter__(self) -> None:
            held[0] = True

        def __exit__(self, *error: object) -> None:
            held[0] = False

    class Watched(Scheduler):
        def plan(self, now: float) -> StepPlan:
            seen.append(("plan", held[0]))
            return super().plan(now)

        def apply(self, result: StepResult) -> Any:
            seen.append(("apply", held[0]))
            return super().apply(result)

    def run(plan: StepPlan) -> StepResult:
        seen.append(("run", held[0]))
        return NullExecutor(16, 4, 50).run(plan)

    counters = Counters()
    scheduler = Watched(SchedulerConfig(64), BlockPool(16, 4, counters), counters)
    scheduler.add(Request(RequestId("a"), (1, 2), SamplingParams(max_tokens=1)))
    times = iter([1.0, 2.0])
    step = run_step(
        scheduler,
        Spoilt(run),
        lambda: next(times),
        lock=Lock(),
        on_plan=lambda plan, began: seen.append((f"planned at {began}", held[0])),
    )
    assert step is not None
    assert step.began == 2.0
    assert seen == [("plan", True), ("planned at 2.0", False), ("run", False), ("apply", True)]
