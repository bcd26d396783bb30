"""Plans while serving, put together on rank 0: a file read again, and re-planning by itself."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moeserve.comm.layout import plan_of
from moeserve.engine.loop import EngineObserver
from moeserve.engine.ranks.leader import DistributedExecutor
from moeserve.engine.replan.benefit import ReplanPolicy
from moeserve.engine.replan.coordinator import PlanCoordinator
from moeserve.engine.replan.replanner import Replanner, ReplanSettings, StepHistory
from moeserve.errors import PlacementError
from moeserve.placement.aside import MoveWeights, SolveSettings, solve_aside
from moeserve.placement.report import CopyBytes


@dataclass(frozen=True, slots=True)
class LivePlan:
    """``node_R`` are the nodes of the ranks. ``reread`` may be called from any thread, ``close``
    before the engine stops."""

    coordinator: PlanCoordinator
    node_R: Sequence[int]
    replanner: Replanner | None = None

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
        if self.replanner is not None:
            self.replanner.close()


def build_replanner(
    coordinator: PlanCoordinator,
    ranks: DistributedExecutor,
    observer: EngineObserver,
    settings: ReplanSettings,
    copy: CopyBytes,
    policy: ReplanPolicy | None = None,
) -> tuple[Replanner, StepHistory]:
    """The second is the engine's observer from now on; what a move costs and a copy weighs goes to
    the solver too, so that it does not move what is not worth it."""
    history = StepHistory(observer, ranks.work)
    copy_bytes = (copy.dispatch + copy.combine) // 2
    weights = MoveWeights(settings.expert_bytes, copy_bytes, settings.horizon_tokens)
    solve = partial(solve_aside, settings=SolveSettings(weights=weights))
    return Replanner(coordinator, history, settings, solve, policy), history
