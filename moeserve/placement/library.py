"""The planner from Python: five functions, without torch. ``moeserve.placement`` has their names.

``docs/planner_library.md`` shows them at work. What is wrong with an input is a PlacementError, as
on the command line. Figures are those of ``report``, by the kind of routing they are judged on:
``fitted``, ``held_out``, or ``unknown`` where a plan does not say what it was fitted on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from enum import StrEnum
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from moeserve.errors import PlacementError
from moeserve.placement import fitted as known
from moeserve.placement import plan as plans
from moeserve.placement.cluster import Cluster, Dataflow, Phase
from moeserve.placement.formats import routing_files, runtimes
from moeserve.placement.judged import judged
from moeserve.placement.plan import Plan
from moeserve.placement.problem import Problem
from moeserve.placement.report import CopyBytes, check_fits, figures
from moeserve.placement.routing import Routing, split
from moeserve.placement.solvers.portfolio import Budget, Solver
from moeserve.placement.solvers.robust import solve_asked
from moeserve.placement.step_time import PlacementRates

File = str | PathLike[str]
OWN_FORMAT = "moeserve"
Choice = TypeVar("Choice", bound=StrEnum)


def load_routing(*files: File, experts: int | None = None) -> Routing:
    """Read recorded or counted routing: one workload or more for each file.

    ``files`` end in .npz, .safetensors, .json or .pt; ``FILE:weight=2`` weighs one. ``experts`` is
    how many a layer has, where the files do not say and the last ones may not have been used.
    """
    return routing_files.read_all([str(file) for file in files], num_experts=experts)


def solve(
    routing: Routing,
    cluster: Cluster,
    *,
    slots: int | None = None,
    dataflow: str = "home-dedup",
    phase: str = "prefill",
    solver: str = "auto",
    held_out: float = 0.1,
    budget: Budget | None = None,
    rates: PlacementRates | None = None,
) -> Plan:
    """Find a plan for ``routing`` on ``cluster``.

    ``slots`` above the number of experts (the default) adds copies. A share ``held_out`` of each
    trace's sequences is not fitted on; the plan remembers which, for ``evaluate``. ``budget`` is
    seconds, threads and seed (60 s on two threads; ``Budget(seconds=None)`` looks at no clock).
    Copies are traded against balance by ``rates``; ``step_time.rates_of`` makes them of a topology.
    """
    problem = Problem(
        cluster,
        routing.num_experts if slots is None else slots,
        _choice(Dataflow, dataflow),
        _choice(Phase, phase),
    )
    seen, held = split(routing, held_out)
    budget = replace(budget or Budget(), branch=True)
    said: dict[str, Any] = {"fitted_on": known.record(routing, held_out)}
    solved = solve_asked(problem, seen, held, _choice(Solver, solver), budget, rates=rates)
    said["chosen"] = solved.chosen
    if solved.frontier is not None:
        said["frontier"] = asdict(solved.frontier)
    said["fitted"] = figures(solved.plan, seen, cluster, bound_L=solved.bound_L)
    return replace(solved.plan, figures=said)


def evaluate(
    plan: Plan | File,
    routing: Routing,
    cluster: Cluster | None = None,
    *,
    batch: int = 256,
    copy_bytes: CopyBytes | None = None,
    rates: PlacementRates | None = None,
) -> dict[str, dict[str, Any]]:
    """Figures of a plan, or of the file that holds one, on each kind of ``routing``.

    ``cluster`` gives rates and speeds (default: alike devices, nine times dearer across nodes),
    ``batch`` the tokens of a decode step, ``copy_bytes`` what a copy weighs, for bytes by class of
    link, ``rates`` what the predicted step is made of.
    """
    plan = plan if isinstance(plan, Plan) else plans.load(Path(plan))
    check_fits(plan, routing)
    cluster = cluster or Cluster(plan.num_devices, plan.num_nodes)
    parts = known.judge(plan, routing).parts(routing)
    return {
        kind: judged(plan, part, cluster, batch=batch, copy_bytes=copy_bytes, rates=rates)
        for kind, part in parts.items()
    }


def compare(
    routing: Routing,
    cluster: Cluster,
    solvers: Sequence[str] = ("contiguous", "eplb", "auto"),
    *,
    slots: int | None = None,
    dataflow: str = "home-dedup",
    held_out: float = 0.5,
    budget: Budget | None = None,
) -> dict[str, dict[str, Any]]:
    """``evaluate`` of a plan from each of ``solvers``; ``{"refused": why}`` of one that cannot run.

    Budgets, dataflows and slots as in ``solve``, for each solver. Nothing that can run is an error.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in solvers:
        try:
            plan = solve(
                routing,
                cluster,
                slots=slots,
                dataflow=dataflow,
                solver=name,
                held_out=held_out,
                budget=budget,
            )
        except PlacementError as cause:
            found[name] = {"refused": cause.message}
        else:
            found[name] = evaluate(plan, routing, cluster)
    if found and all("refused" in parts for parts in found.values()):
        raise PlacementError(next(iter(found.values()))["refused"])
    return found


def export(plan: Plan, path: File, form: str = OWN_FORMAT) -> Path:
    """Write a plan for a runtime; all of the file or none of it.

    ``form`` is ours, or one of ``formats.runtimes.FORMATS``: sglang, vllm, ascend, tensorrt,
    lightllm, eplb. What the other format cannot say is refused.
    """
    text = plans.dump(plan) if form == OWN_FORMAT else runtimes.export(plan, form)
    plans.write_whole(Path(path), text)
    return Path(path)


def _choice(kind: type[Choice], value: str) -> Choice:
    try:
        return kind(value)
    except ValueError as cause:
        among = ", ".join(str(member) for member in kind)
        raise PlacementError(f"{value!r}: expected one of {among}") from cause
