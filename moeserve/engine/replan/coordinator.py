"""Plans on rank 0: a proposal becomes notes that travel with steps, and what came of it is logged.

The thread that runs steps calls ``outgoing`` and ``collect``; whoever plans calls the rest, from
any thread. One lock is held in every call, and nothing waits inside it. Rank 0 is a rank too: its
``ExpertSwapper`` gets the same notes as the others'.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from moeserve.core import Counters
from moeserve.engine.replan.swapper import ExpertSwapper
from moeserve.engine.replan.switch import PlanChange, PlanReport, PlanSwitch, Rows
from moeserve.errors import PlacementError
from moeserve.placement.plan import Plan


class PlanCoordinator:
    """A ``leader.LeaderNotes``."""

    def __init__(
        self, plan: Plan, swapper: ExpertSwapper, counters: Counters | None = None
    ) -> None:
        self._changes: list[PlanChange] = []
        self._counts: dict[int, Mapping[str, Any]] = {}
        self._switch = PlanSwitch(rows_of(plan), plan.num_devices)
        self._plan = plan
        self._swapper = swapper
        self._counters = counters or Counters()
        self._world = plan.num_devices
        self._lock = threading.RLock()  # of everything below and of the switch
        self._proposed: Plan | None = None
        self._asking = False
        self._log = logging.getLogger("moeserve.plan")

    @property
    def plan(self) -> Plan:
        """What is in use, which may be a mixture while a change is under way."""
        with self._lock:
            rows = dict(self._switch.rows)
        return plan_of_rows(self._plan, rows)

    @property
    def changes(self) -> list[PlanChange]:
        """Those that ended, in order."""
        with self._lock:
            return list(self._changes)

    @property
    def counts(self) -> dict[int, Mapping[str, Any]]:
        """By rank, what it has counted; complete when every rank has answered ``ask``."""
        with self._lock:
            return dict(self._counts)

    @property
    def changing(self) -> bool:
        """Whether a plan is proposed or on its way into use."""
        with self._lock:
            change = self._switch.change
            return self._proposed is not None or (change is not None and not change.finished)

    @property
    def pending(self) -> bool:
        """Whether notes wait for a step."""
        with self._lock:
            return self.changing or self._asking or self._switch.ready

    def propose(self, plan: Plan) -> None:
        """Taken up before the next step. PlacementError as ``comm.layout.check`` has it is the
        caller's to raise; a plan that ranks cannot change to is refused in the log."""
        with self._lock:
            self._proposed = plan

    def ask(self) -> None:
        """Ask all ranks what they have counted since they were last asked: see ``counts``."""
        with self._lock:
            self._counts = {}
            self._asking = True

    def outgoing(self) -> dict[int, bytes]:
        with self._lock:
            self._take_up()
            content: dict[str, Any] = {}
            order = self._switch.order()
            if order is not None:
                content["order"] = asdict(order)
            if self._asking:
                content["count"] = True
            note = json.dumps(content).encode()
            if content:
                self._swapper.receive(note)
            answer = self._swapper.reply()
            if answer:
                self.collect(0, answer)
            return dict.fromkeys(range(1, self._world), note) if content else {}

    def collect(self, rank: int, note: bytes) -> None:
        answer = json.loads(note)
        with self._lock:
            for report in answer.get("reports", ()):
                self._switch.report(rank, PlanReport(**report))
            if "counts" in answer:
                self._counts[rank] = answer["counts"]
                self._asking &= len(self._counts) < self._world
            self._conclude(self._switch.change)

    def _take_up(self) -> None:
        plan, self._proposed = self._proposed, None
        if plan is None:
            return
        before = self._switch.change
        try:
            layers = self._switch.propose(rows_of(plan))
        except PlacementError as error:
            self._log.error("the new plan is refused: %s", error.message)
            return
        self._log.info("a new plan: %d of %d layers change", layers, len(self._switch.rows))
        self._conclude(before)
        self._conclude(self._switch.change)

    def _conclude(self, change: PlanChange | None) -> None:
        """Log a change that has ended, once."""
        if change is None or not change.finished or any(change is c for c in self._changes):
            return
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
