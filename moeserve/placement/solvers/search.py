"""The loops of the search that cost time: native where they were built, else their twins.

``MOESERVE_REQUIRE_NATIVE=1`` makes a missing native half an error. Arguments are checked here, so
that neither side has to.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from moeserve.errors import PlacementError
from moeserve.native import native_module
from moeserve.placement.solvers import twin
from moeserve.placement.solvers.annealing import GroupedLayer, LayerGrouping

F64 = NDArray[np.float64]
I32 = NDArray[np.int32]

PLACE = twin.PLACE
WIDEST = 16  # PLACE is divisible by every count of choices up to this one


def core() -> ModuleType:
    """The native module, or the twin."""
    native, _ = native_module("moeserve.placement._search", PlacementError)
    return native or twin


def exponential_draws() -> I32:
    """1024 quantiles of the exponential distribution, times 1024."""
    return np.round(-1024 * np.log((np.arange(1024) + 0.5) / 1024)).astype(np.int32)


def group(
    problem: LayerGrouping, start_S: I32, *, steps: int, heat: int, seed: int
) -> GroupedLayer:
    """Anneal from ``start_S``; the best arrangement met, least excess first, then least cost."""
    problem.require_shapes(len(start_S))
    device_S, loops = start_S.astype(np.int32), core()
    if loops is twin:
        cost, excess = twin.group(
            problem, device_S, exponential_draws(), steps=steps, heat=heat, seed=seed
        )
        return GroupedLayer(device_S, cost, excess)
    cost, excess = loops.group(
        np.ascontiguousarray(problem.slot_TK, np.int32), device_S, problem.node_D,
        np.ascontiguousarray(problem.weight_DT), np.ascontiguousarray(problem.weight_NT),
        np.ascontiguousarray(problem.load_SW), np.ascontiguousarray(problem.cap_DW),
        problem.bond_SS, problem.price_SD, exponential_draws(), problem.penalty, heat, steps, seed,
    )  # fmt: skip
    return GroupedLayer(device_S, int(cost), int(excess))


def improve(
    problem: LayerGrouping, start_S: I32, *, steps: int, heat: int, seed: int, rounds: int
) -> GroupedLayer:
    """Anneal ``rounds`` times, each from the best so far and cooler than the one before."""
    best = group(problem, start_S, steps=steps, heat=heat, seed=seed)
    for r in range(1, rounds):
        found = group(problem, best.device_S, steps=steps, heat=heat >> r, seed=seed + r)
        if (found.excess, found.cost) < (best.excess, best.cost):
            best = found
    return best


def saved_bound(slot_TK: I32, *, slots: int, partners: int) -> float:
    """No arrangement with ``partners + 1`` slots per place saves more places than this.

    A token of k choices that occupies n places saves k - n of them.
    """
    if slot_TK.shape[1] > WIDEST:
        return float((slot_TK >= 0).sum())
    ids_TK = np.ascontiguousarray(slot_TK, np.int32)
    return int(core().saved_bound(ids_TK, slots, max(0, partners))) / PLACE


def balance(load_EW: F64, speed_D: F64, *, slots: int, recounts: int) -> tuple[I32, float]:
    """Copies and places for one layer: slot -> expert, and the largest load / speed."""
    assert slots % len(speed_D) == 0
    assert slots >= len(load_EW)
    expert_S = np.zeros(slots, np.int32)
    top = core().balance(
        np.ascontiguousarray(load_EW, np.float64),
        np.ascontiguousarray(speed_D, np.float64),
        recounts,
        expert_S,
    )
    return expert_S, float(top)


def assign(cost_RC: F64) -> I32:
    """Column of each row in the cheapest perfect assignment."""
    assert cost_RC.ndim == 2
    assert cost_RC.shape[0] == cost_RC.shape[1]
    column_R = np.zeros(len(cost_RC), np.int32)
    core().assign(np.ascontiguousarray(cost_RC, np.float64), column_R)
    return column_R
