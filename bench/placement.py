"""Placement, measured: half of the sequences fit a plan, the other half evaluate it.

    python bench/placement.py --data FOLDER [--only balance drift copies exact scale table
        bounds plans shift] [--json bench/results/placement_bounds.json]

FOLDER holds ``deepseek_v3_loads/*.json`` (``logical_count``), ``deepseek_v2_lite/*.npz`` and
``gpt_oss_20b/*.npz`` (``topk_ids`` [tokens, layers, k], ``seq_lens``); what is absent is left out.
Exact methods and sizes without public traces use synthetic routing, drawn here. Times are of a
shared machine; quality does not depend on it, except through ``--time-limit``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from placement_shift import DEVICES, ShiftRow, shift_rows, write_rows
from planner.bounds import (
    BOUND_HEADINGS,
    PLAN_HEADINGS,
    PLAN_SECONDS,
    add_to,
    bound_row,
    bounded,
    plan_row,
    planned,
)
from planner.cases import recorded_cases, single_layers, synthetic, traces
from rich.console import Console
from rich.table import Table

from moeserve.placement.cluster import Cluster, Dataflow
from moeserve.placement.cost import imbalance, slot_loads, traffic
from moeserve.placement.formats import routing_files as inputs
from moeserve.placement.plan import Plan
from moeserve.placement.problem import Problem
from moeserve.placement.report import figures
from moeserve.placement.routing import split
from moeserve.placement.solvers import dp
from moeserve.placement.solvers.balance import balance_layers, peak
from moeserve.placement.solvers.bounds import balance_bound
from moeserve.placement.solvers.eplb import eplb
from moeserve.placement.solvers.portfolio import Budget, Solver, solve

F64 = NDArray[np.float64]
SIZES = (
    (256, 8), (256, 32), (288, 32), (320, 64), (288, 72), (288, 144), (320, 160), (288, 288),
    (320, 320),
)  # fmt: skip


_SECONDS = 50.0  # per plan


def table(title: str, headings: str, rows: list[tuple[object, ...]]) -> None:
    grid = Table(title=title, title_justify="left")
    for heading in headings.split():
        grid.add_column(heading.replace("_", " "))
    for row in rows:
        grid.add_row(*(f"{c:.4f}" if isinstance(c, float) else str(c) for c in row))
    Console(width=150).print(grid)


def loads_of(data: Path) -> dict[str, F64]:
    files = sorted((data / "deepseek_v3_loads").glob("*.json"))
    return {f.stem: inputs.read(f).workloads[0].load_LE for f in files}


def bench_balance(data: Path, limit: float) -> None:
    workloads = loads_of(data)
    if not workloads:
        return
    load_LE = workloads.get("prefill_in1024", next(iter(workloads.values())))
    rows = []
    for slots, devices in SIZES:
        problem = Problem(Cluster(devices), slots, Dataflow.REPLICATED)
        ones = np.ones(devices)
        base = eplb(load_LE, slots=slots, devices=devices)
        began = time.monotonic()
        fast = balance_layers(problem, load_LE[:, :, None])
        seconds = time.monotonic() - began
        began = time.monotonic()
        deep = balance_layers(
            problem, load_LE[:, :, None], recounts=40, deadline=time.monotonic() + limit
        )
        longer = time.monotonic() - began
        peaks = [
            np.array([peak(r, w[:, None], ones) for r, w in zip(p, load_LE, strict=True)])
            for p in (base, fast, deep)
        ]
        bound = np.mean([balance_bound(w, ones, slots) for w in load_LE])
        worse = int((peaks[1] > peaks[0] + 1e-12).sum())
        means = [float(p.mean()) for p in peaks]
        rows.append((f"{slots} / {devices}", *means, float(bound), worse, seconds, longer))
    table(
        f"1. Balance, {len(load_LE)} layers x {load_LE.shape[1]}: mean of max/mean",
        "slots/devices EPLB ours with_recounting bound layers_worse_than_EPLB seconds deep_seconds",
        rows,
    )


def fractional_imbalance(plan: Plan, load_LE: F64, rounds: int = 400) -> F64:
    """Imbalance when tokens may split unevenly over copies: multiplicative weights, to ~0.1 %."""
    result = []
    device_S = plan.device_S
    for l, load_E in enumerate(load_LE):
        expert_S = plan.expert_LS[l]
        share_S = slot_loads(plan, load_LE)[l] / load_E[expert_S]
        best = np.inf
        for step in range(rounds):
            load_D = np.bincount(device_S, share_S * load_E[expert_S], plan.num_devices)
            best = min(best, float(load_D.max()))
            share_S = share_S * (load_D.mean() / load_D[device_S]) ** (1 / (1 + step) ** 0.5)
            share_S = share_S / np.bincount(expert_S, share_S, len(load_E))[expert_S]
        result.append(best / load_E.sum() * plan.num_devices)
    return np.array(result)


def bench_drift(data: Path, limit: float) -> None:
    workloads = loads_of(data)
    if len(workloads) < 3:
        return
    del limit
    rows = []
    problem = Problem(Cluster(32), 288, Dataflow.REPLICATED)
    shares = {n: w / w.sum(axis=1, keepdims=True) for n, w in workloads.items()}
    for unseen, seen_load in shares.items():
        others = [w for n, w in shares.items() if n != unseen]
        single = {
            n: float(imbalance(one_plan(problem, w[:, :, None]), seen_load).mean())
            for n, w in shares.items()
            if n != unseen
        }
        several = one_plan(problem, np.stack(others, axis=2))
        rows.append((
            unseen, min(single.values()), float(np.mean(list(single.values()))),
            max(single.values()), float(imbalance(several, seen_load).mean()),
            float(fractional_imbalance(several, seen_load).mean()),
        ))  # fmt: skip
    table(
        "2. Drift, 288 slots on 32 devices: imbalance on a workload nobody fitted",
        "unseen_workload best_single mean_single worst_single fitted_on_all_others "
        "and_tokens_split_ideally",
        rows,
    )


def one_plan(problem: Problem, load_LEW: F64) -> Plan:
    rows = balance_layers(problem, load_LEW)
    layers, experts = load_LEW.shape[:2]
    return Plan(rows, experts, problem.cluster.devices, 1, tuple(range(layers)))


def bench_copies(data: Path, limit: float) -> None:
    rows = []
    for name, whole in traces(data):
        fitted, held = split(whole, 0.5)
        assert held is not None
        for devices, nodes in ((8, 1), (16, 4)):
            for flow in (Dataflow.HOME_DEDUP, Dataflow.MIGRATE):
                problem = Problem(Cluster(devices, nodes), whole.num_experts, flow)
                for solver in (Solver.CONTIGUOUS, Solver.BALANCE, Solver.AUTO):
                    began = time.monotonic()
                    plan = solve(problem, fitted, solver, Budget(limit))
                    seconds = time.monotonic() - began
                    found = figures(plan, held, problem.cluster)
                    gap = found["gap"]
                    rows.append((
                        name, f"{devices} in {nodes}", flow, solver, found["imbalance"]["mean"],
                        found["copies_per_token_layer"],
                        found["cross_node_copies_per_token_layer"],
                        "-" if gap is None else f"{gap:.0%}", seconds,
                    ))  # fmt: skip
    if rows:
        table(
            "3. Copies per token-layer, held out",
            "trace devices_in_nodes dataflow solver imbalance copies cross-node gap seconds",
            rows,
        )


def bench_exact(data: Path, limit: float) -> None:
    del data
    routing = synthetic(4000, 32, 8, 2, topics=6)
    pairs = dp.affinity(routing.tokens_TLK, 8)
    load_LE = routing.workloads[0].load_LE
    rows = []
    for cap in (np.inf, 1.05):
        began = time.monotonic()
        exact = dp.best_chain(pairs, load_LE, 4, max_imbalance=cap)
        seconds = time.monotonic() - began
        rows.append((f"layer program, load limit {cap}", exact.value, "proven", seconds))
    for solver in (Solver.CONTIGUOUS, Solver.MOETUNER, Solver.AUTO):
        began = time.monotonic()
        problem = Problem(Cluster(4), 8, Dataflow.MIGRATE, max_imbalance=1.05)
        plan = solve(problem, routing, solver, Budget(limit))
        device_LE = np.argsort(plan.expert_LS, axis=1) // 2
        kept = dp.kept(device_LE.astype(np.int32), pairs)
        rows.append((solver, kept, "-", time.monotonic() - began))
    table("4. Mixtral size, 32 x 8 on 4: pair mass kept", "method kept status seconds", rows)


def bench_scale(data: Path, limit: float) -> None:
    del data
    rows = []
    for layers, slots, devices, nodes in ((58, 256, 64, 8), (61, 320, 320, 40)):
        routing = synthetic(16384, layers, 256, 8)
        fitted, held = split(routing, 0.5)
        assert held is not None
        problem = Problem(Cluster(devices, nodes), slots, Dataflow.HOME_DEDUP)
        for solver in (Solver.EPLB, Solver.AUTO):
            began = time.monotonic()
            plan = solve(problem, fitted, solver, Budget(limit))
            seconds = time.monotonic() - began
            found = figures(plan, held, problem.cluster)
            rows.append((
                f"{layers} x 256, {slots} slots", f"{devices} in {nodes}", solver,
                found["imbalance"]["mean"], found["copies_per_token_layer"],
                found["cross_node_copies_per_token_layer"], found["objective"], found["bound"],
                found["gap"], seconds,
            ))  # fmt: skip
    table(
        "5. Scale (synthetic), time-limited",
        "size devices_in_nodes solver imbalance copies cross-node objective bound gap seconds",
        rows,
    )


def bench_table(data: Path, limit: float) -> None:
    rows = []
    solvers = (
        Solver.CONTIGUOUS, Solver.RANDOM, Solver.EPLB, Solver.MOETUNER, Solver.MOETUNER_ILP,
        Solver.AUTO,
    )  # fmt: skip
    for name, whole in traces(data):
        fitted, held = split(whole, 0.5)
        assert held is not None
        for flow in Dataflow:
            problem = Problem(Cluster(8), whole.num_experts, flow)
            found: dict[Solver, tuple[float, float, float]] = {}
            for solver in solvers:
                began = time.monotonic()
                asked = replace(problem, dataflow=flow)
                plan = solve(asked, fitted, solver, Budget(limit))
                seconds = time.monotonic() - began
                moves = traffic(plan, held.tokens_TLK)
                even = float(imbalance(plan, held.mixed_LE).mean())
                found[solver] = (even, moves.copies, seconds)
            at = 1 if flow.moved_by_grouping else 0
            best = min(found, key=lambda s: found[s][at])
            for solver, values in found.items():
                mark = "best" if solver is best else ""
                rows.append((name, flow, solver, *values, mark))
    if rows:
        table(
            "6. Every dataflow, 8 devices, held out; best: by copies where grouping moves them, "
            "else by imbalance",
            "trace dataflow solver imbalance copies seconds .",
            rows,
        )


def bench_bounds(data: Path, limit: float | None, only: str, json: Path | None) -> None:
    cases = [case for case in recorded_cases(data) if case.cluster.nodes == 1]
    measured = []
    for case in (*cases, *single_layers(data)):
        if only in case.title:
            measured.append(bounded(case, limit))
            if json is not None:
                add_to(json, "bounds", {case.title: asdict(measured[-1])})
    table(
        "7. Bounds by columns; CPU seconds until the gap is at most 10, 4, 2 and 1 %, and in all",
        BOUND_HEADINGS,
        [bound_row(m) for m in measured],
    )


def bench_plans(data: Path, limit: float | None, only: str, json: Path | None) -> None:
    measured = []
    for case in recorded_cases(data):
        for seconds in PLAN_SECONDS:
            if only in case.title and (limit is None or seconds <= limit):
                measured.append(planned(case, seconds))
                if json is not None:
                    name = f"{case.title}, {seconds:.0f} CPU s"
                    add_to(json, "plans", {name: asdict(measured[-1])})
    table(
        "8. Plans by CPU seconds, load limit 1.05 on what is fitted; held out: the other half",
        PLAN_HEADINGS,
        [plan_row(m) for m in measured],
    )


def bench_shift(data: Path, limit: float, out: Path | None = None) -> None:
    del limit
    rows: list[ShiftRow] = []
    for name, whole in traces(data):
        for devices in DEVICES:
            rows += shift_rows(name, whole, devices)
            if out is not None:
                write_rows(rows, out)
    table(
        "8. A domain that nobody fitted",
        "trace devices left_out plan imbalance copies beside_in_order saving_kept cpu_s caution",
        [
            (r.trace, r.devices, r.left_out, r.plan, r.imbalance, r.copies, r.unevenness, r.kept,
             r.cpu_s, r.chosen)
            for r in rows
        ],
    )  # fmt: skip


BENCHES: dict[str, Callable[[Path, float], None]] = {
    "balance": bench_balance,
    "drift": bench_drift,
    "copies": bench_copies,
    "exact": bench_exact,
    "scale": bench_scale,
    "table": bench_table,
    "shift": bench_shift,
}
BY_COLUMNS = {"bounds": bench_bounds, "plans": bench_plans}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the placement planner.")
    parser.add_argument("--data", type=Path, required=True, help="folder of routing data")
    parser.add_argument(
        "--only", nargs="+", choices=(*BENCHES, *BY_COLUMNS), default=tuple(BENCHES)
    )
    parser.add_argument(
        "--time-limit", type=float,
        help="seconds per plan (50); CPU seconds of bounds and plans (what each case is given)",
    )  # fmt: skip
    parser.add_argument("--case", default="", help="part of the names of bounds and plans")
    parser.add_argument("--json", type=Path, help="file that takes what bounds and plans measured")
    parser.add_argument("--shift-json", type=Path, metavar="FILE", help="rows of shift go there")
    arguments = parser.parse_args()
    BENCHES["shift"] = partial(bench_shift, out=arguments.shift_json)
    for name in arguments.only:
        if name in BY_COLUMNS:
            BY_COLUMNS[name](arguments.data, arguments.time_limit, arguments.case, arguments.json)
        else:
            BENCHES[name](arguments.data, arguments.time_limit or _SECONDS)


if __name__ == "__main__":
    main()
