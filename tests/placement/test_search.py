"""The native loops decide as their twins do, and neither is worse than it should be."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.errors import PlacementError
from moeserve.placement.solvers import search, twin
from moeserve.placement.solvers.annealing import LayerGrouping

NONE = np.zeros((0, 0), np.int64)
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=25, deadline=None)


def random_grouping(seed: int) -> tuple[LayerGrouping, np.ndarray]:
    random = np.random.default_rng(seed)
    nodes = int(random.integers(1, 3))
    devices = nodes * int(random.integers(1, 3)) * 2
    slots = devices * int(random.integers(1, 4))
    tokens, width, workloads = (
        int(random.integers(1, 90)),
        min(3, slots),
        int(random.integers(1, 3)),
    )
    slot_TK = np.stack([random.permutation(slots)[:width] for _ in range(tokens)])
    slot_TK[0, -1] = -1
    bond_SS = random.integers(-5, 5, (slots, slots))
    problem = LayerGrouping(
        slot_TK.astype(np.int32),
        (np.arange(devices) // (devices // nodes)).astype(np.int32),
        random.integers(0, 255, (devices, tokens)).astype(np.uint8),
        random.integers(0, 255, (nodes, tokens)).astype(np.uint8),
        random.integers(1, 50, (slots, workloads)),
        random.integers(20, 100, (devices, workloads)),
        3,
        bond_SS + bond_SS.T if seed % 2 else NONE,
        random.integers(0, 9, (slots, devices)) if seed % 3 else NONE,
    )
    return problem, (np.arange(slots) // (slots // devices)).astype(np.int32)


@few
@given(seeds)
def test_annealing_takes_the_decisions_of_its_twin(seed: int) -> None:
    problem, start_S = random_grouping(seed)
    fast = search.group(problem, start_S, steps=120, heat=300, seed=seed)
    slow_S = start_S.copy()
    draws = search.exponential_draws()
    slow = twin.group(problem, slow_S, draws, steps=120, heat=300, seed=seed)
    assert (fast.cost, fast.excess) == slow
    assert fast.device_S.tolist() == slow_S.tolist()


@few
@given(seeds)
def test_annealing_never_ends_worse_than_it_began(seed: int) -> None:
    problem, start_S = random_grouping(seed)
    before = search.group(problem, start_S, steps=0, heat=0, seed=seed)
    after = search.group(problem, start_S, steps=200, heat=100, seed=seed)
    assert (after.excess, after.cost) <= (before.excess, before.cost)
    assert np.bincount(after.device_S).tolist() == np.bincount(start_S).tolist()


@few
@given(seeds, st.integers(2, 8), st.integers(1, 4), st.integers(0, 2), st.integers(1, 3))
def test_balancing_takes_the_decisions_of_its_twin(
    seed: int, experts: int, devices: int, extra: int, workloads: int
) -> None:
    random = np.random.default_rng(seed)
    load_EW = random.random((experts, workloads)) ** 3
    speed_D = np.ones(devices) if seed % 2 else random.random(devices) + 0.5
    slots = devices * (-(-experts // devices) + extra)
    expert_S, top = search.balance(load_EW, speed_D, slots=slots, recounts=3)
    slow_S = np.zeros(slots, np.int32)
    assert twin.balance(load_EW, speed_D, 3, slow_S) == top
    assert expert_S.tolist() == slow_S.tolist()
    assert set(expert_S.tolist()) == set(range(experts))


@few
@given(seeds, st.integers(1, 6))
def test_an_assignment_is_the_cheapest_of_all(seed: int, size: int) -> None:
    cost_RC = np.random.default_rng(seed).integers(0, 50, (size, size)).astype(np.float64)
    rows = np.arange(size)
    best = min(cost_RC[rows, list(p)].sum() for p in itertools.permutations(range(size)))
    slow_R = np.zeros(size, np.int32)
    twin.assign(cost_RC, slow_R)
    assert cost_RC[rows, search.assign(cost_RC)].sum() == best
    assert cost_RC[rows, slow_R].sum() == best


@few
@given(seeds, st.integers(0, 4))
def test_the_saved_bound_is_that_of_its_twin(seed: int, partners: int) -> None:
    random = np.random.default_rng(seed)
    slot_TK = np.stack([random.permutation(6)[:3] for _ in range(20)]).astype(np.int32)
    fast = search.saved_bound(slot_TK, slots=6, partners=partners)
    assert fast == twin.saved_bound(slot_TK, 6, partners) / twin.PLACE


@pytest.mark.parametrize("value", ["1", "0", "", None])
def test_a_missing_native_half_is_an_error_where_it_is_required(
    monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.setitem(sys.modules, "moeserve.placement._search", None)
    if value is None:
        monkeypatch.delenv("MOESERVE_REQUIRE_NATIVE", raising=False)
    else:
        monkeypatch.setenv("MOESERVE_REQUIRE_NATIVE", value)
    if value == "1":
        with pytest.raises(PlacementError, match="not built"):
            search.core()
    else:
        assert search.core() is twin
