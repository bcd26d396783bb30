"""Runs this rank's part of every step, together with all other ranks.

Each rank schedules its own requests (``scheduler``), and every MoE layer is an exchange between all
of them, so they run steps in lock-step, also those who have nothing to run. What must be common to
a step is agreed by one round of small records (``records``) on the mesh. The record of a step is
given before the step before it runs, and the round completes meanwhile: it costs no wait. Only the
first step after a pause waits for its round; whoever has a request begins that, and the mesh wakes
the others.

::

    engine's thread    plan n | post n+1 | run n ............ | take round n+1 | apply n | plan n+1
    mesh's thread               round n+1 with all ranks

What goes wrong around a rank's part of a step ends the requests it touches (see ``model_runner``).
What goes wrong in the exchange or on the mesh ends the run: lock-step is lost, every rank is sent
the reason, and no further step is run.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Protocol

from moeserve.comm.control.step_mesh import StepMesh
from moeserve.comm.dispatcher import DispatchStats
from moeserve.core import StepPlan, StepResult
from moeserve.engine.executor import RankExecutor
from moeserve.engine.ranks.loads import LoadsOfRound
from moeserve.engine.ranks.microbatches import MicrobatchPolicy, StepShape
from moeserve.engine.ranks.records import Decision, RankReport, decide, loads_of
from moeserve.errors import UnavailableError

# How soon a rank that rests looks whether a layer's new experts are ready.
PENDING_S = 0.05


class RankLoad(Protocol):
    """What of this rank's requests goes into its records; asked on the engine's thread."""

    def report(self) -> RankReport:
        """Load, and what the step after the planned one is foreseen to be."""
        ...

    def queued(self) -> int:
        """Requests that wait at this process's door; any thread may ask."""
        ...


class PlanTurns(Protocol):
    """This rank's part in a change of plan (``replan.swapper``)."""

    @property
    def prepared(self) -> int:
        """The turn that waits for a step, 0 for none."""
        ...

    def promise(self) -> int:
        """The turn that a record is to name; it stays prepared until ``settle``."""
        ...

    def settle(self, agreed: int) -> None:
        """Between two steps, on all ranks the same two: the turn that all named, or 0."""
        ...


