"""Plans for the ranks that replay a recording, each from the half that is not replayed, as
`moeserve place solve` makes them.

Counts know no token: what needs some (MoETuner) gets drawn ones, all others the counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from expert_parallel.recorded import Recording

from moeserve.placement.cluster import Cluster
from moeserve.placement.plan import Plan
from moeserve.placement.problem import Problem
from moeserve.placement.routing import split
from moeserve.placement.solvers.portfolio import Budget, Solver
from moeserve.placement.solvers.robust import solve_asked

BASE = "contiguous"
HELD_OUT = 0.1  # of the half, as `moeserve place solve` does


@dataclass(frozen=True, slots=True)
class PlanRecipe:
    """``replicas``: a quarter more slots than experts, rounded up to whole ranks."""

    solver: Solver
    replicas: bool = False

    @property
    def ours(self) -> bool:
        return self.solver is Solver.AUTO


RECIPES: Mapping[str, PlanRecipe] = {
    BASE: PlanRecipe(Solver.CONTIGUOUS),
    "EPLB": PlanRecipe(Solver.EPLB),
    "EPLB, replicas": PlanRecipe(Solver.EPLB, replicas=True),
    "MoETuner": PlanRecipe(Solver.MOETUNER),
    "solved": PlanRecipe(Solver.AUTO),
    "solved, replicas": PlanRecipe(Solver.AUTO, replicas=True),
}


def solve_plans(
    recording: Recording,
    cluster: Cluster,
    balance: float,
    seconds: float,
    say: Callable[[str], None],
) -> dict[str, Plan]:
    """By name; ``balance`` is the most that max over mean load may be where it is traded for
    copies, ``seconds`` are for each."""
    experts, ranks = recording.num_experts, cluster.devices
    plans = {}
    for name, recipe in RECIPES.items():
        say(f"{recording.source.name}: plan {name}")
        wanted = experts + experts // 4 if recipe.replicas else experts
        problem = Problem(cluster, -(-wanted // ranks) * ranks, max_imbalance=balance)
        tokens = recipe.solver is Solver.MOETUNER
        routing = recording.fitted_tokens if tokens else recording.fitted
        fitted, held = split(routing, HELD_OUT)
        plans[name] = solve_asked(problem, fitted, held, recipe.solver, Budget(seconds)).plan
    return plans
