"""Columns: exact searches equal enumeration, bounds hold, the native half equals its twin."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moeserve.errors import PlacementError
from moeserve.placement.cluster import Cluster, Dataflow
from moeserve.placement.cost import imbalance, traffic
from moeserve.placement.plan import Plan
from moeserve.placement.problem import Problem
from moeserve.placement.report import BoundEffort, figures
from moeserve.placement.routing import Routing, workload_of_tokens
from moeserve.placement.solvers.columns import generation, pricing, twin
from moeserve.placement.solvers.columns.certify import PlanBounds
from moeserve.placement.solvers.columns.generation import ColumnSearch
from moeserve.placement.solvers.columns.layer import (
    ANY_LOAD,
    TOKEN,
    ColumnLayer,
    patterns_of,
    whole_loads,
)
from moeserve.placement.solvers.columns.levels import BoundedRouting
from moeserve.placement.solvers.columns.master import (
    HighsMaster,
    NativeMaster,
    SimplexMaster,
    have_highs,
)
from moeserve.placement.solvers.columns.pairs import PairBound, pieces
from moeserve.placement.solvers.columns.pricing import Effort, PricedColumns
from moeserve.placement.solvers.portfolio import Budget, Solver, solve_bounded

few = settings(max_examples=20, deadline=None)
fewer = settings(max_examples=10, deadline=None)
seeds = st.integers(0, 2**32 - 1)
shapes = st.sampled_from([(6, 3), (8, 4), (8, 2), (9, 3)])  # items, places
UNLIMITED = Effort()
MOST = 100_000


def routed_tokens(seed: int, items: int, k: int = 3, tokens: int = 60) -> np.ndarray:
    random = np.random.default_rng(seed)
    liking = random.normal(size=(3, items)) * 1.5
    score = liking[random.integers(3, size=tokens)] + random.gumbel(size=(tokens, items))
    item_TK = np.argsort(-score, axis=1)[:, :k].astype(np.int32)
    item_TK[random.random(item_TK.shape) < 0.1] = -1
    return item_TK


def layer_of(
    seed: int, items: int, places: int, *, cap: float | None = None, at_most: bool = False
) -> ColumnLayer:
    item_TK = routed_tokens(seed, items)
    weight_T = np.random.default_rng(seed).integers(1, 4, len(item_TK)).astype(np.float64)
    item_PK, weight_P, scale = patterns_of(item_TK, weight_T)
    load_E = np.bincount(item_TK[item_TK >= 0], minlength=items) + 1.0
    least, most = -ANY_LOAD, ANY_LOAD
    size = items // places + (1 if at_most else 0)
    if cap is not None:
        share = cap / places
        load_E, most, least = whole_loads(
            load_E, float(load_E.sum()), share, 1 - (places - 1) * share
        )
    whole_E = load_E.astype(np.int64)
    return ColumnLayer(
        item_PK, weight_P, whole_E, size, places, -ANY_LOAD if at_most else least, most,
        at_most=at_most, scale=scale,
    )  # fmt: skip


def columns_of(layer: ColumnLayer) -> Iterator[tuple[int, ...]]:
    """Every allowed one."""
    sizes = range(1, layer.size + 1) if layer.at_most else [layer.size]
    for size in sizes:
        for column in itertools.combinations(range(layer.items), size):
            if layer.least_load <= layer.load_E[list(column)].sum() <= layer.most_load:
                yield column


def cost_of(layer: ColumnLayer, column: tuple[int, ...]) -> int:
    hit_P = np.isin(layer.item_PK, column).any(axis=1)
    return int(layer.weight_P[hit_P].sum()) * TOKEN


def covers_of(layer: ColumnLayer) -> Iterator[np.ndarray]:
    """Every allowed one, the blocks in the order of their first items."""

    def completed(block: list[int]) -> Iterator[list[int]]:
        if len(block) == layer.items:
            yield block
            return
        for d in range(min(max(block, default=-1) + 2, layer.places)):
            if block.count(d) < layer.size:
                yield from completed([*block, d])

    for block in completed([]):
        block_E = np.array(block, np.int32)
        if layer.allows(block_E):
            yield block_E


def prices(seed: int, layer: ColumnLayer) -> np.ndarray:
    """About what the items cost in columns, so that some columns are cheap and some dear."""
    alone = np.array([cost_of(layer, (e,)) for e in range(layer.items)])
    part = np.random.default_rng(seed).uniform(0.3, 0.9, layer.items)
    return np.floor(alone * part).astype(np.int64)


def as_pairs(item_CM: np.ndarray, reduced_C: np.ndarray) -> list[tuple[tuple[int, ...], int]]:
    rows = [tuple(e for e in row if e >= 0) for row in item_CM.tolist()]
    return sorted(zip(rows, reduced_C.tolist(), strict=True))


def cheapest_with(
    layer: ColumnLayer, every: dict[tuple[int, ...], int], threshold: int
) -> np.ndarray:
    """[E]: the least reduced cost of a column with the item, at most ``threshold``."""
    least_E = np.full(layer.items, threshold, np.int64)
    for column, reduced in every.items():
        least_E[list(column)] = np.minimum(least_E[list(column)], reduced)
    return least_E


@few
@given(seeds, shapes, st.sampled_from([None, 1.1, 1.4]), st.booleans())
def test_an_exact_search_finds_what_enumeration_does(
    seed: int, shape: tuple[int, int], cap: float | None, at_most: bool
) -> None:
    layer = layer_of(seed, *shape, cap=cap, at_most=at_most)
    price_E = prices(seed, layer)
    every = {c: cost_of(layer, c) - int(price_E[list(c)].sum()) for c in columns_of(layer)}
    threshold = int(np.median(list(every.values()))) if every else 0
    expected = sorted((c, x) for c, x in every.items() if x < threshold)
    floor_E = cheapest_with(layer, every, threshold)
    found = pricing.price(layer, price_E, threshold, most=MOST, effort=UNLIMITED)
    slow = twin.price(layer, price_E, threshold, MOST, False, 1 << 60, float("inf"))
    assert as_pairs(found.item_CM, found.reduced_C) == expected == as_pairs(slow[0], slow[1])
    assert found.complete
    assert slow[3]
    assert found.floor_E.tolist() == floor_E.tolist() == slow[2].tolist()
    fewer = pricing.price(layer, price_E, threshold, most=5, effort=UNLIMITED, fewer=True)
    slow = twin.price(layer, price_E, threshold, 5, True, 1 << 60, float("inf"))
    for part in (fewer, PricedColumns(*slow)):
        met = as_pairs(part.item_CM, part.reduced_C)
        assert part.complete
        assert set(met) <= set(expected)
        cheapest = sorted(x for _, x in expected)[: len(met)]
        assert sorted(x for _, x in met) == cheapest
        below = int(part.floor_E.max())
        assert part.floor_E.tolist() == cheapest_with(layer, dict(met), below).tolist()
        assert (part.floor_E <= floor_E).all()


@few
@given(seeds, shapes, st.integers(0, 30), st.integers(1, 4), st.booleans())
def test_a_search_cut_short_still_gives_a_floor(
    seed: int, shape: tuple[int, int], nodes: int, most: int, at_most: bool
) -> None:
    layer = layer_of(seed, *shape, cap=1.3, at_most=at_most)
    price_E = prices(seed, layer)
    every = {c: cost_of(layer, c) - int(price_E[list(c)].sum()) for c in columns_of(layer)}
    cheapest_E = cheapest_with(layer, every, TOKEN)
    for effort, fewer in itertools.product((Effort(nodes), Effort(seconds=0.0)), (False, True)):
        limits = (TOKEN, most, fewer, effort.nodes, effort.seconds)
        for found in (
            pricing.price(layer, price_E, TOKEN, most=most, effort=effort, fewer=fewer),
            PricedColumns(*twin.price(layer, price_E, *limits)),
        ):
            assert (found.floor_E <= cheapest_E).all()


@few
@given(seeds, shapes, st.sampled_from([None, 1.2]), st.booleans())
def test_descents_take_the_decisions_of_the_twin(
    seed: int, shape: tuple[int, int], cap: float | None, at_most: bool
) -> None:
    layer = layer_of(seed, *shape, cap=cap, at_most=at_most)
    price_E = prices(seed, layer)
    start_CM = np.full((4, layer.size), -1, np.int32)
    start_CM[:, 0] = np.arange(4)
    item_CM, reduced_C = pricing.descend(
        layer, price_E, start_CM, 5 * TOKEN, most=20, seed=seed % 1000
    )
    slow_CM, slow_C = twin.descend(layer, price_E, start_CM, 5 * TOKEN, 20, seed % 1000)
    assert item_CM.tolist() == slow_CM.tolist()
    assert reduced_C.tolist() == slow_C.tolist()
    for column, reduced in as_pairs(item_CM, reduced_C):
        assert cost_of(layer, column) - price_E[list(column)].sum() == reduced
        assert layer.least_load <= layer.load_E[list(column)].sum() <= layer.most_load


@few
@given(seeds, shapes, st.sampled_from([None, 1.2]), st.floats(0.0, 1.0))
def test_a_cover_is_the_cheapest_within_its_budget(
    seed: int, shape: tuple[int, int], cap: float | None, part: float
) -> None:
    layer = layer_of(seed, *shape, cap=cap)
    price_E = prices(seed, layer)
    every = [(c, cost_of(layer, c) - int(price_E[list(c)].sum())) for c in columns_of(layer)]
    if not every:
        return
    price_E += min(0, min(x for _, x in every)) // layer.size  # no column is negative now
    base = int(price_E.sum())
    best = min((layer.cost_of(b) - base for b in covers_of(layer)), default=None)
    budget = int((part + 0.5) * (best if best is not None else TOKEN)) + 1
    whole = budget // 2
    listed = pricing.price(layer, price_E, whole + 1, most=MOST, effort=UNLIMITED)
    found = pricing.cover(layer, price_E, listed, whole=whole, budget=budget, effort=UNLIMITED)
    order = np.argsort(listed.reduced_C, kind="stable")
    slow = twin.cover(
        layer, price_E, (listed.item_CM[order], listed.reduced_C[order]), whole, budget, 1 << 60,
        float("inf"),
    )  # fmt: skip
    assert found.complete
    assert found.value == slow[1] == (budget if best is None or best >= budget else best)
    assert (found.block_E is None) == (best is None or best >= budget)
    if found.block_E is not None:
        assert layer.allows(found.block_E)
        assert layer.cost_of(found.block_E) - base == best


def start_of(layer: ColumnLayer) -> np.ndarray:
    return (np.arange(layer.items) % layer.places).astype(np.int32)


@fewer
@given(seeds, shapes, st.sampled_from([None, 1.15]))
def test_a_search_that_ends_has_proven_the_best_cover(
    seed: int, shape: tuple[int, int], cap: float | None
) -> None:
    layer = layer_of(seed, *shape, cap=cap)
    search = ColumnSearch(layer, [start_of(layer)])
    best = min((layer.cost_of(b) for b in covers_of(layer)), default=None)
    bound = search.bound
    while not search.done:
        search.step(UNLIMITED)
        assert search.bound >= bound
        bound = search.bound
        assert best is None or bound <= best
    if best is not None:
        found = search.certified()
        assert found.proven
        assert found.bound == layer.in_tokens(best)
        if found.block_E is not None:
            assert layer.allows(found.block_E)
            assert layer.cost_of(found.block_E) == best


@fewer
@given(seeds, shapes, st.integers(0, 12), st.booleans())
def test_a_bound_is_valid_whenever_the_search_is_stopped(
    seed: int, shape: tuple[int, int], nodes: int, at_most: bool
) -> None:
    layer = layer_of(seed, *shape, cap=1.3, at_most=at_most)
    best = min((layer.cost_of(b) for b in covers_of(layer)), default=None)
    search = ColumnSearch(layer, [start_of(layer)])
    while not search.done and best is not None:
        search.step(Effort(nodes))
        assert search.bound <= best
        assert search.best is None or search.best >= best


@fewer
@given(seeds, st.sampled_from([(6, 2), (8, 4), (8, 2), (9, 3)]), st.sampled_from([None, 1.15]))
def test_a_bound_on_pairs_is_below_every_cover_at_every_step(
    seed: int, shape: tuple[int, int], cap: float | None
) -> None:
    layer = layer_of(seed, *shape, cap=cap)
    best = min((layer.cost_of(b) for b in covers_of(layer)), default=None)
    pairs = PairBound(layer)
    for _ in range(5):
        bound = pairs.run(40)  # triangles enter at 100
        assert best is None or 0 <= bound <= best


@few
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6))
def test_pieces_are_below_every_split_and_touch_the_widest(
    items: int, size: int, places: int
) -> None:
    if items > size * places:
        return
    lines = pieces(items, size, places)
    for parts in itertools.product(range(size + 1), repeat=min(places, 4)):
        if sum(parts) == items:
            pairs = sum(p * (p - 1) // 2 for p in parts)
            least = max(base - slope * pairs for base, slope in lines)
            assert least <= sum(p > 0 for p in parts) + 1e-9
            if max(parts) == items:
                assert least == pytest.approx(1.0)


def test_large_groups_are_bounded_by_pairs_first() -> None:
    item_TK = routed_tokens(3, 40, tokens=200)
    item_PK, weight_P, scale = patterns_of(item_TK, np.ones(len(item_TK)))
    load_E = np.bincount(item_TK[item_TK >= 0], minlength=40)
    layer = ColumnLayer(item_PK, weight_P, load_E, 20, 2, scale=scale)
    search = ColumnSearch(layer, [start_of(layer)])
    at_first = search.bound
    assert search.stage is generation.Stage.PAIRS
    search.step(UNLIMITED)
    assert at_first < search.bound <= layer.cost_of(start_of(layer))


def test_without_the_native_half_the_search_ends_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(5, 8, 4, cap=1.3)
    search = ColumnSearch(layer, [start_of(layer)])
    while not search.done:
        search.step(UNLIMITED)
    monkeypatch.setitem(sys.modules, "moeserve.placement._columns", None)
    monkeypatch.delenv("MOESERVE_REQUIRE_NATIVE", raising=False)
    assert pricing.core() is twin
    slow = ColumnSearch(layer, [start_of(layer)])
    while not slow.done:
        slow.step(UNLIMITED)
    assert (slow.bound, slow.best) == (search.bound, search.best)
    monkeypatch.setenv("MOESERVE_REQUIRE_NATIVE", "1")
    with pytest.raises(PlacementError, match="not built"):
        pricing.core()


def test_two_searches_of_one_layer_take_the_same_steps() -> None:
    layer = layer_of(7, 9, 3, cap=1.3)
    runs = []
    for _ in range(2):
        search = ColumnSearch(layer, [start_of(layer)])
        seen = []
        while not search.done:
            search.step(Effort(nodes=200))
            seen.append((search.stage, search.bound, search.best))
        runs.append(seen)
    assert runs[0] == runs[1]


@few
@example(1878565001, (6, 3), False)  # an item that left its place outside of columns comes back
@given(seeds, shapes, st.booleans())
def test_the_master_is_the_relaxation_over_its_columns(
    seed: int, shape: tuple[int, int], at_most: bool
) -> None:
    """Dual feasible with the value of its shares: that is optimal."""
    layer = layer_of(seed, *shape, at_most=at_most)
    columns = list(columns_of(layer))[:: 1 + seed % 3]
    item_CM = np.array([list(c) + [-1] * (layer.size - len(c)) for c in columns], np.int32)
    cost_C = np.array([cost_of(layer, c) / TOKEN for c in columns])
    alone_E = np.full(layer.items, 100 * cost_C.max())
    kinds = [NativeMaster, SimplexMaster, *([HighsMaster] if have_highs() else [])]
    values = []
    for kind in kinds:
        master = kind(layer.items, layer.size, layer.places, alone_E, counted=at_most)
        half = len(columns) // 2
        for part in (slice(None, half), slice(half, None)):
            master.add(item_CM[part], cost_C[part])
            found = master.solve()
        dual = found.price_E.sum() + layer.places * found.place_price
        for column, cost in zip(columns, cost_C, strict=True):
            prices_and_place = found.price_E[list(column)].sum() + found.place_price
            assert prices_and_place <= cost + 1e-6 * (1 + cost)
        assert found.place_price <= 0
        assert dual == pytest.approx(found.value, rel=1e-4)
        values.append(found.value)
    assert values == pytest.approx([values[0]] * len(values), rel=1e-4)


def random_plan(seed: int, slots: int, devices: int, nodes: int, flow: Dataflow) -> Plan:
    random = np.random.default_rng(seed)
    row_S = np.concatenate((np.arange(8), random.permutation(8)[: slots - 8]))
    row_S = random.permutation(row_S).astype(np.int32)
    return Plan(row_S[None], 8, devices, nodes, (0,), flow)


@fewer
@given(
    seeds, st.sampled_from([Dataflow.HOME_DEDUP, Dataflow.MIGRATE]),
    st.sampled_from([(4, 1), (4, 2), (2, 1)]), st.sampled_from([8, 12]), st.booleans(),
)  # fmt: skip
def test_no_plan_as_balanced_has_fewer_copies_than_the_bound(
    seed: int, flow: Dataflow, shape: tuple[int, int], slots: int, weighted: bool
) -> None:
    """Of plans with the same copies of each expert, nodes and devices counted together."""
    devices, nodes = shape
    topk_TLK = routed_tokens(seed, 8, tokens=40)[:, None]
    weight_T = np.random.default_rng(seed).choice([0.5, 1.25], 40) if weighted else np.ones(40)
    load_LE = np.random.default_rng(seed).random((1, 8)) + 0.1
    cluster = Cluster(devices, nodes, node_ratio=3.0)
    plan = random_plan(seed, slots, devices, nodes, flow)
    most = float(imbalance(plan, load_LE).max())
    bounds = PlanBounds(
        plan, BoundedRouting(topk_TLK, weight_T, load_LE), cluster, np.array([most])
    )
    bounds.run(seconds=None, nodes=3000)
    bound = float(bounds.bound_L()[0])
    random = np.random.default_rng(seed)
    for _ in range(15):
        other = Plan(random.permutation(plan.expert_LS[0])[None], 8, devices, nodes, (0,), flow)
        if imbalance(other, load_LE).max() <= most + 1e-12:
            moves = traffic(other, topk_TLK, weight_T=weight_T)
            assert moves.copies + 2 * moves.cross >= bound - 1e-9


def routing_of(topk: np.ndarray, experts: int) -> Routing:
    layers = tuple(range(topk.shape[1]))
    return Routing((workload_of_tokens("toy", topk, None, num_experts=experts),), layers)


def test_planted_groups_are_proven_to_be_the_best(planted) -> None:
    topk = planted(tokens=300, layers=2, groups=4, size=4, k=3)
    problem = Problem(Cluster(4), 16, max_imbalance=1.5)
    budget = Budget(seconds=None, threads=1, branch=True)
    solved = solve_bounded(problem, routing_of(topk, 16), Solver.AUTO, budget)
    assert solved.bound_L is not None
    assert solved.bound_L == pytest.approx([2 * 3 / 4] * 2)
    assert traffic(solved.plan, topk).copies_L == pytest.approx(solved.bound_L)


def test_branching_keeps_the_load_limit_and_its_bound(topk) -> None:
    ids = topk(tokens=300, layers=2, experts=16, k=3)
    routing = routing_of(ids, 16)
    problem = Problem(Cluster(4), 16, max_imbalance=1.05)
    budget = Budget(seconds=None, threads=2)
    plain = solve_bounded(problem, routing, Solver.AUTO, budget)
    assert plain.bound_L is None
    branch = Budget(seconds=None, threads=2, branch=True)
    solved = solve_bounded(problem, routing, Solver.AUTO, branch)
    copies_L = traffic(solved.plan, ids).copies_L
    assert (copies_L <= traffic(plain.plan, ids).copies_L + 1e-9).all()
    assert (solved.bound_L <= copies_L + 1e-9).all()
    load_LE = routing.mixed_LE
    allowed_L = np.maximum(1.05, imbalance(plain.plan, load_LE))
    assert (imbalance(solved.plan, load_LE) <= allowed_L + 1e-3).all()
    again = solve_bounded(problem, routing, Solver.AUTO, branch)
    assert again.plan.expert_LS.tolist() == solved.plan.expert_LS.tolist()


def test_figures_say_which_bound_they_have(topk) -> None:
    routing = routing_of(topk(tokens=200, layers=2, experts=16, k=3), 16)
    rows = np.tile(np.arange(16, dtype=np.int32), (2, 1))
    plan = Plan(rows, 16, 4, 1, (0, 1))
    at_once = figures(plan, routing, Cluster(4))
    longer = figures(plan, routing, Cluster(4), effort=BoundEffort(20.0, 1))
    assert at_once["bound_is"] == "pairs of experts, any balance"
    assert longer["bound_is"] == "columns"
    assert at_once["bound"] < longer["bound"] <= longer["objective"] == at_once["objective"]
    assert len(longer["bound_per_layer"]) == 2
    assert longer["gap"] == pytest.approx(longer["objective"] / longer["bound"] - 1)


def test_stages_come_in_their_order() -> None:
    layer = layer_of(11, 9, 3)
    search = ColumnSearch(layer, [start_of(layer)])
    seen = []
    while not search.done:
        search.step(UNLIMITED)
        seen.append(search.progress)
    assert seen[:-1] == sorted(seen[:-1])
    assert search.stage is generation.Stage.DONE


@pytest.mark.timeout(120)
def test_the_integer_program_proves_what_searches_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "_BUDGETS", (0.0,))
    layer = layer_of(15, 9, 3, cap=1.3)
    search = ColumnSearch(layer, [start_of(layer)])
    while search.stage is not generation.Stage.PROGRAM:
        search.step(UNLIMITED)
        assert not search.done
    best = min(layer.cost_of(b) for b in covers_of(layer))
    assert search.bound < best
    search.step(Effort(seconds=60.0))
    assert search.done
    assert search.bound == search.best == best
