"""How near bounds come to plans, and plans to their bounds, by CPU time.

Seconds are CPU seconds of the process, which has one thread that works: on a machine that others
use too, the clock says little. A minute on two idle cores is 120 of them.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from planner.cases import PlannedCase

from moeserve.placement.plan import Plan, with_slots
from moeserve.placement.problem import Problem
from moeserve.placement.report import figures
from moeserve.placement.solvers.bounds import mean_balance_bound
from moeserve.placement.solvers.columns.certify import PlanBounds
from moeserve.placement.solvers.columns.levels import BoundedRouting
from moeserve.placement.solvers.portfolio import Budget, solve_bounded

F64 = NDArray[np.float64]

GAPS = (0.10, 0.04, 0.02, 0.01)
PLAN_SECONDS = (10.0, 120.0, 1200.0)  # 5 s, 1 min and 10 min of two cores
_WHOLE = Budget(seconds=None, threads=1)  # of grouping: as deep as is sensible
_BRIEF = Budget(seconds=None, threads=1, swaps=400)  # some 4 CPU s for 26 layers of 64
_ENOUGH = 60.0  # CPU seconds that leave time for the whole of it
BOUND_HEADINGS = "routing layers objective bound gap worst_layer proven 10_% 4_% 2_% 1_% cpu_s"
PLAN_HEADINGS = (
    "routing limit cpu_s floor imbalance objective bound gap proven held_out:_imbalance copies "
    "cross-node"
)


@dataclass(frozen=True, slots=True)
class MeasuredBound:
    """``reached`` holds the CPU seconds until the gap was at most each of GAPS, grouping
    included.
    """

    name: str
    devices: int
    max_imbalance: float
    layers: int
    limit_cpu_s: float
    objective: float
    bound: float
    gap: float
    worst_layer: float
    proven: int
    reached: dict[str, float | None]
    course: list[tuple[float, float]]
    cpu_s: float


@dataclass(frozen=True, slots=True)
class MeasuredPlan:
    """No plan of so many slots has a mean imbalance below ``balance_floor`` on what is fitted."""

    name: str
    devices: int
    nodes: int
    limit_cpu_s: float
    max_imbalance: float
    cpu_s: float
    fitted: dict[str, float]
    held_out: dict[str, float]
    layers: int
    proven: int
    balance_floor: float


class _Course:
    """(CPU s since ``began``, gap) after each step that changed the gap."""

    def __init__(self, bounds: PlanBounds, began: float) -> None:
        self._bounds, self._began = bounds, began
        self.points: list[tuple[float, float]] = []

    def note(self, done: int, total: int) -> None:
        del done, total
        gap = float(self._bounds.objective_L().mean() / self._bounds.bound_L().mean() - 1)
        if not self.points or gap < self.points[-1][1]:
            self.points.append((round(time.process_time() - self._began, 3), round(gap, 6)))


def _searched(case: PlannedCase, budget: Budget, cpu_s: float) -> tuple[Plan, PlanBounds, _Course]:
    """A plan by grouping alone, and what bounds on it came to in ``cpu_s``, grouping included."""
    began = time.process_time()
    slots = case.slots or case.routing.num_experts
    problem = Problem(case.cluster, slots, max_imbalance=case.max_imbalance)
    plan = solve_bounded(problem, case.routing, budget=budget).plan
    on = BoundedRouting(case.routing.tokens_TLK, case.routing.token_weight_T, case.routing.mixed_LE)
    most_L = on.most_L(plan, case.cluster, case.max_imbalance)
    bounds = PlanBounds(plan, on, case.cluster, most_L)
    course = _Course(bounds, began)
    left = max(0.0, cpu_s - (time.process_time() - began))
    bounds.run(seconds=left, nodes=1 << 60, cpu=True, progress=course.note)
    return plan, bounds, course


def bounded(case: PlannedCase, limit: float | None) -> MeasuredBound:
    """Within ``limit`` CPU seconds, or what the case is given."""
    began = time.process_time()
    limit = case.bound_cpu_s if limit is None else limit
    _, bounds, course = _searched(case, _WHOLE, limit)
    objective_L, bound_L = bounds.objective_L(), bounds.bound_L()
    return MeasuredBound(
        case.title, case.cluster.devices, case.max_imbalance, len(bound_L), limit,
        float(objective_L.mean()), float(bound_L.mean()),
        float(objective_L.mean() / bound_L.mean() - 1), float((objective_L / bound_L).max() - 1),
        int((objective_L <= bound_L * (1 + 1e-9)).sum()),
        {f"{gap:.0%}": _first(course.points, gap) for gap in GAPS}, course.points,
        round(time.process_time() - began, 2),
    )  # fmt: skip


def _first(points: list[tuple[float, float]], gap: float) -> float | None:
    return next((cpu for cpu, at in points if at <= gap), None)


def bound_row(m: MeasuredBound) -> tuple[object, ...]:
    reached = ["-" if at is None else f"{at:.1f}" for at in m.reached.values()]
    return (
        m.name, m.layers, m.objective, m.bound, f"{m.gap:.2%}", f"{m.worst_layer:.2%}",
        f"{m.proven} of {m.layers}", *reached, f"{m.cpu_s:.0f}",
    )  # fmt: skip


def planned(case: PlannedCase, cpu_s: float) -> MeasuredPlan:
    """A plan with the better layers of the search for bounds, where one node holds all devices."""
    began = time.process_time()
    plan, bounds, _ = _searched(case, _BRIEF if cpu_s < _ENOUGH else _WHOLE, cpu_s)
    rows = bounds.better_rows() if case.cluster.nodes == 1 else {}
    plan = with_slots(
        plan, np.stack([rows.get(l, row_S) for l, row_S in enumerate(plan.expert_LS)])
    )
    cpu = time.process_time() - began
    assert case.held is not None
    fitted = figures(plan, case.routing, case.cluster, bound_L=bounds.bound_L())
    held = figures(plan, case.held, case.cluster)
    return MeasuredPlan(
        case.title, case.cluster.devices, case.cluster.nodes, cpu_s, case.max_imbalance,
        round(cpu, 2), _briefly(fitted), _briefly(held), plan.num_layers,
        fitted["layers_proven"],
        mean_balance_bound(case.routing.mixed_LE, case.cluster.speed_D, plan.num_slots),
    )  # fmt: skip


def _briefly(report: dict[str, Any]) -> dict[str, float]:
    return {
        "imbalance": report["imbalance"]["mean"],
        "worst_imbalance": report["imbalance"]["worst"],
        "copies": report["copies_per_token_layer"],
        "cross_node_copies": report["cross_node_copies_per_token_layer"],
        "objective": report["objective"],
        "bound": report["bound"],
        "gap": report["gap"],
    }


def plan_row(m: MeasuredPlan) -> tuple[object, ...]:
    fitted, held = m.fitted, m.held_out
    return (
        m.name, f"{m.limit_cpu_s:.0f}", f"{m.cpu_s:.0f}", m.balance_floor, fitted["imbalance"],
        fitted["objective"], fitted["bound"], f"{fitted['gap']:.2%}", f"{m.proven} of {m.layers}",
        held["imbalance"], held["copies"], held["cross_node_copies"],
    )  # fmt: skip


def add_to(path: Path, kind: str, found: dict[str, object]) -> None:
    """Into the file, beside what it holds of other cases and kinds."""
    known = json.loads(path.read_text()) if path.exists() else {}
    known[kind] = known.get(kind, {}) | found
    path.write_text(json.dumps(known, indent=1) + "\n")
