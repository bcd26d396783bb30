"""What no plan can beat: lower bounds, cheap and valid for every plan they speak of.

Balance bounds hold for any placement in the given slots. Copy bounds hold for any placement with
the given copies of each expert (with one copy each: for any placement at all); they leave the load
cap aside, so they hold with it too. Where a sender may choose among copies (every dataflow but
``migrate``), replicated experts are left out of a token's choices, since they may cost nothing, and
one device of each token may be its home.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from moeserve.placement.cluster import Dataflow
from moeserve.placement.cost import priced
from moeserve.placement.layer_use import slots_of_tokens
from moeserve.placement.plan import Plan
from moeserve.placement.solvers.search import saved_bound

F64 = NDArray[np.float64]
I32 = NDArray[np.int32]


def least_peak(load_E: F64, slots: int, devices: int) -> float:
    """The heaviest copy, when the extra slots are spent as well as can be to make it light."""
    heap = [(-float(x), 1, float(x)) for x in load_E]
    heapq.heapify(heap)
    for _ in range(slots - len(load_E)):
        top, copies, load = heap[0]
        if copies == devices:
            break
        heapq.heapreplace(heap, (-load / (copies + 1), copies + 1, load))
        del top
    return -heap[0][0]


def balance_bound(load_E: F64, speed_D: F64, slots: int) -> float:
    """No placement has a smaller max over devices of load / speed over the ideal."""
    devices = len(speed_D)
    ideal = float(load_E.sum()) / devices
    bound = least_peak(load_E, slots, devices) / float(speed_D.max())
    if slots == len(load_E) and float(np.ptp(speed_D)) == 0:
        bound = max(bound, _pigeonholes(load_E, devices))
    return max(1.0, bound / ideal)


def _pigeonholes(load_E: F64, devices: int) -> float:
    """Of the j D + 1 heaviest experts, j + 1 share a device, with the lightest to fill it."""
    heavy_E = np.sort(load_E)[::-1]
    per_device = len(load_E) // devices
    light = np.concatenate(([0.0], np.cumsum(heavy_E[::-1])))
    best = 0.0
    for j in range(per_device):
        last = j * devices
        together = float(heavy_E[last - j : last + 1].sum())
        best = max(best, together + float(light[per_device - j - 1]))
    return best


def mean_balance_bound(load_LE: F64, speed_D: F64, slots: int) -> float:
    return float(np.mean([balance_bound(load_E, speed_D, slots) for load_E in load_LE]))


def places_bound(slot_TK: I32, weight_T: F64, *, slots: int, places: int) -> float:
    """Mean number of devices (or nodes) that a token occupies, at the least.

    Tokens of one weight are bounded together; over several weights, bounds add up.
    """
    sums = [
        float(w) * _least_places(slot_TK[weight_T == w], slots, places) for w in np.unique(weight_T)
    ]
    return sum(sums) / float(weight_T.sum())


def _least_places(slot_TK: I32, slots: int, places: int) -> float:
    per_place = slots // places
    choices_T = (slot_TK >= 0).sum(axis=1)
    full = float(np.ceil(choices_T / per_place).sum())
    if places == 1 or not slot_TK.size:
        return full
    saved = saved_bound(slot_TK, slots=slots, partners=per_place - 1)
    return max(full, float(choices_T.sum()) - saved)


def copies_bound(
    plan: Plan,
    topk_TLK: I32,
    *,
    node_ratio: float,
    dataflow: Dataflow | None = None,
    weight_T: F64 | None = None,
) -> float:
    """Mean over layers of ``copies_bounds``."""
    bound_L = copies_bounds(
        plan, topk_TLK, node_ratio=node_ratio, dataflow=dataflow, weight_T=weight_T
    )
    return float(bound_L.mean())


def copies_bounds(
    plan: Plan,
    topk_TLK: I32,
    *,
    node_ratio: float,
    dataflow: Dataflow | None = None,
    weight_T: F64 | None = None,
    any_home: bool = False,
) -> F64:
    """[L]: priced copies per token that no plan with these copies of each expert goes below.

    ``any_home``: homes may lie where a token's experts are, instead of evenly.
    """
    flow = plan.dataflow if dataflow is None else dataflow
    assert flow.moved_by_grouping
    weight_T = np.ones(len(topk_TLK)) if weight_T is None else weight_T
    chosen_at_home = flow is Dataflow.HOME_DEDUP and bool((plan.copies_LE > 1).any())
    bounds = []
    for l in range(plan.num_layers):
        topk_TK = topk_TLK[:, l]
        if chosen_at_home:
            single_E = plan.copies_LE[l] == 1
            topk_TK = np.where((topk_TK >= 0) & single_E[topk_TK], topk_TK, np.int32(-1))
        slot_TK = slots_of_tokens(plan.expert_LS[l], topk_TK, plan.num_experts)
        device = places_bound(slot_TK, weight_T, slots=plan.num_slots, places=plan.num_devices)
        node = places_bound(slot_TK, weight_T, slots=plan.num_slots, places=plan.num_nodes)
        spared = flow is Dataflow.MIGRATE or chosen_at_home or any_home
        copies = _one_spared if spared else _mean_over_homes
        bounds.append(copies(plan, device, node, node_ratio))
    return np.array(bounds)


def _mean_over_homes(plan: Plan, device: float, node: float, node_ratio: float) -> float:
    copies = 2 * device * (1 - 1 / plan.num_devices)
    cross = 2 * node * (1 - 1 / plan.num_nodes)
    return priced(copies, cross if plan.num_nodes > 1 else 0.0, node_ratio)


def _one_spared(plan: Plan, device: float, node: float, node_ratio: float) -> float:
    """A token begins on one of its devices."""
    copies, cross = max(0.0, 2 * device - 2), max(0.0, 2 * node - 2)
    return priced(copies, cross if plan.num_nodes > 1 else 0.0, node_ratio)
