"""The verbs of ``moeserve place``: parsed arguments in, the object that ``--json`` prints out."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from moeserve.errors import PlacementError
from moeserve.placement import fitted as known
from moeserve.placement import plan as plans
from moeserve.placement import plot as drawn
from moeserve.placement import tables
from moeserve.placement.baselines import baselines
from moeserve.placement.cluster import Cluster, Dataflow, Phase
from moeserve.placement.cluster_arguments import plan_cluster
from moeserve.placement.formats import routing_files, runtimes
from moeserve.placement.judged import judged
from moeserve.placement.plan import Plan
from moeserve.placement.problem import Moves, Problem, check
from moeserve.placement.report import BoundEffort, CopyBytes, check_fits
from moeserve.placement.routing import Routing, split
from moeserve.placement.solvers.portfolio import Budget, Progress, Solver
from moeserve.placement.solvers.portfolio import solve as find
from moeserve.placement.solvers.robust import solve_asked

SHOW_AFTER = 2.0  # seconds of silence before a progress bar appears


def record(arguments: argparse.Namespace) -> dict[str, Any]:
    from safetensors.numpy import save

    routing = _read(arguments)
    if not routing.has_tokens:
        raise PlacementError("record needs per-token routing; counts can be used as they are")
    domain_C = [
        np.full(len(w.lengths), i) if w.domain_C is None else w.domain_C
        for i, w in enumerate(routing.workloads)
    ]
    names = [w.name for w in routing.workloads]
    raw = save(
        {
            "topk_ids": routing.tokens_TLK.astype(np.int16),
            "seq_lens": routing.seq_lens_C,
            "domain_ids": np.concatenate(domain_C).astype(np.int64),
        },
        metadata={
            "format": "moeserve.routing.v1",
            "moe_layers": json.dumps(routing.moe_layers),
            "num_experts": str(routing.num_experts),
            "domains": json.dumps(names),
        },
    )
    _write_bytes(Path(arguments.out), raw)
    return {
        "out": arguments.out,
        "tokens": len(routing.tokens_TLK),
        "sequences": len(routing.seq_lens_C),
        "layers": routing.num_layers,
        "experts": routing.num_experts,
    }


def solve(arguments: argparse.Namespace) -> dict[str, Any]:
    routing = _read(arguments)
    problem = _problem(arguments, routing)
    if arguments.previous is not None:
        problem = replace(problem, moves=_moves(arguments))
    fitted, held = split(routing, arguments.held_out)
    budget = Budget(arguments.time_limit, arguments.threads, arguments.seed, branch=True)
    began = time.monotonic()
    solver, beside = Solver(arguments.solver), baselines(problem, fitted)
    with _progress(arguments.json) as progress:
        solved = solve_asked(
            problem, fitted, held, solver, budget, progress, rates=arguments.rates, beside=beside
        )
    plan, seconds = solved.plan, time.monotonic() - began
    result = _figures(plan, routing, problem.cluster, arguments)
    result["seconds"] = seconds
    result["solver"] = arguments.solver
    result["time_limit"] = arguments.time_limit
    result["plan"] = plan.outline()
    result["judged_on"] = known.BOTH if held is not None else known.FITTED
    result["fitted_on"] = known.record(routing, arguments.held_out)
    if solved.bound_L is not None:
        result["fitted"] = judged(
            plan, fitted, problem.cluster, batch=arguments.batch, bound_L=solved.bound_L,
            rates=arguments.rates,
        )  # fmt: skip
    result |= _parts(plan, result.get("fitted") or fitted, held, problem.cluster, arguments)
    result["baselines"] = _beside(beside, fitted, held, problem.cluster, arguments)
    result["chosen"] = solved.chosen
    if solved.frontier is not None:
        result["frontier"] = asdict(solved.frontier)
    if problem.moves is not None:
        result["moved_experts"] = plans.moved_slots(problem.moves.previous, plan)
    plans.write_whole(Path(arguments.out), plans.dump(replace(plan, figures=result)))
    return result | {"out": arguments.out}


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    plan = plans.load(Path(arguments.plan))
    if arguments.dataflow is not None:
        plan = replace(plan, dataflow=Dataflow(arguments.dataflow))
    routing = _read_for(plan, arguments)
    cluster = plan_cluster(plan, arguments)
    began = time.monotonic()
    result = _figures(plan, routing, cluster, arguments)
    result["seconds"] = time.monotonic() - began
    result["plan"] = plan.outline()
    parts = known.judge(plan, routing)
    result["judged_on"] = parts.kind
    if parts.kind == known.BOTH:
        result |= _parts(plan, parts.fitted, parts.held_out, cluster, arguments)
    return result


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    routing = _read(arguments)
    problem = _problem(arguments, routing)
    fitted, held = split(routing, arguments.held_out)
    budget = Budget(arguments.time_limit, arguments.threads, arguments.seed)
    check(problem, routing)
    rows, refused = {}, {}
    for name in arguments.solvers:
        began = time.monotonic()
        try:
            with _progress(arguments.json) as progress:
                plan = find(problem, fitted, Solver(name), budget, progress)
        except PlacementError as cause:
            refused[name] = cause.message
            continue
        seconds = time.monotonic() - began
        row = _figures(plan, held or fitted, problem.cluster, arguments)
        rows[name] = row | {"seconds": seconds}
        if held is not None:
            rows[name] |= _parts(plan, fitted, None, problem.cluster, arguments)
    return {
        "evaluated_on": "held out" if held else "all",
        "judged_on": known.HELD_OUT if held else known.FITTED,
        "solvers": rows,
        "refused": refused,
    }


def export(arguments: argparse.Namespace) -> dict[str, Any]:
    path, out = Path(arguments.plan), Path(arguments.out)
    if arguments.importing:
        if arguments.experts is None or arguments.devices is None:
            raise PlacementError("--import needs --experts and --devices: the file lacks them")
        plan = runtimes.load(
            path,
            arguments.format,
            num_experts=arguments.experts,
            num_devices=arguments.devices,
            num_nodes=arguments.nodes,
            moe_layers=None if arguments.layers is None else tuple(arguments.layers),
        )
        plans.write_whole(out, plans.dump(plan))
    else:
        plan = plans.load(path)
        plans.write_whole(out, runtimes.export(plan, arguments.format))
    return {"out": arguments.out, "layers": plan.num_layers, "slots": plan.num_slots}


def plot(arguments: argparse.Namespace) -> dict[str, Any]:
    plan = plans.load(Path(arguments.plan))
    routing = _read_for(plan, arguments)
    options = drawn.PlotOptions(
        arguments.layer,
        arguments.batch,
        arguments.homes,
        CopyBytes(arguments.dispatch_bytes, arguments.combine_bytes),
        arguments.rates,
    )
    cluster = plan_cluster(plan, arguments)
    report = drawn.report_of(plan, Path(arguments.plan).name, routing, cluster, options)
    return {"out": str(drawn.write(Path(arguments.out), report))}


def show(verb: str, result: dict[str, Any]) -> None:
    """The result for people."""
    tables.show(verb, result)


def _read(arguments: argparse.Namespace) -> Routing:
    return routing_files.read_all(arguments.routing, num_experts=arguments.experts)


def _read_for(plan: Plan, arguments: argparse.Namespace) -> Routing:
    """Files that do not say how many experts there are know only of those that they name."""
    routing = _read(arguments)
    if arguments.experts is None and routing.num_experts < plan.num_experts and routing.has_tokens:
        arguments.experts = plan.num_experts
        routing = _read(arguments)
    check_fits(plan, routing)
    return routing


def _parts(
    plan: Plan,
    fitted: Routing | dict[str, Any] | None,
    held: Routing | None,
    cluster: Cluster,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Figures on what was fitted (or those, where they are known) and on what was held out."""
    quick = replace(_effort(arguments), seconds=0.0)
    parts = {}
    for name, part in ((known.FITTED, fitted), (known.HELD_OUT, held)):
        if isinstance(part, Routing):
            parts[name] = _figures(plan, part, cluster, arguments, quick)
        elif part is not None:
            parts[name] = part
    return parts


