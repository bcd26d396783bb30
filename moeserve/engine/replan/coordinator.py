"""Plans on rank 0: a proposed plan comes into use layer by layer, and what came of it is logged.

A thread of its own asks all ranks over ``PlanPeers``; nothing of it is on a step's path. One layer
is on its way at a time (``switch`` has the protocol): all ranks prepare it, the records of a step
switch it, then each says how long that held it up. Rank 0 is a rank too, and what became of a layer
its own part knows first.

Where a rank cannot prepare a layer, does not answer, or another plan is proposed meanwhile, the
rest of the change is abandoned; what has been switched stays. One lock, released while anything is
waited for; futures come in on whatever thread completes them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from moeserve.core import Counters
from moeserve.engine.replan.messages import PlanOrder, PlanReport
from moeserve.engine.replan.peers import Answers, PlanPeers
from moeserve.engine.replan.switch import Rows, layers_to_change
from moeserve.errors import LateRankError, PlacementError, UnavailableError
from moeserve.placement.plan import Plan


class OwnPart(Protocol):
    """Rank 0's ``ExpertSwapper``, of which this is asked by calls, at once."""

    def abandon(self, turn: int) -> None: ...

    def switched(self, turn: int) -> Future[PlanReport]: ...


@dataclass(frozen=True, slots=True)
class PlanDeadlines:
    """How long ranks may take: to prepare a layer; until a step switches it, or has decided about
    it when it is abandoned; and to say how long the switch took."""

    prepare_s: float = 600.0
    settle_s: float = 600.0
    answer_s: float = 30.0


@dataclass(frozen=True, slots=True)
class PlanChange:
    """How a change went. ``pause_s`` is the longest that a switch held up a rank, ``paused_s`` the
    sum over layers of the slowest rank's, as is ``prepare_s``; ``bytes_read`` are of all ranks.
    With an ``error`` not all layers were switched, and that says why."""

    layers: int
    switched: int = 0
    bytes_read: int = 0
    prepare_s: float = 0.0
    pause_s: float = 0.0
    paused_s: float = 0.0
    error: str = ""


