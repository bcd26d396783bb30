"""Bounds are never beaten, the exact methods are exact, and planted structure is found."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.errors import PlacementError
from moeserve.placement.cluster import Cluster, Dataflow
from moeserve.placement.cost import imbalance, priced, traffic
from moeserve.placement.plan import Plan, moved_slots
from moeserve.placement.problem import Moves, Problem
from moeserve.placement.routing import Routing, workload_of_tokens
from moeserve.placement.solvers import align, dp, ilp, moetuner
from moeserve.placement.solvers.balance import balance_layers, peak
from moeserve.placement.solvers.bounds import balance_bound, copies_bound
from moeserve.placement.solvers.eplb import eplb
from moeserve.placement.solvers.portfolio import Budget, Solver, solve

GOLDEN = Path(__file__).resolve().parents[2] / "placement" / "golden"
few = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**32 - 1)
NO_CLOCK = Budget(seconds=None, threads=1)


def routed(topk: np.ndarray, experts: int) -> Routing:
    layers = tuple(range(topk.shape[1]))
    return Routing((workload_of_tokens("toy", topk, None, num_experts=experts),), layers)


def random_topk(seed: int, tokens: int, layers: int, experts: int, k: int) -> np.ndarray:
    taste = np.random.default_rng(seed).gumbel(size=(tokens, layers, experts))
    skew = np.random.default_rng(seed + 1).normal(size=(1, layers, experts)) * 1.5
    return np.argsort(-(taste + skew), axis=2)[:, :, :k].astype(np.int32)


@few
@given(seeds, st.sampled_from([(8, 8, 4), (8, 12, 4), (12, 12, 3), (6, 8, 2)]))
def test_no_placement_beats_the_balance_bound(seed: int, shape: tuple[int, int, int]) -> None:
    experts, slots, devices = shape
    random = np.random.default_rng(seed)
    load_E = random.random(experts) ** 3 + 1e-3
    bound = balance_bound(load_E, np.ones(devices), slots)
    for _ in range(40):
        spare = random.integers(experts, size=slots - experts)
        row_S = random.permutation(np.concatenate((np.arange(experts), spare)))
        assert peak(row_S, load_E[:, None], np.ones(devices)) >= bound - 1e-9


@few
@given(seeds, st.sampled_from(list(Dataflow)[2:]), st.sampled_from([(4, 1), (4, 2)]))
def test_no_plan_beats_the_bound_on_copies(
    seed: int, flow: Dataflow, shape: tuple[int, int]
) -> None:
    devices, nodes = shape
    topk = random_topk(seed, 40, 2, 8, 3)
    random = np.random.default_rng(seed)
    for slots in (8, 12):
        base_S = np.concatenate((np.arange(8), random.permutation(8)[: slots - 8]))
        rows = np.stack([random.permutation(base_S) for _ in range(2)]).astype(np.int32)
        plan = Plan(rows, 8, devices, nodes, (0, 1), flow)
        moves = traffic(plan, topk)
        bound = copies_bound(plan, topk, node_ratio=9.0)
        assert priced(moves.copies, moves.cross, 9.0) >= bound - 1e-9


@few
@given(seeds, st.sampled_from([(16, 16, 4), (16, 20, 4), (16, 24, 8), (16, 16, 16)]))
def test_balance_is_never_worse_than_the_baseline_on_any_layer(
    seed: int, shape: tuple[int, int, int]
) -> None:
    experts, slots, devices = shape
    load_LE = np.random.default_rng(seed).random((3, experts)) ** 4 + 1e-4
    cluster = Cluster(devices)
    ours = balance_layers(Problem(cluster, slots), load_LE[:, :, None])
    base = eplb(load_LE, slots=slots, devices=devices)
    for l in range(3):
        one = load_LE[l][:, None]
        assert peak(ours[l], one, cluster.speed_D) <= peak(base[l], one, cluster.speed_D) + 1e-12


def all_even_placements(experts: int, devices: int) -> list[tuple[int, ...]]:
    equal = (experts // devices,) * devices
    every = itertools.product(range(devices), repeat=experts)
    return [d for d in every if tuple(d.count(g) for g in range(devices)) == equal]


@few
@given(seeds)
def test_the_layer_program_equals_brute_force(seed: int) -> None:
    random = np.random.default_rng(seed)
    pairs = random.random((2, 4, 4))
    load_LE = random.random((3, 4)) + 0.1
    exact = dp.best_chain(pairs, load_LE, 2, max_imbalance=1.2)
    placements = np.array(all_even_placements(4, 2))

    def allowed(l: int) -> list[np.ndarray]:
        peaks = [np.bincount(d, load_LE[l], 2).max() / load_LE[l].sum() * 2 for d in placements]
        limit = max(1.2, min(peaks) + 1e-9)
        return [d for d, p in zip(placements, peaks, strict=True) if p <= limit]

    chains = itertools.product(allowed(0), allowed(1), allowed(2))
    best = max(dp.kept(np.array(c), pairs) for c in chains)
    assert exact.value == pytest.approx(best, abs=1e-6)
    assert dp.kept(exact.device_LE, pairs) == pytest.approx(exact.value, abs=1e-6)


def test_labels_by_program_equal_brute_force() -> None:
    random = np.random.default_rng(5)
    flow_LGG = random.random((2, 3, 3))
    cost_DD = moetuner.link_costs(Cluster(3))
    orders = list(itertools.permutations(range(3)))

    def worst_links(names: tuple[tuple[int, ...], ...]) -> float:
        return sum(
            max(
                flow_LGG[l, a, b] * cost_DD[names[l][a], names[l + 1][b]]
                for a in range(3)
                for b in range(3)
            )
            for l in range(2)
        )

    best = min(worst_links(names) for names in itertools.product(orders, repeat=3))
    assert dp.best_labels(flow_LGG, cost_DD)[1] == pytest.approx(best)


@pytest.mark.timeout(200)
def test_integer_programs_agree_with_the_exact_methods() -> None:
    random = np.random.default_rng(2)
    pairs = random.random((2, 6, 6))
    load_LE = np.ones((3, 6))
    joint = ilp.best_chain(pairs, load_LE, 3, limit=20)
    assert joint is not None
    assert joint.proven
    assert joint.value == pytest.approx(dp.best_chain(pairs, load_LE, 3).value, abs=1e-6)

    flow_LGG = random.random((2, 3, 3))
    cost_DD = moetuner.link_costs(Cluster(3))
    labels = ilp.label_layers(flow_LGG, cost_DD, limit=20)
    assert labels is not None
    assert labels.value == pytest.approx(dp.best_labels(flow_LGG, cost_DD)[1], abs=1e-6)

    load_E = random.random(8)
    cluster = ilp.cluster_layer(load_E, 4, limit=20, objective="max")
    best = (
        min(np.bincount(d, load_E, 4).max() for d in all_even_placements(8, 4)) / load_E.sum() * 4
    )
    assert cluster is not None
    assert cluster.value == pytest.approx(best, abs=1e-6)

    gain_ED = random.random((6, 3))
    polished = ilp.polish_layer(gain_ED, np.ones(6), np.full(3, 2.5), limit=20)
    top = max(gain_ED[range(6), list(d)].sum() for d in all_even_placements(6, 3))
    assert polished is not None
    assert polished.value == pytest.approx(top, abs=1e-6)


def test_a_solver_that_found_nothing_gives_no_answer() -> None:
    random = np.random.default_rng(3)
    assert ilp.polish_layer(random.random((6, 3)), np.ones(6), np.full(3, 0.5), limit=5) is None


def test_grouping_equals_brute_force_on_a_small_layer() -> None:
    topk = random_topk(4, 60, 1, 6, 2)
    problem = Problem(Cluster(3), 6, Dataflow.HOME_DEDUP, max_imbalance=10.0)
    plan = solve(problem, routed(topk, 6), Solver.AUTO, NO_CLOCK)
    blank = replace(plan, expert_LS=np.arange(6, dtype=np.int32)[None])
    best = min(
        traffic(replace(blank, expert_LS=dp.slots_of(np.array([d]))), topk).copies
        for d in all_even_placements(6, 3)
    )
    assert traffic(plan, topk).copies == pytest.approx(best)


@pytest.mark.parametrize(("devices", "nodes"), [(4, 1), (8, 4)])
def test_planted_groups_are_recovered(planted, devices: int, nodes: int) -> None:
    topk = planted(tokens=400, layers=2, groups=4, size=8, k=4)
    problem = Problem(Cluster(devices, nodes), 32, Dataflow.HOME_DEDUP, max_imbalance=1.5)
    plan = solve(problem, routed(topk, 32), Solver.AUTO, NO_CLOCK)
    moves = traffic(plan, topk)
    if nodes == 1:
        assert moves.copies == pytest.approx(2 * (1 - 1 / 4), rel=0.01)
    else:
        assert moves.cross == pytest.approx(2 * (1 - 1 / 4), rel=0.01)


def test_planted_paths_let_migrating_tokens_stay(planted) -> None:
    topk = planted(tokens=400, layers=4, groups=4, size=4, k=2)
    problem = Problem(Cluster(4), 16, Dataflow.MIGRATE, max_imbalance=1.5)
    plan = solve(problem, routed(topk, 16), Solver.AUTO, NO_CLOCK)
    copies_L = traffic(plan, topk).copies_L
    assert copies_L[1:].max() <= 0.01
    assert copies_L[0] == pytest.approx(0.75, rel=0.01)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.json")), ids=lambda p: p.stem)
def test_golden_instances_are_solved_as_well_as_ever(path: Path) -> None:
    golden = json.loads(path.read_text())
    load_LE = np.array(golden["load"])
    problem = Problem(Cluster(golden["devices"]), golden["slots"])
    rows = balance_layers(problem, load_LE[:, :, None])
    peaks = [peak(r, w[:, None], np.ones(golden["devices"])) for r, w in zip(rows, load_LE)]  # noqa: B905
    assert peaks == pytest.approx(golden["peaks"], rel=1e-9)
    assert rows.tolist() == golden["expert_of_slot"]


def test_a_plan_for_several_workloads_has_the_better_worst_case() -> None:
    random = np.random.default_rng(7)
    base = random.random((1, 32, 1)) ** 3 + 0.01
    load_LEW = base * np.exp(random.normal(size=(1, 32, 3)) * 0.4)
    problem = Problem(Cluster(8), 40)
    one = balance_layers(problem, load_LEW[:, :, :1])
    all_three = balance_layers(problem, load_LEW)
    speed_D = np.ones(8)
    assert peak(all_three[0], load_LEW[0], speed_D) < peak(one[0], load_LEW[0], speed_D)


def test_grouping_obeys_the_load_limit(topk) -> None:
    ids = topk(tokens=600, layers=2, experts=16, k=3)
    whole = routed(ids, 16)
    for limit in (1.02, 1.2):
        problem = Problem(Cluster(4), 16, Dataflow.HOME_DEDUP, max_imbalance=limit)
        plan = solve(problem, whole, Solver.AUTO, NO_CLOCK)
        least = solve(problem, whole, Solver.BALANCE, NO_CLOCK)
        load_LE = whole.workloads[0].load_LE
        allowed_L = np.maximum(limit, imbalance(least, load_LE).max()) + 0.01
        assert (imbalance(plan, load_LE) <= allowed_L).all()


@pytest.mark.parametrize("flow", list(Dataflow))
@pytest.mark.parametrize("solver", [Solver.AUTO, Solver.MOETUNER, Solver.RANDOM])
def test_auto_is_never_worse_than_the_baseline(
    routing: Routing, flow: Dataflow, solver: Solver
) -> None:
    problem = Problem(Cluster(4), 16, flow, max_imbalance=1.1)
    ours = solve(problem, routing, Solver.AUTO, NO_CLOCK)
    other = solve(problem, routing, Solver.EPLB if solver is Solver.AUTO else solver, NO_CLOCK)
    ids = routing.tokens_TLK
    load_LE = routing.mixed_LE
    if flow.moved_by_grouping:
        assert traffic(ours, ids).copies <= traffic(other, ids).copies + 1e-9
    else:
        assert (imbalance(ours, load_LE) <= imbalance(other, load_LE) + 1e-9).all()


def test_relabelling_changes_nothing_where_tokens_return_home(routing: Routing) -> None:
    problem = Problem(Cluster(4), 16, Dataflow.HOME_DEDUP)
    plan = solve(problem, routing, Solver.BALANCE, NO_CLOCK)
    ids = routing.tokens_TLK
    chained = replace(align.chain(plan, ids, np.ones(len(ids))), guide_LED=None)
    assert traffic(chained, ids).copies == pytest.approx(traffic(plan, ids).copies)


def test_pairs_are_kept_apart_and_together(routing: Routing) -> None:
    problem = Problem(Cluster(4), 16, apart=((0, 1),), together=((2, 3),), max_imbalance=2.0)
    plan = solve(problem, routing, Solver.AUTO, NO_CLOCK)
    device = dict(zip(plan.expert_LS[0].tolist(), plan.device_S.tolist(), strict=True))
    assert device[0] != device[1]
    assert device[2] == device[3]


def test_copies_of_an_expert_lie_on_different_devices(routing: Routing) -> None:
    plan = solve(Problem(Cluster(4), 24), routing, Solver.AUTO, NO_CLOCK)
    for row in plan.expert_LS.reshape(-1, 6).tolist():
        assert len(set(row)) == len(row)


def test_dear_moves_are_not_made(routing: Routing) -> None:
    problem = Problem(Cluster(4), 16, max_imbalance=1.2)
    old = solve(problem, routing, Solver.CONTIGUOUS, NO_CLOCK)

    def moved(horizon: int) -> int:
        asked = replace(problem, moves=Moves(old, 1000, 10, horizon))
        return moved_slots(old, solve(asked, routing, Solver.AUTO, NO_CLOCK))

    assert moved(horizon=100) < moved(horizon=100_000_000)


def test_slower_devices_get_less(routing: Routing) -> None:
    cluster = Cluster(4, speeds=(1.0, 1.0, 1.0, 0.5))
    problem = Problem(cluster, 24, Dataflow.REPLICATED)
    plan = solve(problem, routing, Solver.BALANCE, NO_CLOCK)
    even = solve(replace(problem, cluster=Cluster(4)), routing, Solver.BALANCE, NO_CLOCK)
    load_LE = routing.mixed_LE
    speed_D = cluster.speed_D
    assert imbalance(plan, load_LE, speed_D).max() < imbalance(even, load_LE, speed_D).max()


def test_the_exact_method_refuses_what_it_cannot_enumerate() -> None:
    with pytest.raises(PlacementError, match="too many placements"):
        dp.even_placements(64, 8)
