"""Plans are judged on what they were not fitted on, and fall back where they do not stand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.errors import PlacementError
from moeserve.placement.cluster import Cluster, Dataflow
from moeserve.placement.cost import traffic
from moeserve.placement.plan import Plan
from moeserve.placement.problem import Moves, Problem
from moeserve.placement.routing import Routing, counted, split, workload_of_tokens
from moeserve.placement.solvers.covariance import WINDOW, load_covariance
from moeserve.placement.solvers.folds import PARTS, folds_of, in_parts, thinned
from moeserve.placement.solvers.portfolio import Budget, Solver, solve
from moeserve.placement.solvers.robust import (
    BASELINES,
    NEAR,
    PREVIOUS,
    frontier,
    solve_robust,
)
from moeserve.placement.step_time import PlacementRates, step_figures

few = settings(max_examples=5, deadline=None)
seeds = st.integers(0, 2**32 - 1)
QUICK = Budget(seconds=None, threads=1, swaps=10)
RATES = PlacementRates()


def drawn(seed: int, *, domains: int, experts: int = 16, k: int = 3, tokens: int = 96) -> Routing:
    """Domains with tastes of their own, in sequences of 24 tokens."""
    random = np.random.default_rng(seed)
    work = []
    for d in range(domains):
        taste = random.normal(size=(1, 2, experts)) * 1.5
        score = taste + random.gumbel(size=(tokens, 2, experts))
        topk = np.argsort(-score, axis=2)[:, :, :k].astype(np.int32)
        lens = np.full(tokens // 24, 24)
        work.append(workload_of_tokens(f"domain {d}", topk, lens, num_experts=experts))
    return Routing(tuple(work), (0, 1))


@few
@given(
    seeds,
    st.integers(1, 3),
    st.sampled_from([(16, 4, 1), (16, 8, 2), (24, 4, 1)]),
    st.sampled_from(list(Dataflow)),
)
def test_no_plan_falls_behind_the_baselines_on_what_was_held_apart(
    seed: int, domains: int, shape: tuple[int, int, int], flow: Dataflow
) -> None:
    slots, devices, nodes = shape
    problem = Problem(Cluster(devices, nodes), slots, flow)
    fitted, held = split(drawn(seed, domains=domains), 0.25)
    assert held is not None
    found = solve_robust(problem, fitted, held, budget=QUICK)
    ours = step_figures(found.plan, held, problem.cluster, RATES)
    bases = [
        step_figures(solve(problem, fitted, s, QUICK), held, problem.cluster, RATES)
        for s in BASELINES
    ]
    limit = problem.max_imbalance * bases[0].imbalance
    assert ours.imbalance <= limit + 1e-12
    assert ours.step <= min(b.step for b in bases if b.imbalance <= limit) + 1e-12


def test_the_same_routing_gives_the_same_plan() -> None:
    fitted, held = split(drawn(3, domains=2), 0.25)
    problem = Problem(Cluster(4), 16)
    first, second = (solve_robust(problem, fitted, held, budget=QUICK) for _ in range(2))
    assert first.chosen == second.chosen
    assert first.frontier == second.frontier
    assert (first.plan.expert_LS == second.plan.expert_LS).all()


def test_the_choice_has_the_fewest_copies_of_the_fast_and_balanced() -> None:
    problem = Problem(Cluster(4), 16)
    found = frontier(problem, drawn(5, domains=3), RATES, QUICK)
    assert found is not None
    assert found.judged_on == ("domain 0", "domain 1", "domain 2")
    limit = problem.max_imbalance * found.points[0].imbalance
    assert [p.name for p in found.points[:2]] == ["contiguous", "eplb"]
    assert all(p.admissible == (p.imbalance <= limit) for p in found.points[1:])
    standing = [p for p in found.points if p.admissible]
    fastest = min(p.step for p in standing)
    assert found.chosen.step <= min(p.step for p in standing if p.caution is None)
    assert found.chosen.step <= NEAR * fastest
    near = [p for p in standing if p.step <= found.chosen.step]
    assert found.chosen.copies == min(p.copies for p in near)


def test_experts_in_order_stay_where_neighbours_are_what_a_router_picks() -> None:
    """Groups of neighbours, evenly used: nothing is better than experts in order."""
    random = np.random.default_rng(1)
    group_T = random.integers(4, size=320)
    inside = np.argsort(random.random((320, 2, 4)), axis=2)[:, :, :2]
    topk = (group_T[:, None, None] * 4 + inside).astype(np.int32)
    work = workload_of_tokens("neighbours", topk, np.full(20, 16), num_experts=16)
    fitted, held = split(Routing((work,), (0, 1)), 0.2)
    assert held is not None
    problem = Problem(Cluster(4, 4), 16)
    found = solve_robust(problem, fitted, held, budget=QUICK)
    in_order = solve(problem, fitted, Solver.CONTIGUOUS)
    copies = [traffic(p, held.tokens_TLK).copies for p in (found.plan, in_order)]
    assert copies[0] <= copies[1]


def test_routing_that_says_nothing_is_left_in_order() -> None:
    """What a solver finds in noise does not hold on other tokens; it is not returned."""
    random = np.random.default_rng(7)
    topk = np.argsort(random.random((400, 2, 16)), axis=2)[:, :, :2].astype(np.int32)
    work = workload_of_tokens("noise", topk, np.full(25, 16), num_experts=16)
    fitted, held = split(Routing((work,), (0, 1)), 0.2)
    assert held is not None
    problem = Problem(Cluster(4, 4), 16)
    found = solve_robust(problem, fitted, held, budget=QUICK)
    ours, theirs = (
        step_figures(p, held, problem.cluster, RATES)
        for p in (found.plan, solve(problem, fitted, Solver.CONTIGUOUS))
    )
    assert ours.step <= theirs.step


def test_counts_and_pairs_are_planned_as_before() -> None:
    load_LE = np.random.default_rng(2).random((2, 16)) + 0.1
    whole = drawn(4, domains=1)
    counts = Routing((replace(whole.workloads[0], load_LE=load_LE, topk_TLK=None),), (0, 1))
    assert solve_robust(Problem(Cluster(4), 16), counts, None, budget=QUICK).frontier is None
    apart = Problem(Cluster(4), 16, apart=((0, 1),))
    found = solve_robust(apart, *split(whole, 0.25), budget=QUICK)
    rows = found.plan.expert_LS.reshape(2, 4, -1)
    assert not ((rows == 0).any(axis=2) & (rows == 1).any(axis=2)).any()


def test_rates_decide_what_is_fast() -> None:
    problem, whole = Problem(Cluster(4), 16), drawn(5, domains=2)
    found = frontier(problem, whole, PlacementRates(1.0, 0.0), QUICK)
    assert found is not None
    for point in found.points:
        assert point.step == pytest.approx(3 * point.imbalance)  # of three experts a token
    slow_links = frontier(problem, whole, PlacementRates(0.0, 1.0), QUICK)
    assert slow_links is not None
    assert slow_links.chosen.copies <= found.chosen.copies
    assert found.chosen.imbalance <= NEAR * min(p.imbalance for p in found.points)


@few
@given(seeds, st.booleans())
def test_a_previous_plan_stays_unless_another_is_faster(seed: int, dear: bool) -> None:
    fitted, held = split(drawn(seed, domains=2), 0.25)
    problem = Problem(Cluster(4), 16)
    previous = solve(problem, fitted, Solver.BALANCE, QUICK)
    horizon = 1 if dear else 10**9
    moving = replace(problem, moves=Moves(previous, 1000, 100, horizon))
    found = solve_robust(moving, fitted, held, budget=QUICK)
    assert found.frontier is not None
    assert [p.name for p in found.frontier.points if p.caution is None] == [PREVIOUS]
    same = (found.plan.expert_LS == previous.expert_LS).all()
    assert same or not dear
    assert held is not None
    ours, before = (step_figures(p, held, problem.cluster, RATES) for p in (found.plan, previous))
    assert ours.step <= before.step


def slow_covariance(topk_TK: np.ndarray, experts: int) -> np.ndarray:
    tokens, width = topk_TK.shape
    use = np.zeros((tokens, experts))
    for t, k in np.ndindex(topk_TK.shape):
        if topk_TK[t, k] >= 0:
            use[t, topk_TK[t, k]] = 1
    total = np.zeros((experts, experts))
    for start in range(0, tokens, WINDOW):
        end = min(tokens, start + WINDOW)
        for t in range(start, end):
            for u in range(start, end):
                if t != u:
                    total += np.outer(use[t], use[u]) / (end - start - 1)
    return (total / tokens - np.outer(use.mean(axis=0), use.mean(axis=0))) / width**2


@few
@given(seeds, st.sampled_from([16, 35, 64]))
def test_covariance_equals_the_sum_over_pairs_of_tokens(seed: int, tokens: int) -> None:
    random = np.random.default_rng(seed)
    topk = np.argsort(random.random((tokens, 6)), axis=1)[:, :3].astype(np.int32)
    topk[random.random(topk.shape) < 0.1] = -1
    np.testing.assert_allclose(load_covariance(topk, 6), slow_covariance(topk, 6), atol=1e-6)


def test_one_workload_is_cut_into_unlike_parts_that_hold_all_of_it() -> None:
    """Two topics in turn: parts separate them, so that leaving one out is a shift."""
    two = drawn(8, domains=2, tokens=384)
    topk = np.concatenate([w.tokens.reshape(-1, 24, 2, 3) for w in two.workloads], axis=1)
    mixed = topk.reshape(-1, 2, 3)
    only = workload_of_tokens("both", mixed, np.full(len(mixed) // 24, 24), num_experts=16)
    whole = Routing((only,), (0, 1))
    cut = in_parts(whole)
    assert len(cut.workloads) == PARTS
    assert (sum(w.load_LE for w in cut.workloads) == only.load_LE).all()
    np.testing.assert_allclose(cut.mixed_LE, whole.mixed_LE)
    tastes = [w.load_LE / w.load_LE.sum(axis=1, keepdims=True) for w in two.workloads]
    nearest = [
        int(np.argmin([np.abs(w.load_LE / w.load_LE.sum(axis=1, keepdims=True) - t).sum() for t in
                       tastes]))
        for w in cut.workloads
    ]  # fmt: skip
    assert set(nearest) == {0, 1}
    assert [len(f.seen.workloads) for f in folds_of(cut)] == [PARTS - 1] * PARTS


@few
@given(seeds, st.integers(20, 400), st.integers(1, 3))
def test_thinning_keeps_workloads_layers_and_lengths_together(
    seed: int, tokens: int, layers: int
) -> None:
    whole = drawn(seed, domains=2)
    small = thinned(whole, tokens, layers)
    assert small.num_layers == min(2, layers)
    for workload in small.workloads:
        assert int(workload.lengths.sum()) == len(workload.tokens)
        assert (workload.load_LE == counted(workload.tokens, 16)).all()


@few
@given(seeds, st.sampled_from([(4, 1), (4, 2)]))
def test_even_links_take_what_copies_are_priced_at(seed: int, shape: tuple[int, int]) -> None:
    """The fullest link is never below the mean, and equals it where all devices get the same."""
    devices, nodes = shape
    routing = drawn(seed, domains=1)
    rows = np.tile(np.random.default_rng(seed).permutation(16), (2, 1)).astype(np.int32)
    plan = Plan(rows, 16, devices, nodes, (0, 1))
    cluster = Cluster(devices, nodes)
    found = step_figures(plan, routing, cluster, PlacementRates(0.0, 1.0))
    moves = traffic(plan, routing.tokens_TLK)
    assert found.copies_L is not None
    np.testing.assert_allclose(found.copies_L, moves.copies_L + 8 * moves.cross_L)
    assert (found.step_L >= found.copies_L - 1e-9).all()


def test_rates_that_say_nothing_are_refused() -> None:
    for expert, copy in ((-1.0, 1.0), (float("nan"), 1.0), (0.0, 0.0)):
        with pytest.raises(PlacementError, match="rate"):
            PlacementRates(expert, copy)