class PlanCoordinator:
    """``start`` it, ``close`` it before the ranks' last step; all else is for any thread."""

    def __init__(
        self,
        plan: Plan,
        peers: PlanPeers,
        own: OwnPart,
        counters: Counters | None = None,
        deadlines: PlanDeadlines | None = None,
    ) -> None:
        assert peers.world == plan.num_devices, (peers.world, plan.num_devices)
        self._like = plan
        self._peers = peers
        self._own = own
        self._counters = counters or Counters()
        self._deadlines = deadlines or PlanDeadlines()
        self._turn = 0  # of the coordinator's thread alone
        self._changed = threading.Condition()  # of everything below
        self._rows: dict[int, tuple[int, ...]] = dict(rows_of(plan))
        self._changes: list[PlanChange] = []
        self._counts: dict[int, Mapping[str, Any]] = {}
        self._proposed: Plan | None = None
        self._changing = False
        self._pending = False
        self._ends = ""  # why no more changes are made
        self._thread = threading.Thread(target=self._run, name="plans", daemon=True)
        self._log = logging.getLogger("moeserve.plan")

    @property
    def plan(self) -> Plan:
        """What is in use, which may be a mixture while a change is under way."""
        with self._changed:
            rows = dict(self._rows)
        return plan_of_rows(self._like, rows)

    @property
    def changes(self) -> list[PlanChange]:
        """Those that ended, in order."""
        with self._changed:
            return list(self._changes)

    @property
    def counts(self) -> dict[int, Mapping[str, Any]]:
        """What the last ``ask`` gave."""
        with self._changed:
            return dict(self._counts)

    @property
    def changing(self) -> bool:
        """Whether a plan is proposed or on its way into use."""
        with self._changed:
            return self._proposed is not None or self._changing

    @property
    def pending(self) -> bool:
        """Whether a step is wanted though nobody has requests: a layer is prepared everywhere."""
        with self._changed:
            return self._pending

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_s: float = 30.0) -> None:
        """Abandon what is not switched, and end the thread."""
        self._end("the run ends")
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def propose(self, plan: Plan) -> None:
        """Change to ``plan``, instead of any other that is not in use yet. PlacementError as
        ``comm.layout.check`` has it is the caller's to raise; a plan that ranks cannot change to is
        refused in the log, as is one that comes when no more changes are made."""
        with self._changed:
            if self._ends:
                self._log.error("the new plan is refused: %s", self._ends)
                return
            self._proposed = plan
            self._changed.notify_all()

    def ask(self, timeout_s: float) -> dict[int, Mapping[str, Any]]:
        """By rank, what each has counted since it was last asked; not to be trusted before
        ``routing_counts.read_routing``. LateRankError names who does not answer or cannot."""
        asked = {rank: self._peers.counts(rank) for rank in range(self._peers.world)}
        answers = Answers(self._changed, asked)
        why = answers.wait(time.monotonic() + timeout_s, lambda: self._ends)
        with self._changed:
            self._counts = answers.came
            ranks, failed, ends = answers.late, answers.failed, self._ends
        if failed:
            rank = min(failed)
            raise LateRankError(f"rank {rank} gave no routing counts: {failed[rank]}", [rank])
        if ends:
            raise UnavailableError(f"no routing counts: {ends}")
        if why:
            raise LateRankError(f"ranks {ranks} gave no routing counts in {timeout_s:g} s", ranks)
        return answers.came

    def _run(self) -> None:
        try:
            while (plan := self._next()) is not None:
                self._change_to(plan)
        except Exception:  # noqa: BLE001 - the thread's last stop: serving goes on by this plan
            self._log.critical("plans cannot be changed any more", exc_info=True)
            self._end("an earlier change failed")

    def _next(self) -> Plan | None:
        """The proposed plan; None at the end."""
        with self._changed:
            self._changing = False
            self._changed.wait_for(lambda: self._ends or self._proposed is not None)
            if self._ends:
                return None
            plan, self._proposed = self._proposed, None
            self._changing = True
            return plan

    def _change_to(self, plan: Plan) -> None:
        with self._changed:
            rows = dict(self._rows)
        try:
            differing = layers_to_change(rows, rows_of(plan))
        except PlacementError as error:
            self._log.error("the new plan is refused: %s", error.message)
            return
        self._log.info("a new plan: %d of %d layers change", len(differing), len(rows))
        change = PlanChange(len(differing))
        for layer, expert_S in differing:
            change = replace(change, error=self._interrupted())
            if not change.error:
                change = self._change_layer(change, layer, expert_S)
            if change.error:
                break
        self._conclude(change)

    def _change_layer(
        self, change: PlanChange, layer: int, expert_S: tuple[int, ...]
    ) -> PlanChange:
        """The change with one more layer, or with an error."""
        # 1. All ranks prepare it, each beside its steps.
        self._turn += 1
        turn, limits = self._turn, self._deadlines
        order = PlanOrder(turn, layer, expert_S)
        prepared = self._asked({r: self._peers.prepare(r, order) for r in self._ranks})
        why = self._wait(prepared, layer, "prepare", limits.prepare_s, self._interrupted)
        reports = prepared.came.values()
        change = replace(
            change,
            bytes_read=change.bytes_read + sum(report.bytes_read for report in reports),
            prepare_s=change.prepare_s + max((report.prepare_s for report in reports), default=0.0),
        )
        own = self._asked({0: self._own.switched(turn)})
        # 2. A step switches it. An abandoned one too, where its record was made before.
        if not why:
            self._want_step(True)
            why = self._wait(own, layer, "switch", limits.settle_s, self._interrupted)
        if why:
            self._own.abandon(turn)
            self._peers.abandon(turn)
            self._wait(own, layer, "drop", limits.settle_s, lambda: self._ends)
        self._want_step(False)
        if own.late and not self._ends:
            self._end(f"no step has decided about layer {layer} for {limits.settle_s:g} s")
        if own.late or own.failed:
            return replace(change, error=why)
        with self._changed:
            self._rows[layer] = expert_S
        # 3. How long that held up each.
        return self._with_pauses(change, layer, why)

    def _with_pauses(self, change: PlanChange, layer: int, why: str) -> PlanChange:
        """The change with one more layer that was switched; ``why`` is to be its last, if any."""
        paused = self._asked({r: self._peers.switched(r, self._turn) for r in self._ranks})
        late = self._wait(paused, layer, "switch", self._deadlines.answer_s, lambda: self._ends)
        if late:
            self._log.warning("how long a switch held up ranks is not known: %s", late)
        pauses = [report.pause_s or 0.0 for report in paused.came.values()]
        change = replace(
            change,
            switched=change.switched + 1,
            pause_s=max(change.pause_s, *pauses, 0.0),
            paused_s=change.paused_s + max(pauses, default=0.0),
        )
        finished = change.switched == change.layers
        return change if finished else replace(change, error=why or late)

    @property
    def _ranks(self) -> range:
        return range(self._peers.world)

    def _asked(self, futures: Mapping[int, Future[PlanReport]]) -> Answers[PlanReport]:
        return Answers(self._changed, futures, lambda report: report.error)

    def _wait(
        self,
        answers: Answers[PlanReport],
        layer: int,
        what: str,
        timeout_s: float,
        interrupted: Callable[[], str],
    ) -> str:
        """Empty where all have answered, else why not."""
        why = answers.wait(time.monotonic() + timeout_s, interrupted)
        if not why:
            return ""
        with self._changed:
            if answers.failed:
                rank, error = next(iter(answers.failed.items()))
                return f"rank {rank}, layer {layer}: {error}"
            if stop := interrupted():
                return stop
            return f"ranks {answers.late} did not {what} layer {layer} within {timeout_s:g} s"

    def _interrupted(self) -> str:
        return self._ends or ("" if self._proposed is None else "another plan came")

    def _want_step(self, wanted: bool) -> None:
        with self._changed:
            self._pending = wanted

    def _end(self, why: str) -> None:
        with self._changed:
            self._ends = self._ends or why
            self._proposed = None
            self._changed.notify_all()

    def _conclude(self, change: PlanChange) -> None:
        """Count and log a change that has ended."""
        with self._changed:
            self._changes.append(change)
        count = self._counters
        count.plan_changes += 1
        count.plan_layers_switched += change.switched
        count.plan_bytes_read += change.bytes_read
        count.plan_paused_s += change.paused_s
        if change.error:
            self._log.warning(
                "the new plan was left after %d of %d layers (%s)",
                change.switched, change.layers, change.error,
            )  # fmt: skip
        else:
            self._log.info(
                "the new plan is in use: %d layers, %d bytes read, longest pause %.6f s",
                change.layers, change.bytes_read, change.pause_s,
            )  # fmt: skip


def rows_of(plan: Plan) -> Rows:
    return {
        layer: tuple(int(e) for e in plan.expert_LS[l]) for l, layer in enumerate(plan.moe_layers)
    }


def plan_of_rows(like: Plan, rows: Rows) -> Plan:
    expert_LS = np.array([rows[layer] for layer in like.moe_layers], np.int32)
    return Plan(
        expert_LS, like.num_experts, like.num_devices, like.num_nodes, like.moe_layers,
        like.dataflow, like.phase,
    )  # fmt: skip