class LockStep:
    """Executor and pace (``executor.Executor``, ``pace.Pace``) of one rank's engine.

    ``chosen`` counts steps by number of microbatches. ``on_loads`` gets, with every round, how many
    requests wait at ranks and what makes the table of loads; ``on_measured`` what was measured of a
    step, once. Set them before the first step; both are called on the engine's thread.
    """

    def __init__(
        self,
        executor: RankExecutor,
        mesh: StepMesh,
        load: RankLoad,
        microbatches: MicrobatchPolicy,
        stats: DispatchStats,
        *,
        deadline_s: float,
        turns: PlanTurns | None = None,
    ) -> None:
        self.chosen: Counter[int] = Counter()
        self.on_loads: Callable[[int, LoadsOfRound], None] = lambda waiting, loads: None
        self.on_measured: Callable[[Decision], None] = lambda decision: None
        self.steps = 0
        self._executor = executor
        self._mesh = mesh
        self._load = load
        self._microbatches = microbatches
        self._stats = stats
        self._deadline_s = deadline_s
        self._turns = turns
        self._agreed: Decision | None = None
        self._begun = False
        self._unshown = False  # what the last step left: a round without a step shows it
        self._leaving = False
        self._told_leaving = False  # whether the last record said so
        self._over = False
        self._lost: UnavailableError | None = None
        self._posted = 0
        self._last = RankReport()
        # Shape and microbatches of steps whose measures are still to come, by number.
        self._unmeasured: dict[int, tuple[StepShape, int]] = {}
        self._steps_at_post = 0

    def run(self, plan: StepPlan) -> StepResult | None:
        """The rank's part of the next step; None where the ranks agreed that there is none."""
        if self._lost is not None:
            raise self._lost
        try:
            return self._run(plan)
        except Exception as error:
            self._lost = lost = _as_unavailable(error, self._mesh.rank)
            self._mesh.fail(lost.message, getattr(error, "ranks", (self._mesh.rank,)))
            if lost is error:
                raise
            raise lost from error

    @property
    def due(self) -> bool:
        return (
            self._begun
            or self._agreed is not None
            or self._unshown
            or self._leaving != self._told_leaving
            or self._load.queued() > 0
        )

    def rest(self, timeout_s: float) -> None:
        self._raise_loss()
        pending = self._turns is not None and self._turns.prepared != 0
        if not self._load.queued():
            self._begun = self._mesh.wait_begun(PENDING_S if pending else timeout_s) or pending
        self._raise_loss()

    def wake(self) -> None:
        self._mesh.wake()

    def leave(self) -> bool:
        self._leaving = True
        return self._over or self._lost is not None

    def next_round(self) -> int:
        """The first round whose records show what the scheduler is given from now on."""
        return self._posted + 1

    def _raise_loss(self) -> None:
        if self._lost is not None:
            raise self._lost
        if (alarm := self._mesh.alarm()) is not None:
            raise alarm
        if self._mesh.ended and not self._over:
            raise UnavailableError("the run has ended")

    def _run(self, plan: StepPlan) -> StepResult | None:
        decision, self._agreed, self._begun, self._unshown = self._agreed, None, False, False
        if decision is None:
            self._post(lambda report: _as_planned(report, plan))
            decision = self._take_round()
        if not decision.run:
            assert not plan.chunks, "a rank with requests wants a step"
            return None
        self._post()
        count = self._microbatches.choose(decision.shape)
        result = self._measured(plan, count)
        self.steps += 1
        self.chosen[count] += 1
        self._unmeasured[self.steps] = decision.shape, count
        following = self._take_round()
        self._agreed = following if following.run else None
        self._unshown = not following.run
        return result

    def _measured(self, plan: StepPlan, count: int) -> StepResult:
        waited, came = self._stats.waited_s, self._stats.came
        began = time.perf_counter()
        result = self._executor.run(plan, count)
        self._last = RankReport(
            seconds=time.perf_counter() - began,
            waited=self._stats.waited_s - waited,
            ran=plan.num_tokens,
            came=self._stats.came - came,
        )
        return result

    def _post(self, amend: Callable[[RankReport], RankReport] = lambda report: report) -> None:
        last = self._last
        # Before the report: what comes in between may be in it, and is said to be in the next one.
        self._posted += 1
        record = replace(
            amend(self._load.report()),
            prepared=0 if self._turns is None else self._turns.promise(),
            leaving=self._leaving,
            seconds=last.seconds,
            waited=last.waited,
            ran=last.ran,
            came=last.came,
        )
        self._steps_at_post = self.steps
        self._told_leaving = record.leaving
        self._mesh.post(record.pack())

    def _take_round(self) -> Decision:
        """The round that was posted; on all ranks this concludes the same."""
        records = self._mesh.collect(self._deadline_s)
        decision = decide(records)
        self._over |= decision.over
        measured = self._unmeasured.pop(self._steps_at_post, None)
        if measured is not None:
            self._microbatches.learn(*measured, decision.seconds, decision.waited)
            self.on_measured(decision)
        if self._turns is not None:
            self._turns.settle(decision.turn)
        self.on_loads(decision.waiting, partial(loads_of, records, self._posted))
        return decision


def _as_planned(load: RankReport, plan: StepPlan) -> RankReport:
    """Where nothing was foreseen: what the plan has now."""
    decode = all(len(chunk.token_ids) == 1 for chunk in plan.chunks)
    work = bool(plan.chunks) or load.queued > 0
    return replace(load, work=work, decode=decode, tokens=plan.num_tokens)


def _as_unavailable(error: Exception, rank: int) -> UnavailableError:
    if isinstance(error, UnavailableError):
        return error
    return UnavailableError(f"rank {rank} fell out of step ({type(error).__name__}: {error})")
