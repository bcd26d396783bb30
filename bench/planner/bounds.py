"""How near bounds come to plans, and plans to their bounds, by time.

CPU seconds are those of the whole process, over all threads: on a machine that others use too they
say more than the clock. A time limit is one of the clock.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from planner.cases import PlannedCase

from moeserve.placement.problem import Problem
from moeserve.placement.report import figures
from moeserve.placement.solvers.columns.certify import PlanBounds
from moeserve.placement.solvers.columns.levels import BoundedRouting
from moeserve.placement.solvers.portfolio import Budget, solve_bounded

F64 = NDArray[np.float64]

GAPS = (0.10, 0.04, 0.02, 0.01)
PLAN_SECONDS = (5.0, 60.0, 600.0)
BOUND_HEADINGS = (
    "routing devices layers plan_in_cpu_s objective bound gap worst_layer proven 10_% 4_% 2_% 1_% "
    "cpu_s seconds"
)
PLAN_HEADINGS = (
    "routing devices_in_nodes limit imbalance objective bound gap proven cpu_s held_out:_imbalance "
    "copies cross-node"
)


@dataclass(frozen=True, slots=True)
class MeasuredBound:
    """``reached`` holds (CPU s, s) until the gap was at most each of GAPS; ``course`` all steps."""

    name: str
    devices: int
    max_imbalance: float
    layers: int
    plan_cpu_s: float
    objective: float
    bound: float
    gap: float
    worst_layer: float
    proven: int
    reached: dict[str, tuple[float, float] | None]
    course: list[tuple[float, float, float]]


@dataclass(frozen=True, slots=True)
class MeasuredPlan:
    name: str
    devices: int
    nodes: int
    limit_s: float
    max_imbalance: float
    cpu_s: float
    fitted: dict[str, float]
    held_out: dict[str, float]
    layers: int
    proven: int


class _Course:
    """(CPU s, s, gap) after each step that changed the gap."""

    def __init__(self, bounds: PlanBounds) -> None:
        self._bounds, self.points = bounds, list[tuple[float, float, float]]()
        self._cpu, self._began = time.process_time(), time.monotonic()

    def note(self, done: int, total: int) -> None:
        del done, total
        gap = float(self._bounds.objective_L().mean() / self._bounds.bound_L().mean() - 1)
        if not self.points or gap < self.points[-1][2]:
            cpu, now = time.process_time() - self._cpu, time.monotonic() - self._began
            self.points.append((round(cpu, 3), round(now, 3), round(gap, 6)))


def bounded(case: PlannedCase, limit: float) -> MeasuredBound:
    """A plan by grouping alone, then bounds on it for ``limit`` seconds."""
    problem = Problem(case.cluster, case.routing.num_experts, max_imbalance=case.max_imbalance)
    began = time.process_time()
    plan = solve_bounded(problem, case.routing, budget=Budget(20.0)).plan
    plan_cpu = time.process_time() - began
    on = BoundedRouting(case.routing.tokens_TLK, case.routing.token_weight_T, case.routing.mixed_LE)
    most_L = on.most_L(plan, case.cluster, case.max_imbalance)
    bounds = PlanBounds(plan, on, case.cluster, most_L)
    course = _Course(bounds)
    bounds.run(seconds=limit, nodes=1 << 60, threads=os.cpu_count() or 1, progress=course.note)
    objective_L, bound_L = bounds.objective_L(), bounds.bound_L()
    return MeasuredBound(
        case.name, case.cluster.devices, case.max_imbalance, plan.num_layers, round(plan_cpu, 2),
        float(objective_L.mean()), float(bound_L.mean()),
        float(objective_L.mean() / bound_L.mean() - 1), float((objective_L / bound_L).max() - 1),
        int((objective_L <= bound_L * (1 + 1e-9)).sum()),
        {f"{gap:.0%}": _first(course.points, gap) for gap in GAPS}, course.points,
    )  # fmt: skip


def _first(points: list[tuple[float, float, float]], gap: float) -> tuple[float, float] | None:
    return next(((cpu, now) for cpu, now, at in points if at <= gap), None)


def bound_row(m: MeasuredBound) -> tuple[object, ...]:
    reached = ["-" if at is None else f"{at[0]:.1f}" for at in m.reached.values()]
    cpu, now, _ = m.course[-1]
    return (
        m.name, m.devices, m.layers, f"{m.plan_cpu_s:.0f}", m.objective, m.bound, f"{m.gap:.2%}",
        f"{m.worst_layer:.2%}", f"{m.proven} of {m.layers}", *reached, f"{cpu:.0f}", f"{now:.0f}",
    )  # fmt: skip


def planned(case: PlannedCase, seconds: float) -> MeasuredPlan:
    problem = Problem(case.cluster, case.routing.num_experts, max_imbalance=case.max_imbalance)
    began = time.process_time()
    solved = solve_bounded(problem, case.routing, budget=Budget(seconds, branch=True))
    cpu = time.process_time() - began
    assert case.held is not None
    fitted = figures(solved.plan, case.routing, case.cluster, bound_L=solved.bound_L)
    held = figures(solved.plan, case.held, case.cluster)
    return MeasuredPlan(
        case.name, case.cluster.devices, case.cluster.nodes, seconds, case.max_imbalance,
        round(cpu, 2), _briefly(fitted), _briefly(held), solved.plan.num_layers,
        fitted["layers_proven"],
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
        m.name, f"{m.devices} in {m.nodes}", f"{m.limit_s:.0f}", fitted["imbalance"],
        fitted["objective"], fitted["bound"], f"{fitted['gap']:.2%}", f"{m.proven} of {m.layers}",
        f"{m.cpu_s:.0f}", held["imbalance"], held["copies"], held["cross_node_copies"],
    )  # fmt: skip


def add_to(path: Path, found: dict[str, object]) -> None:
    """Into the file, beside what it holds of other kinds."""
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | found, indent=1) + "\n")