def _beside(
    plans: Mapping[str, Plan | str],
    fitted: Routing,
    held: Routing | None,
    cluster: Cluster,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    return {
        name: {"refused": plan}
        if isinstance(plan, str)
        else _parts(plan, fitted, held, cluster, arguments)
        for name, plan in plans.items()
    }


def _pairs(texts: Sequence[str], option: str) -> tuple[tuple[int, int], ...]:
    pairs = []
    for text in texts:
        try:
            a, b = text.split(",")
            pairs.append((int(a), int(b)))
        except ValueError as cause:
            raise PlacementError(f"{option} {text!r}: expected two experts, as in 3,17") from cause
    return tuple(pairs)


def _problem(arguments: argparse.Namespace, routing: Routing) -> Problem:
    cluster = Cluster(
        arguments.devices,
        arguments.nodes,
        arguments.node_ratio,
        tuple(arguments.speeds),
        arguments.memory,
    )
    if cluster.memory and not arguments.expert_bytes and arguments.topology is None:
        raise PlacementError("--memory needs --expert-bytes, to know what a slot takes")
    return Problem(
        cluster,
        routing.num_experts if arguments.slots is None else arguments.slots,
        Dataflow(arguments.dataflow),
        Phase(arguments.phase),
        arguments.max_imbalance,
        arguments.max_workload_imbalance,
        arguments.batch,
        arguments.expert_bytes,
        _pairs(arguments.apart, "--apart"),
        _pairs(arguments.together, "--together"),
        groups=arguments.groups,
    )


def _moves(arguments: argparse.Namespace) -> Moves:
    return Moves(
        plans.load(Path(arguments.previous)),
        arguments.expert_bytes,
        (arguments.dispatch_bytes + arguments.combine_bytes) // 2,
        arguments.horizon_tokens,
        arguments.cost_per_moved_byte,
    )


def _effort(arguments: argparse.Namespace) -> BoundEffort:
    if not arguments.bound_limit >= 0:
        raise PlacementError(f"--bound-limit {arguments.bound_limit}: must be 0 or more seconds")
    return BoundEffort(arguments.bound_limit, arguments.threads)


def _figures(
    plan: Plan,
    routing: Routing,
    cluster: Cluster,
    arguments: argparse.Namespace,
    effort: BoundEffort | None = None,
) -> dict[str, Any]:
    return judged(
        plan,
        routing,
        cluster,
        batch=arguments.batch,
        homes=arguments.homes,
        copy_bytes=CopyBytes(arguments.dispatch_bytes, arguments.combine_bytes),
        effort=effort or _effort(arguments),
        rates=arguments.rates,
    )


@contextmanager
def _progress(quiet: bool) -> Iterator[Progress]:
    """A bar on standard error for work that takes longer than two seconds."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    began = time.monotonic()
    with Bar(console=Console(stderr=True), transient=True, disable=quiet, expand=False) as bar:
        task = bar.add_task("solving", total=None, visible=False)

        def advance(stage: str, done: int, total: int) -> None:
            visible = time.monotonic() - began > SHOW_AFTER
            bar.update(task, description=stage, completed=done, total=total, visible=visible)

        yield advance


def _write_bytes(path: Path, raw: bytes) -> None:
    try:
        path.write_bytes(raw)
    except OSError as cause:
        raise PlacementError(f"cannot write {path}: {cause.strerror}") from cause
