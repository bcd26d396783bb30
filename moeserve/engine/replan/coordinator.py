"""Plans on rank 0: a proposal becomes orders that ride on steps, and what came of it is logged.

``propose`` may be called from any thread; everything else belongs to the thread that runs steps.
Rank 0 is a rank too, and its ``ExpertSwapper`` is driven here.
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
    """A ``leader.LeaderNotes``; ``changes`` are those that ended."""

    def __init__(
        self, plan: Plan, swapper: ExpertSwapper, counters: Counters | None = None
    ) -> None:
        self.changes: list[PlanChange] = []
        self.counts: dict[int, Mapping[str, Any]] = {}
        self._switch = PlanSwitch(rows_of(plan), plan.num_devices)
        self._plan = plan
        self._swapper = swapper
        self._counters = counters or Counters()
        self._world = plan.num_devices
        self._lock = threading.Lock()
        self._proposed: Plan | None = None
        self._asking = False
        self._log = logging.getLogger("moeserve.plan")

    @property
    def plan(self) -> Plan:
        """What is in use, which may be a mixture while a change is under way."""
        return plan_of_rows(self._plan, self._switch.rows)

    @property
    def changing(self) -> bool:
        change = self._switch.change
        return self._proposed is not None or (change is not None and not change.finished)

    @property
    def pending(self) -> bool:
        return self.changing or self._asking or self._switch.ready

    def propose(self, plan: Plan) -> None:
        """Taken up before the next step. PlacementError as ``comm.layout.check`` has it is the
        caller's to raise; a plan that ranks cannot change to is refused in the log."""
        with self._lock:
            self._proposed = plan

    def ask(self) -> None:
        """All ranks are to say what they have counted since they were last asked: ``counts``."""
        with self._lock:
            self.counts = {}
            self._asking = True

    def outgoing(self) -> dict[int, bytes]:
        self._take_up()
        told: dict[str, Any] = {}
        order = self._switch.order()
        if order is not None:
            told["order"] = asdict(order)
        with self._lock:
            if self._asking:
                told["count"] = True
        if not told:
            self._collect()
            return {}
        note = json.dumps(told).encode()
        self._swapper.receive(note)
        self._collect()
        return dict.fromkeys(range(1, self._world), note)

    def collect(self, rank: int, note: bytes) -> None:
        said = json.loads(note)
        for report in said.get("reports", ()):
            self._switch.report(rank, PlanReport(**report))
        if "counts" in said:
            with self._lock:
                self.counts[rank] = said["counts"]
                self._asking &= len(self.counts) < self._world
        self._conclude(self._switch.change)

    def close(self) -> None:
        self._swapper.close()

    def _collect(self) -> None:
        note = self._swapper.reply()
        if note:
            self.collect(0, note)

    def _take_up(self) -> None:
        with self._lock:
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
        if change is None or not change.finished or any(change is c for c in self.changes):
            return
        self.changes.append(change)
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
