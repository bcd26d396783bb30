"""Plan, run, apply: the one way in which a scheduler and an executor make steps.

The engine's thread takes ``run_step`` by itself, for it has clients to serve in between; whoever
has only requests to finish uses ``drive``. Scheduler, executor and clock are arguments, so that a
simulator can be all three.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from moeserve.core import (
    Counters,
    FinishReason,
    Request,
    RequestId,
    Scored,
    StepPlan,
    StepResult,
    TokenOut,
)
from moeserve.engine.blocks import BlockCounts
from moeserve.engine.executor import Executor
from moeserve.engine.sequence import NEW, History, SequenceState
from moeserve.errors import InternalError, UnavailableError

OnPlan = Callable[[StepPlan, float], None]


class Schedules(Protocol):
    """A ``Scheduler``, or a ``Fleet`` of them."""

    @property
    def counters(self) -> Counters: ...
    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def has_work(self) -> bool: ...
    @property
    def blocks(self) -> BlockCounts: ...

    def owns(self, request_id: RequestId) -> bool: ...

    def add(self, request: Request, history: History = NEW) -> None: ...

    def withdraw(self, count: int) -> list[SequenceState]:
        """Let go of so many that wait."""
        ...

    def abort(self, request_id: RequestId, reason: FinishReason) -> bool: ...

    def detach(self, request_id: RequestId) -> SequenceState | None:
        """Let go of a request with its blocks."""
        ...

    def plan(self, now: float) -> StepPlan: ...

    def apply(self, result: StepResult) -> list[TokenOut]: ...

    def drop(self) -> object:
        """There is no result of the step, whose requests have been aborted."""
        ...


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """A step that is over; the scheduler has taken note of all that is here.

    ``began`` is when its plan was made, by the clock. ``outs`` are the tokens that were accepted,
    ``scored`` what became known of prompts. ``failed`` requests ended with an error, each for its
    own reason, which those of ``told`` may know; where the step as a whole failed, these are all
    that were in it, and ``error`` is what the executor raised.
    """

    plan: StepPlan
    began: float
    outs: tuple[TokenOut, ...] = ()
    failed: tuple[tuple[RequestId, str], ...] = ()
    told: frozenset[RequestId] = frozenset()
    error: Exception | None = None
    scored: tuple[Scored, ...] = ()

    def raise_failure(self) -> None:
        """For those who have no client to tell: whatever failed, raised."""
        if self.error is not None:
            raise self.error
        if self.failed:
            raise InternalError(self.failed[0][1])


def run_step(
    scheduler: Schedules,
    executor: Executor,
    clock: Callable[[], float],
    *,
    lock: AbstractContextManager[Any] | None = None,
    on_plan: OnPlan = lambda plan, began: None,
    due: bool = False,
) -> StepOutcome | None:
    """One step; None where no request is left, unless it is ``due`` all the same: then others have
    requests, and the executor runs with them.

    ``lock`` is held while the scheduler is asked, not while the executor runs, so requests may be
    added and aborted meanwhile. ``on_plan`` is called, without it, before the executor. Requests
    that expired are in the plan, also if that has nothing to run. An error of the executor ends
    the step's requests; UnavailableError, after which it runs no more, is raised.
    """
    lock = lock or nullcontext()
    with lock:
        if not scheduler.has_work and not due:
            return None
        plan = scheduler.plan(clock())
    began = clock()
    on_plan(plan, began)
    if not plan.chunks and not due:
        return StepOutcome(plan, began)
    return run_planned(scheduler, executor, plan, began, lock)


def run_planned(
    scheduler: Schedules,
    executor: Executor,
    plan: StepPlan,
    began: float,
    lock: AbstractContextManager[Any],
) -> StepOutcome:
    """The rest of ``run_step``, once there is a plan."""
    try:
        result = executor.run(plan)
        if result is None:
            return StepOutcome(plan, began)
        with lock:
            failed, scored = still_here(scheduler, result)
            for request_id, _ in failed:
                scheduler.abort(request_id, FinishReason.ERROR)
            outs = tuple(scheduler.apply(result))
    except UnavailableError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a backend raises ends this step's requests
        with lock:
            ids = [c.request.id for c in plan.chunks]
            ids = [i for i in ids if scheduler.abort(i, FinishReason.ERROR)]
            scheduler.drop()
        failed = tuple((request_id, "its step failed") for request_id in ids)
        return StepOutcome(plan, began, failed=failed, error=error)
    return StepOutcome(plan, began, outs, failed, result.told, scored=scored)


def still_here(
    scheduler: Schedules, result: StepResult
) -> tuple[tuple[tuple[RequestId, str], ...], tuple[Scored, ...]]:
    """What failed, and what became known of prompts, without those that left during the step."""
    failed = tuple(f for f in result.failed if scheduler.owns(f[0]))
    return failed, tuple(s for s in result.scored if scheduler.owns(s.request_id))


def drive(
    scheduler: Schedules, executor: Executor, clock: Callable[[], float] = lambda: 0.0
) -> Iterator[StepOutcome]:
    """Steps until no request is left. Requests may be added while it is held between two."""
    while (outcome := run_step(scheduler, executor, clock)) is not None:
        yield outcome
