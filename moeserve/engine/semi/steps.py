"""The engine's steps where prompts run in another process: newest tokens meanwhile.

::

    engine's thread   plan 1, a | start a | run 1 | plan 2 | run 2 | take a, plan 3, b | start b ...
    other process               | a .......................|                           | b .........

A step of prompts is taken as soon as the step that runs here is over. While there is nothing to run
here the engine's thread rests, and is woken by the answer. Where the other process has died, its
step never was: who was in it has its chunks computed again, and as long as there is no other
process steps have both, here (``drive.run_step``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from moeserve.core import FinishReason, StepPlan, StepResult
from moeserve.engine.drive import OnPlan, StepOutcome, run_planned, run_step, still_here
from moeserve.engine.executor import Executor
from moeserve.engine.semi.scheduler import SplitScheduler
from moeserve.errors import MoeserveError, UnavailableError

# Of a step of prompts; then its process is killed.
STEP_S = 120.0
# From then on until it must be gone.
GONE_S = 30.0


class Lost(Enum):
    """In the place of an answer: the process has ended, and nothing of it writes any more."""

    LOST = "lost"


LOST = Lost.LOST
# A result, why the step failed as a whole, or that there is nobody to ask any more.
Answer = StepResult | MoeserveError | Lost


class PromptsExecutor(Protocol):
    """Runs steps elsewhere, one at a time, over the same KV. It wakes the engine when an answer is
    there, or when it is ready again."""

    @property
    def ready(self) -> bool:
        """Whether a step can be started now."""
        ...

    def start(self, plan: StepPlan, threads: int) -> None:
        """Returns at once; where it cannot be started the answer says so."""
        ...

    def take(self) -> Answer | None:
        """Of the step that was started; None while it runs. Given once."""
        ...

    def kill(self) -> None:
        """Whatever it does; the answer will be that it is lost."""
        ...


class Cores(Protocol):
    """Who has how many threads (``policies.split``)."""

    def here(self, *, prompts: bool) -> int:
        """For newest tokens, with or without prompts elsewhere."""
        ...

    def elsewhere(self, *, newest: bool) -> int:
        """For prompts, with or without newest tokens here."""
        ...


@dataclass(slots=True)
class _UnderWay:
    plan: StepPlan
    began: float
    killed: bool = False


class SplitSteps:
    """A ``MakesSteps``. ``set_threads`` is called between two steps, where the number changes."""

    def __init__(
        self,
        scheduler: SplitScheduler,
        executor: Executor,
        prompts: PromptsExecutor,
        cores: Cores,
        set_threads: Callable[[int], None],
        clock: Callable[[], float],
        lock: AbstractContextManager[Any],
    ) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._prompts = prompts
        self._cores = cores
        self._set_threads = set_threads
        self._threads = 0
        self._clock = clock
        self._lock = lock
        self._under_way: _UnderWay | None = None
        self._log = logging.getLogger("moeserve.engine")

    def run(self, on_plan: OnPlan) -> StepOutcome | None:
        """A step of either kind that is over. One without chunks: there is nothing to run here
        until the other process answers."""
        if self._under_way is not None:
            taken = self._take(self._under_way)
            if taken is not None:
                return taken
        if self._under_way is None and not self._prompts.ready:
            self._use(self._cores.here(prompts=False))
            return run_step(
                self._scheduler, self._executor, self._clock, lock=self._lock, on_plan=on_plan
            )
        prompts = None
        with self._lock:
            if not self._scheduler.has_work:
                return None
            now = self._clock()
            newest = self._scheduler.plan_newest(now)
            if self._under_way is None:
                prompts = self._scheduler.plan_prompts(now)
        on_plan(newest, now)
        if prompts is not None:
            on_plan(prompts, now)
            self._under_way = _UnderWay(prompts, now)
            threads = self._cores.elsewhere(newest=bool(newest.chunks))
            self._prompts.start(prompts, threads)
        if not newest.chunks:
            return StepOutcome(newest, now)
        self._use(self._cores.here(prompts=self._under_way is not None))
        return run_planned(self._scheduler, self._executor, newest, now, self._lock)

    def close(self) -> None:
        """The other process has ended, and so has the engine's thread."""
        if self._under_way is not None:
            self._under_way = None
            with self._lock:
                self._scheduler.drop_prompts()

    def _take(self, step: _UnderWay) -> StepOutcome | None:
        """The step of prompts, if it is over and there is something to tell of it."""
        answer = self._prompts.take()
        if answer is None:
            self._bound(step)
            return None
        self._under_way = None
        if isinstance(answer, StepResult):
            return self._settle(step, answer)
        if isinstance(answer, MoeserveError):
            return self._fail(step, answer)
        with self._lock:
            again = self._scheduler.drop_prompts()
        self._log.warning("a step of prompts was lost: %d requests compute it again", len(again))
        return None

    def _settle(self, step: _UnderWay, result: StepResult) -> StepOutcome:
        scheduler = self._scheduler
        with self._lock:
            left = scheduler.left_prompts()
            failed, scored = still_here(scheduler, result)
            failed = tuple(one for one in failed if one[0] not in left)
            for request_id, _ in failed:
                scheduler.abort(request_id, FinishReason.ERROR)
            outs = tuple(scheduler.apply_prompts(result))
        scored = tuple(one for one in scored if one.request_id not in left)
        return StepOutcome(step.plan, step.began, outs, failed, result.told, scored=scored)

    def _fail(self, step: _UnderWay, error: MoeserveError) -> StepOutcome:
        with self._lock:
            ids = self._scheduler.drop_prompts()
            for request_id in ids:
                self._scheduler.abort(request_id, FinishReason.ERROR)
        failed = tuple((request_id, "its step failed") for request_id in ids)
        return StepOutcome(step.plan, step.began, failed=failed, error=error)

    def _bound(self, step: _UnderWay) -> None:
        """No step takes for ever. UnavailableError where its process cannot even be ended: nobody
        knows then what it writes."""
        took = self._clock() - step.began
        if took > STEP_S and not step.killed:
            step.killed = True
            self._log.error("a step of prompts has taken %.0f s: its process is killed", took)
            self._prompts.kill()
        if took > STEP_S + GONE_S:
            raise UnavailableError(
                f"the process that computes prompts could not be ended within {GONE_S:.0f} s"
            )

    def _use(self, threads: int) -> None:
        if threads != self._threads:
            self._threads = threads
            self._set_threads(threads)
