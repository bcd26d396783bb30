"""Steps that are planned and started while the one before still runs.

::

    engine's thread   plan 1 | start 1 | plan 2 | start 2 | finish 1 | apply 1, events of 1 | plan 3
    executor                  step 1 ................... | step 2 ..............................

So whatever the engine does beside the steps (plans, events, metrics) costs nothing, as long as it
is shorter than a step. A step is planned ahead where that is certain (``Scheduler.plan_ahead``);
elsewhere the one before is finished first, as ``drive.run_step`` does always, which is the oracle.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from moeserve.core import FinishReason, RequestId, StepPlan
from moeserve.engine.drive import OnPlan, Schedules, StepOutcome, run_step, still_here
from moeserve.engine.executor import Executor, StartingExecutor
from moeserve.engine.pace import Pace
from moeserve.errors import UnavailableError


class MakesSteps(Protocol):
    """What an engine's thread calls time after time."""

    def run(self, on_plan: OnPlan) -> StepOutcome | None:
        """A step that is over; None where there is nothing to do. ``on_plan`` is called for every
        plan before it runs."""
        ...


@runtime_checkable
class SchedulesAhead(Schedules, Protocol):
    """A ``Scheduler``."""

    def plan_ahead(self, now: float) -> StepPlan | None: ...


def steps_of(
    scheduler: Schedules,
    executor: Executor,
    clock: Callable[[], float],
    lock: AbstractContextManager[Any],
    pace: Pace,
) -> MakesSteps:
    """Planned ahead where scheduler and executor allow it."""
    if isinstance(executor, StartingExecutor) and isinstance(scheduler, SchedulesAhead):
        return StepsAhead(scheduler, executor, clock, lock)
    return StepsInTurn(scheduler, executor, clock, lock, pace)


class StepsInTurn:
    """``run_step``, also where one is due that only others have requests for."""

    def __init__(
        self,
        scheduler: Schedules,
        executor: Executor,
        clock: Callable[[], float],
        lock: AbstractContextManager[Any],
        pace: Pace,
    ) -> None:
        self._parts = scheduler, executor, clock
        self._lock = lock
        self._pace = pace

    def run(self, on_plan: OnPlan) -> StepOutcome | None:
        return run_step(*self._parts, lock=self._lock, on_plan=on_plan, due=self._pace.due)


class StepsAhead:
    """``run_step`` of an executor that can be started. ``lock`` and ``on_plan`` are as there; a
    plan's ``on_plan`` comes before its start."""

    def __init__(
        self,
        scheduler: SchedulesAhead,
        executor: StartingExecutor,
        clock: Callable[[], float],
        lock: AbstractContextManager[Any],
    ) -> None:
        self.planned_ahead = 0
        self._scheduler = scheduler
        self._executor = executor
        self._clock = clock
        self._lock = lock
        self._under_way: deque[tuple[StepPlan, float]] = deque()

    def run(self, on_plan: OnPlan) -> StepOutcome | None:
        """Finish a step, after the next one was started if that can be; None where no request is
        left."""
        if not self._under_way:
            with self._lock:
                if not self._scheduler.has_work:
                    return None
                plan = self._scheduler.plan(self._clock())
            began = self._start(plan, on_plan)
            if not plan.chunks:
                return StepOutcome(plan, began)
        with self._lock:
            ahead = self._scheduler.plan_ahead(self._clock())
        if ahead is not None:
            self.planned_ahead += 1
            self._start(ahead, on_plan)
        return self._finish()

    def _start(self, plan: StepPlan, on_plan: OnPlan) -> float:
        """When; a plan without chunks has only news."""
        began = self._clock()
        on_plan(plan, began)
        if plan.chunks:
            self._executor.start(plan)
            self._under_way.append((plan, began))
        return began

    def _finish(self) -> StepOutcome:
        plan, began = self._under_way.popleft()
        try:
            result = self._executor.finish()
            with self._lock:
                failed, scored = still_here(self._scheduler, result)
                for request_id, _ in failed:
                    self._abort(request_id)
                outs = tuple(self._scheduler.apply(result))
        except UnavailableError:
            raise
        except Exception as error:  # noqa: BLE001 - as in run_step
            with self._lock:
                ids = [c.request.id for c in plan.chunks if self._abort(c.request.id)]
                self._scheduler.drop()
            self._drop_next()
            failed = tuple((request_id, "its step failed") for request_id in ids)
            return StepOutcome(plan, began, failed=failed, error=error)
        return StepOutcome(plan, began, outs, failed, result.told, scored=scored)

    def _drop_next(self) -> None:
        """All whose step failed are in the one that was started ahead for nothing."""
        while self._under_way:
            self._under_way.popleft()
            with contextlib.suppress(Exception):
                self._executor.finish()
            with self._lock:
                self._scheduler.drop()

    def _abort(self, request_id: RequestId) -> bool:
        """False for one that ended before: it is in a step ahead for nothing."""
        return self._scheduler.abort(request_id, FinishReason.ERROR)
