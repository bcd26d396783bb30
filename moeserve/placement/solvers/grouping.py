"""Group co-activated experts of a layer on few devices and nodes, under a load cap.

Every copy of an expert is an item of its own here: its tokens are known (``slots_of_tokens``), so
copies need no further rule. The search is ``search.improve``: annealed swaps on the recorded
tokens themselves, exact in the number of devices and nodes each token occupies, not on pair
counts. Layers do not depend on each other, and run in threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from moeserve.placement.layer_use import slots_of_tokens
from moeserve.placement.plan import held
from moeserve.placement.problem import Problem
from moeserve.placement.solvers.annealing import AnnealingSchedule, LayerGrouping
from moeserve.placement.solvers.covariance import load_covariance
from moeserve.placement.solvers.search import improve

F64 = NDArray[np.float64]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]

_NONE = np.zeros((0, 0), np.int64)
_FORBIDDEN = 1 << 40
_PENALTY = 8  # per unit of load above a cap; less, and few arrangements met are allowed
_DEAREST = 120  # prices are bytes; token weights may double them


def prices(problem: Problem) -> tuple[int, int]:
    """(device, node): whole prices in the ratio of what occupying one costs in copies."""
    cluster = problem.cluster
    device = 1 - 1 / cluster.devices if cluster.devices > 1 else 1.0
    node = (cluster.node_ratio - 1) * (1 - 1 / cluster.nodes)
    unit = min(16.0, _DEAREST / max(device, node))
    return max(1, round(unit * device)), round(unit * node)


def variance_prices(problem: Problem, expert_S: I32, topk_TK: I32, copies_E: I64) -> I64 | int:
    """[S, S]: what two slots on one device add to the variance of its load, in prices; 0 for
    nothing. In relative loads, and per token as copies are."""
    if problem.variance_price == 0:
        return 0
    cov_EE = load_covariance(topk_TK, len(copies_E)) / np.outer(copies_E, copies_E)
    unit = problem.variance_price * sum(prices(problem)) * problem.cluster.devices * topk_TK.size
    price_SS = np.round(unit * cov_EE[np.ix_(expert_S, expert_S)])
    np.fill_diagonal(price_SS, 0)
    return price_SS.astype(np.int64)


def bonds(problem: Problem, expert_S: I32, varying_SS: I64 | int = 0) -> I64:
    """Price of two slots sharing a device: copies of one expert and ``apart`` pairs must not, and
    others cost what they vary together."""
    slots = len(expert_S)
    twin_SS = expert_S[:, None] == expert_S[None, :]
    np.fill_diagonal(twin_SS, False)
    free = isinstance(varying_SS, int)
    if free and not (twin_SS.any() or problem.apart or problem.together):
        return _NONE
    bond_SS = np.where(twin_SS, _FORBIDDEN, varying_SS).astype(np.int64)
    for pairs, price in ((problem.apart, _FORBIDDEN), (problem.together, -_FORBIDDEN)):
        for a, b in pairs:
            both_SS = (expert_S == a)[:, None] & (expert_S == b)[None, :]
            bond_SS[both_SS | both_SS.T] = price
    assert bond_SS.shape == (slots, slots)
    return bond_SS


def moving_prices(problem: Problem, expert_S: I32, layer: int, tokens: int) -> I64:
    """Price of a slot on a device that does not hold its expert yet."""
    if problem.moves is None:
        return _NONE
    held_DE = held(problem.moves.previous)[layer]
    device = prices(problem)[0]
    per_copy = device / max(1e-9, 2 * (1 - 1 / problem.cluster.devices))
    price = round(problem.moves.copies_per_token * tokens * per_copy)
    return np.ascontiguousarray(np.where(held_DE[:, expert_S], 0, price).T).astype(np.int64)


def caps(problem: Problem, load_SW: I64, device_S: I32) -> I64:
    """Load allowed per device and workload: the limit, or what the start already needs.

    The first column is the mixture of the others, which have a limit of their own.
    """
    cluster = problem.cluster
    start_DW = np.zeros((cluster.devices, load_SW.shape[1]))
    np.add.at(start_DW, device_S, load_SW)
    fair_W = load_SW.sum(axis=0) / cluster.devices
    peak_W = (start_DW / cluster.speed_D[:, None]).max(axis=0) / fair_W
    limit_W = np.full(load_SW.shape[1], problem.max_workload_imbalance, np.float64)
    limit_W[0] = problem.max_imbalance
    limit_W = np.maximum(limit_W, peak_W)
    cap_DW: I64 = np.ceil(cluster.speed_D[:, None] * limit_W * fair_W).astype(np.int64)
    return cap_DW


def token_prices(device: int, places: int, weight_T: F64) -> U8:
    """[places, T]: the same price everywhere, scaled by the token's weight."""
    scaled_T = np.clip(np.round(device * weight_T), 1 if device else 0, 255).astype(np.uint8)
    return np.tile(scaled_T, (places, 1))


