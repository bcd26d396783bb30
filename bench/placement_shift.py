"""Plans on traffic of a domain that nobody fitted: ``placement.py --only shift``.

Each domain of a trace is left out in turn and plans are fitted on the others (where one other is
left, on that one). ``before`` is the annealed portfolio with its own load limits and no look at
what is left out; ``now`` chooses its caution on parts of what it is fitted on. No clock decides
anything, so that rows are the same on any machine.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from moeserve.placement.cluster import Cluster
from moeserve.placement.plan import Plan
from moeserve.placement.problem import Problem
from moeserve.placement.routing import Routing
from moeserve.placement.solvers.portfolio import Budget, Solver, solve
from moeserve.placement.solvers.robust import solve_robust
from moeserve.placement.step_time import PlacementRates, step_figures

DEVICES = (4, 8, 16)
SWAPS = 400  # tried per slot
ALLOWED = 1.05  # beside experts in order, on what is left out
NOW = "now"


@dataclass(frozen=True, slots=True)
class ShiftRow:
    """``imbalance`` is max/mean load, mean over layers, ``copies`` per token-layer out and back,
    both on the domain that was left out; ``cpu_s`` of finding the plan. ``kept`` is the part of the
    copies which ``before`` saves that this plan saves too; ``unevenness`` its imbalance beside that
    of experts in order."""

    trace: str
    devices: int
    left_out: str
    plan: str
    imbalance: float
    copies: float
    step: float
    unevenness: float
    kept: float
    cpu_s: float
    chosen: str = ""


def found_plans(problem: Problem, seen: Routing) -> Iterator[tuple[str, Plan, str, float]]:
    """(name, plan, what was chosen, CPU seconds)."""
    budget = Budget(seconds=None, threads=1, swaps=SWAPS)
    for name, solver in (
        ("in order", Solver.CONTIGUOUS), ("EPLB", Solver.EPLB), ("before", Solver.AUTO),
    ):  # fmt: skip
        began = time.process_time()
        plan = solve(problem, seen, solver, budget)
        yield name, plan, "", time.process_time() - began
    began = time.process_time()
    found = solve_robust(replace(problem, max_imbalance=ALLOWED), seen, None, budget=budget)
    yield NOW, found.plan, found.chosen, time.process_time() - began


def shift_rows(trace: str, whole: Routing, devices: int) -> Iterator[ShiftRow]:
    problem = Problem(Cluster(devices), whole.num_experts)
    for i, left_out in enumerate(whole.workloads):
        seen = Routing(whole.workloads[:i] + whole.workloads[i + 1 :], whole.moe_layers)
        unseen = Routing((left_out,), whole.moe_layers)
        plans = list(found_plans(problem, seen))
        rates = PlacementRates()
        found = [step_figures(plan, unseen, problem.cluster, rates) for _, plan, _, _ in plans]
        copies = [f.copies or 0.0 for f in found]
        saved = copies[0] - copies[2]
        for (name, _, chosen, cpu_s), f, own in zip(plans, found, copies, strict=True):
            yield ShiftRow(
                trace, devices, Path(left_out.name).stem, name, f.imbalance, own, f.step,
                f.imbalance / found[0].imbalance, (copies[0] - own) / saved, cpu_s, chosen,
            )  # fmt: skip


def write_rows(rows: list[ShiftRow], path: Path) -> None:
    """Into the object of ``path``, beside what other benches put there."""
    known = json.loads(path.read_text()) if path.exists() else {}
    known["shift"] = {"swaps": SWAPS, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(known, indent=1) + "\n")
