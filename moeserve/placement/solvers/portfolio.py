"""The portfolio: from routing and a problem to the best plan within a time limit.

``auto`` balances where only balance counts; elsewhere it groups (``home-dedup``) and then aligns
(``migrate``). It starts from the balanced plan, spends the time limit on deeper annealing, and can
be stopped at any layer; the result is compared with the baseline and never worse. The clock only
decides how much is tried.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from moeserve.errors import PlacementError
from moeserve.placement.cluster import Dataflow
from moeserve.placement.cost import imbalance, priced, traffic
from moeserve.placement.formats.runtimes import lightllm_rows
from moeserve.placement.plan import Plan, contiguous, tidy, with_slots
from moeserve.placement.problem import Problem, check, require_pairs
from moeserve.placement.report import loads, worst_imbalance
from moeserve.placement.routing import Routing
from moeserve.placement.solvers import align, dp, moetuner
from moeserve.placement.solvers.annealing import AnnealingSchedule
from moeserve.placement.solvers.balance import balance_layers
from moeserve.placement.solvers.columns.certify import PlanBounds
from moeserve.placement.solvers.columns.levels import BoundedRouting
from moeserve.placement.solvers.eplb import eplb
from moeserve.placement.solvers.grouping import each_layer, group_layer
from moeserve.placement.solvers.polish import polish

F64 = NDArray[np.float64]
I32 = NDArray[np.int32]

Progress = Callable[[str, int, int], None]
MOST_TOKENS = 16384  # more are thinned out evenly for the search; figures use all
_PROBE, _DEEPEST = 60, 2400  # swaps tried per slot
_HEAT = 0.3
_GROUPING = 0.35  # of the time, where bounds follow
_PROOF_NODES = 20_000  # of each exact search, where no clock is looked at


class Solver(StrEnum):
    AUTO = "auto"
    BALANCE = "balance"
    EPLB = "eplb"
    MOETUNER = "moetuner"
    MOETUNER_ILP = "moetuner-ilp"
    DP = "dp"
    POLISH = "polish"
    CONTIGUOUS = "contiguous"
    RANDOM = "random"
    LIGHTLLM = "lightllm"


@dataclass(frozen=True, slots=True)
class Budget:
    """``seconds`` None: as deep as is sensible, without looking at the clock (reproducible).

    ``branch``: what grouping leaves of the time goes into bounds by columns and the better layers
    that they lead to. ``swaps``: so many are tried per slot when grouping, neither more nor fewer.
    """

    seconds: float | None = 60.0
    threads: int = 2
    seed: int = 1
    branch: bool = False
    swaps: int | None = None

    def __post_init__(self) -> None:
        if self.seconds is not None and not self.seconds > 0:
            raise PlacementError(f"time limit {self.seconds} must be positive")
        if self.threads < 1:
            raise PlacementError(f"threads={self.threads}: must be at least 1")


def _silent(stage: str, done: int, total: int) -> None:
    del stage, done, total


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    """What every solver needs, prepared once."""

    problem: Problem
    routing: Routing
    topk_TLK: I32 | None  # thinned
    weight_T: F64
    load_LEW: F64  # the mixture first, then the workloads where there are several
    blank: Plan
    budget: Budget
    deadline: float
    progress: Progress

    @property
    def tokens(self) -> I32:
        if self.topk_TLK is None:
            raise PlacementError("this solver needs per-token routing, not counts")
        return self.topk_TLK

    @property
    def alternatives(self) -> F64:
        """The loads to balance: traces are served together, counts are alternatives, and so are
        traces where copies of experts are to insure against a shift."""
        spare = self.problem.slots > self.routing.num_experts
        insured = self.problem.variance_price > 0 and spare
        return self.load_LEW if insured or self.topk_TLK is None else self.load_LEW[:, :, :1]

    def plan(self, expert_LS: I32) -> Plan:
        return with_slots(self.blank, tidy(expert_LS, self.problem.cluster.devices))


@dataclass(frozen=True, slots=True, eq=False)
class SolvedPlacement:
    """``bound_L``: no plan within the limits has fewer priced copies on what was fitted.

    None where no bound by columns was looked for.
    """

    plan: Plan
    bound_L: F64 | None = None


def solve(
    problem: Problem,
    routing: Routing,
    solver: Solver = Solver.AUTO,
    budget: Budget | None = None,
    progress: Progress = _silent,
) -> Plan:
    """The best plan found; its ``figures`` are left to ``report``."""
    return solve_bounded(problem, routing, solver, budget, progress).plan


def solve_bounded(
    problem: Problem,
    routing: Routing,
    solver: Solver = Solver.AUTO,
    budget: Budget | None = None,
    progress: Progress = _silent,
) -> SolvedPlacement:
    """The best plan found, with the bound that was shown on the way."""
    check(problem, routing)
    work = _prepare(problem, routing, budget or Budget(), progress)
    plan, bound_L = _SOLVERS[solver](work), None
    if solver is Solver.AUTO and branches(problem, routing, work.budget):
        plan, bound_L = branched(work, plan)
    if problem.moves is not None and not (solver is Solver.AUTO and plan.guide_LED is not None):
        plan = align.nearest(plan, problem.moves.previous)
    if plan.dataflow is Dataflow.MIGRATE and work.topk_TLK is not None:
        plan = align.with_guide(plan, work.topk_TLK)
    require_pairs(problem, plan)
    return SolvedPlacement(plan, bound_L)


def branches(problem: Problem, routing: Routing, budget: Budget) -> bool:
    """Whether bounds by columns are looked for while solving."""
    free = not (problem.apart or problem.together or problem.moves)
    return budget.branch and problem.dataflow.moved_by_grouping and routing.has_tokens and free


def branched(work: _Work, plan: Plan) -> tuple[Plan, F64]:
    """Bounds on all tokens of the routing, and the plan with the better layers they led to."""
    problem, routing, budget = work.problem, work.routing, work.budget
    cluster = problem.cluster
    mixed_LE = work.load_LEW[:, :, 0]
    on = BoundedRouting(routing.tokens_TLK, routing.token_weight_T, mixed_LE)
    bounds = PlanBounds(plan, on, cluster, on.most_L(plan, cluster, problem.max_imbalance))
    left = None if budget.seconds is None else max(0.0, work.deadline - time.monotonic())
    bounds.run(
        seconds=left,
        nodes=_PROOF_NODES if left is None else 1 << 60,
        threads=budget.threads,
        progress=lambda done, total: work.progress("bounds", done, total),
    )
    if problem.dataflow is Dataflow.HOME_DEDUP and float(np.ptp(cluster.speed_D)) == 0:
        rows = [bounds.better_rows().get(l, row_S) for l, row_S in enumerate(plan.expert_LS)]
        plan = _within_workloads(work, plan, work.plan(np.stack(rows)))
    return plan, bounds.bound_L()


def _within_workloads(work: _Work, plan: Plan, better: Plan) -> Plan:
    """The better layers that keep each single workload within its limit, where there are several.

    The mixture's limit they keep already.
    """
    ok_L = np.ones(plan.num_layers, np.bool_)
    for load_LE in np.moveaxis(work.load_LEW, 2, 0)[1:]:
        limit_L = np.maximum(work.problem.max_workload_imbalance, imbalance(plan, load_LE))
        ok_L &= imbalance(better, load_LE) <= limit_L + 1e-12
    return work.plan(np.where(ok_L[:, None], better.expert_LS, plan.expert_LS))


def _prepare(problem: Problem, routing: Routing, budget: Budget, progress: Progress) -> _Work:
    cluster = problem.cluster
    start_LS = contiguous(
        layers=routing.num_layers,
        experts=routing.num_experts,
        slots=problem.slots,
        devices=cluster.devices,
        nodes=cluster.nodes,
    )
    blank = Plan(
        start_LS,
        routing.num_experts,
        cluster.devices,
        cluster.nodes,
        routing.moe_layers,
        problem.dataflow,
        problem.phase,
    )
    tokens, weight_T = None, np.ones(1)
    if routing.has_tokens:
        step = -(-len(routing.tokens_TLK) // MOST_TOKENS)
        tokens = np.ascontiguousarray(routing.tokens_TLK[::step])
        weight_T = routing.token_weight_T[::step]
    load_LEW = loads(blank, routing, problem.batch)
    if len(routing.workloads) > 1:
        mixed_LE = load_LEW @ routing.mix_W
        load_LEW = np.concatenate((mixed_LE[:, :, None], load_LEW), axis=2)
    seconds = float("inf") if budget.seconds is None else budget.seconds
    deadline = time.monotonic() + seconds
    return _Work(problem, routing, tokens, weight_T, load_LEW, blank, budget, deadline, progress)


def _balance(work: _Work) -> Plan:
    few = work.problem.slots_per_device <= 4 and work.problem.slots > work.routing.num_experts
    limited = work.budget.seconds is not None
    rows = balance_layers(
        work.problem,
        work.alternatives,
        recounts=40 if few and limited else 0,
        deadline=work.deadline - 0.2 * (work.budget.seconds or 0),
    )
    return work.plan(rows)


def _eplb(work: _Work) -> Plan:
    cluster = work.problem.cluster
    rows = eplb(
        work.load_LEW[:, :, 0],
        slots=work.problem.slots,
        devices=cluster.devices,
        nodes=cluster.nodes,
        groups=work.problem.groups,
    )
    return work.plan(rows)


def _auto(work: _Work) -> Plan:
    grouped = work.problem.dataflow.moved_by_grouping and work.topk_TLK is not None
    if not grouped:
        pairs = work.problem.apart or work.problem.together
        return _paired(work) if pairs else _better_balanced(work, _balance(work))
    plan = _grouped(work)
    if work.problem.dataflow is Dataflow.MIGRATE:
        plan = _aligned(work, plan)
        plan = _or_exact(work, plan)
    base = _eplb(work)
    if work.problem.dataflow is Dataflow.MIGRATE:
        base = align.with_guide(base, work.tokens)
    worse = objective(work, plan) > objective(work, base)
    free = not (work.problem.apart or work.problem.together or work.problem.moves)
    return base if worse and free else plan


def _better_balanced(work: _Work, plan: Plan) -> Plan:
    """The plan, or the baseline where several workloads leave that ahead."""
    base, cluster = _eplb(work), work.problem.cluster
    values = [worst_imbalance(p, work.alternatives, cluster) for p in (plan, base)]
    return base if values[1] < values[0] else plan


def _or_exact(work: _Work, plan: Plan) -> Plan:
    """The exact pair placement, where it is affordable and costs less."""
    single = work.problem.slots == work.routing.num_experts
    pairs = work.problem.apart or work.problem.together or work.problem.moves
    if pairs or not single or not dp.affordable(plan.num_experts, plan.num_devices):
        return plan
    exact = align.with_guide(_dp(work), work.tokens)
    return exact if objective(work, exact) < objective(work, plan) else plan


def objective(work: _Work, plan: Plan) -> float:
    moves = traffic(plan, work.tokens, weight_T=work.weight_T)
    return priced(moves.copies, moves.cross, work.problem.cluster.node_ratio)


def _group_with(
    work: _Work, start_LS: I32, schedule: AnnealingSchedule, stage: str
) -> tuple[I32, bool]:
    """Every layer regrouped while there is time; whether all of them were."""
    done = 0

    def one(l: int) -> I32:
        nonlocal done
        if time.monotonic() >= work.deadline:
            kept_S: I32 = start_LS[l]
            return kept_S
        row_S = group_layer(
            work.problem,
            start_LS[l],
            work.tokens[:, l],
            work.load_LEW[l],
            work.weight_T,
            l,
            schedule,
        )
        done += 1
        work.progress(stage, done, len(start_LS))
        return row_S

    rows = each_layer(one, range(len(start_LS)), work.budget.threads)
    return np.stack(rows), done == len(start_LS)


def _grouped(work: _Work) -> Plan:
    start_LS = balance_layers(work.problem, work.alternatives)
    began = time.monotonic()
    probe = AnnealingSchedule(work.budget.swaps or _PROBE, 2, _HEAT, work.budget.seed)
    best_LS, whole = _group_with(work, start_LS, probe, "grouping")
    if not whole or work.budget.swaps:
        return work.plan(best_LS)
    depth = _DEEPEST
    if work.budget.seconds is not None:
        spare = 0.8 * (work.deadline - time.monotonic())
        if branches(work.problem, work.routing, work.budget):
            spare = _GROUPING * work.budget.seconds - (time.monotonic() - began)
        if work.problem.dataflow is Dataflow.MIGRATE:
            spare *= 0.6
        depth = int(min(_DEEPEST, _PROBE * spare / max(1e-3, time.monotonic() - began)))
    if depth > 2 * _PROBE:
        deep = AnnealingSchedule(depth, 2, _HEAT, work.budget.seed)
        deep_LS, _ = _group_with(work, start_LS, deep, "annealing")
        unfinished_L = (deep_LS == start_LS).all(axis=1)
        best_LS = np.where(unfinished_L[:, None], best_LS, deep_LS)
    return work.plan(best_LS)


def _aligned(work: _Work, plan: Plan) -> Plan:
    best = align.chain(plan, work.tokens, work.weight_T)
    value = objective(work, best)
    seconds = 0.0
    for forward in (True, False):
        began = time.monotonic()
        if began + 1.2 * seconds >= work.deadline or len(work.tokens) * plan.num_devices > 4e6:
            break
        schedule = AnnealingSchedule(200, 1, 0.02, work.budget.seed)
        found = align.sweep(
            work.problem, best, work.tokens, work.load_LEW, work.weight_T, schedule, forward=forward
        )
        seconds = time.monotonic() - began
        if (found_value := objective(work, found)) < value:
            best, value = found, found_value
    return best


def _paired(work: _Work) -> Plan:
    """Balance under pairs that must be together or apart: the grouping search with no tokens."""
    layers = work.routing.num_layers
    idle = np.full((1, layers, 1), -1, np.int32)
    start_LS = balance_layers(work.problem, work.load_LEW)
    strict = replace(work.problem, max_imbalance=1.0)
    rows = [
        group_layer(
            strict,
            start_LS[l],
            idle[:, l],
            work.load_LEW[l],
            np.ones(1),
            l,
            AnnealingSchedule(2000, 2, 1.0),
        )
        for l in range(layers)
    ]
    return work.plan(np.stack(rows))


def _dp(work: _Work) -> Plan:
    if work.problem.slots != work.routing.num_experts:
        raise PlacementError("the exact method needs one slot per expert; leave --slots out")
    exact = dp.best_chain(
        dp.affinity(work.tokens, work.routing.num_experts),
        work.load_LEW[:, :, 0],
        work.problem.cluster.devices,
        max_imbalance=work.problem.max_imbalance,
    )
    return work.plan(dp.slots_of(exact.device_LE))


def _moetuner(work: _Work) -> Plan:
    return work.plan(moetuner.two_stages(work.problem, work.load_LEW[:, :, 0], work.tokens))


def _moetuner_ilp(work: _Work) -> Plan:
    limit = work.budget.seconds or 60.0
    return work.plan(
        moetuner.two_stages(work.problem, work.load_LEW[:, :, 0], work.tokens, limit=limit)
    )


def _polish(work: _Work) -> Plan:
    return work.plan(
        polish(work.problem, _auto(work).expert_LS, work.tokens, work.load_LEW, work.deadline)
    )


def _contiguous(work: _Work) -> Plan:
    return work.blank


def _lightllm(work: _Work) -> Plan:
    devices = work.problem.cluster.devices
    return work.plan(lightllm_rows(work.load_LEW[:, :, 0], work.problem.slots, devices))


def _random(work: _Work) -> Plan:
    random = np.random.default_rng(work.budget.seed)
    return work.plan(np.stack([random.permutation(row_S) for row_S in work.blank.expert_LS]))


_SOLVERS: dict[Solver, Callable[[_Work], Plan]] = {
    Solver.AUTO: _auto,
    Solver.BALANCE: _balance,
    Solver.EPLB: _eplb,
    Solver.MOETUNER: _moetuner,
    Solver.MOETUNER_ILP: _moetuner_ilp,
    Solver.DP: _dp,
    Solver.POLISH: _polish,
    Solver.CONTIGUOUS: _contiguous,
    Solver.RANDOM: _random,
    Solver.LIGHTLLM: _lightllm,
}