def layer_problem(
    problem: Problem,
    expert_S: I32,
    topk_TK: I32,
    load_EW: F64,
    weight_T: F64,
    layer: int,
    rebate_DT: U8 | None = None,
) -> LayerGrouping:
    """``rebate_DT`` is taken off the price of a device (migrating tokens that are near anyway)."""
    cluster = problem.cluster
    device, node = prices(problem)
    weight_DT = token_prices(device, cluster.devices, weight_T)
    if rebate_DT is not None:
        weight_DT = weight_DT - np.minimum(weight_DT, rebate_DT)
    copies_E = np.bincount(expert_S, minlength=len(load_EW))
    share_SW = (load_EW / load_EW.sum(axis=0) / copies_E[:, None])[expert_S]
    load_SW = np.round(share_SW * topk_TK.size).astype(np.int64)
    device_S = start_devices(problem)
    return LayerGrouping(
        slots_of_tokens(expert_S, topk_TK, len(load_EW)),
        cluster.node_D,
        weight_DT,
        token_prices(node, cluster.nodes, weight_T),
        load_SW,
        caps(problem, load_SW, device_S),
        _PENALTY * (device + node),
        bonds(problem, expert_S, variance_prices(problem, expert_S, topk_TK, copies_E)),
        moving_prices(problem, expert_S, layer, len(topk_TK)),
    )


def start_devices(problem: Problem) -> I32:
    slots = np.arange(problem.slots, dtype=np.int32)
    return slots // np.int32(problem.slots_per_device)


def arranged(expert_S: I32, device_S: I32) -> I32:
    """Slots in the order of their devices."""
    return expert_S[np.lexsort((expert_S, device_S))]


def group_layer(
    problem: Problem,
    expert_S: I32,
    topk_TK: I32,
    load_EW: F64,
    weight_T: F64,
    layer: int,
    schedule: AnnealingSchedule,
    rebate_DT: U8 | None = None,
) -> I32:
    """One layer regrouped: slot -> expert. Without improvement, the start itself."""
    grouping = layer_problem(problem, expert_S, topk_TK, load_EW, weight_T, layer, rebate_DT)
    device, node = prices(problem)
    heat = round(schedule.heat * (device + node) * topk_TK.size / problem.slots)
    found = improve(
        grouping,
        start_devices(problem),
        steps=schedule.swaps_per_slot * problem.slots,
        heat=heat,
        seed=schedule.seed + 1000 * layer,
        rounds=schedule.rounds,
    )
    return arranged(expert_S, found.device_S)


def each_layer(work: Callable[[int], I32], layers: Sequence[int], threads: int) -> list[I32]:
    """``work`` of every layer, in order; the native search runs without the GIL."""
    if threads < 2 or len(layers) < 2:
        return [work(l) for l in layers]
    with ThreadPoolExecutor(max_workers=threads) as pool:
        return list(pool.map(work, layers))
