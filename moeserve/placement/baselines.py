"""Contiguous and EPLB placements of a problem, beside which every plan is shown."""

from __future__ import annotations

from moeserve.errors import PlacementError
from moeserve.placement.plan import Plan
from moeserve.placement.problem import Problem
from moeserve.placement.routing import Routing
from moeserve.placement.solvers.portfolio import Solver, solve

BASELINES = (Solver.CONTIGUOUS, Solver.EPLB)


def baselines(problem: Problem, fitted: Routing) -> dict[str, Plan | str]:
    """By name: the plan, or why there is none under these constraints."""
    found: dict[str, Plan | str] = {}
    for solver in BASELINES:
        try:
            found[str(solver)] = solve(problem, fitted, solver)
        except PlacementError as cause:
            found[str(solver)] = cause.message
    return found
