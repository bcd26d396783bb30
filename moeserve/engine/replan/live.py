"""Plans while serving, put together on rank 0: a file read again, and re-planning by itself."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moeserve.comm.layout import plan_of
from moeserve.engine.replan.benefit import ReplanPolicy
from moeserve.engine.replan.coordinator import PlanCoordinator
from moeserve.engine.replan.replanner import Replanner, ReplanSettings, StepHistory
from moeserve.errors import PlacementError
from moeserve.placement.aside import MoveWeights, SolveSettings, solve_aside
from moeserve.placement.report import CopyBytes


@dataclass(frozen=True, slots=True)
class LivePlan:
    """``node_R`` are the nodes of the ranks. ``reread`` may be called from any thread, ``start``
    when the engine runs, ``close`` before it stops."""

    coordinator: PlanCoordinator
    node_R: Sequence[int]
    replanner: Replanner | None = None

    def start(self) -> None:
        self.coordinator.start()
        if self.replanner is not None:
            self.replanner.start()

    def reread(self, file: Path) -> None:
        """Change to the plan in ``file``; the log says why not, where it cannot be."""
        plan = self.coordinator.plan
        try:
            found = plan_of(file, plan.moe_layers, plan.num_experts, self.node_R)
        except PlacementError as error:
            logging.getLogger("moeserve.plan").error("%s", error.message)
            return
        self.coordinator.propose(found)

    def close(self) -> None:
        self.coordinator.close()  # first: the other may be waiting for it
        if self.replanner is not None:
            self.replanner.close()


def build_replanner(
    coordinator: PlanCoordinator,
    history: StepHistory,
    settings: ReplanSettings,
    copy: CopyBytes,
    policy: ReplanPolicy | None = None,
) -> Replanner:
    """``history`` gets every step of all ranks from whoever runs them. What a move costs and a copy
    weighs goes to the solver too, so that it does not move what is not worth it."""
    copy_bytes = (copy.dispatch + copy.combine) // 2
    weights = MoveWeights(settings.expert_bytes, copy_bytes, settings.horizon_tokens)
    solve = partial(solve_aside, settings=SolveSettings(weights=weights))
    return Replanner(coordinator, history, settings, solve, policy)
