"""The layers of a plan as problems of columns: what any plan of its kind pays at each level.

A level is the devices, or the nodes: a token pays for every place of each that it touches, so the
least of both levels together is a bound on their sum. Which items are grouped:

- one copy of each expert: the experts, m = E / D on each place, exactly;
- copies that take turns (``migrate``): the slots, whose tokens are fixed by the number of copies;
- copies that senders choose among (``home-dedup``): the experts with one copy, at most m = S / D on
  each place. A token touches at least the places of these, one of which may be its home.

The load of a column is limited by ``most``, the largest max/mean load of the plans spoken of; what
the other places cannot take gives the least load.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeserve.placement.cluster import Cluster, Dataflow
from moeserve.placement.cost import imbalance
from moeserve.placement.layer_use import slots_of_tokens
from moeserve.placement.plan import Plan
from moeserve.placement.solvers.columns.layer import (
    ANY_LOAD,
    MOST_ITEMS,
    WIDEST,
    ColumnLayer,
    patterns_of,
    whole_loads,
)

F64 = NDArray[np.float64]
I32 = NDArray[np.int32]

_ROUNDING = 1e-9  # of loads that are fractions


@dataclass(frozen=True, slots=True, eq=False)
class Level:
    """One level of one layer: ``price`` copies a token-layer for each token of a column, less
    ``spared``. ``block_E`` is the plan's own cover.
    """

    layer: ColumnLayer
    price: float
    spared: float
    block_E: I32


@dataclass(frozen=True, slots=True, eq=False)
class BoundedRouting:
    """What a bound is on: tokens with weights, and the loads that plans have to keep balanced."""

    topk_TLK: I32
    weight_T: F64
    load_LE: F64
    any_home: bool = False  # whether homes may lie where the experts are, not evenly

    def most_L(self, plan: Plan, cluster: Cluster, limit: float) -> F64:
        """[L]: the limit on max/mean load, or what the plan needs."""
        own_L = imbalance(plan, self.load_LE, cluster.speed_D)
        most_L: F64 = np.maximum(limit, own_L)
        return most_L


def levels_of(
    plan: Plan, routing: BoundedRouting, cluster: Cluster, most: float, l: int
) -> tuple[Level, ...]:
    """The levels of layer ``l``; none where the layer is larger than columns are made for."""
    topk_TK = routing.topk_TLK[:, l]
    if plan.num_slots > MOST_ITEMS or topk_TK.shape[1] > WIDEST:
        return ()
    chosen = plan.dataflow is Dataflow.HOME_DEDUP and bool((plan.copies_LE[l] > 1).any())
    if chosen and (plan.copies_LE[l] > 1).all():
        return ()
    spare_one = chosen or routing.any_home or plan.dataflow is Dataflow.MIGRATE
    found = []
    for places, price in ((plan.num_devices, 1.0), (plan.num_nodes, cluster.node_ratio - 1)):
        if places == 1 or price == 0:
            continue
        speed_P = cluster.speed_D.reshape(places, -1).sum(axis=1)
        level = _chosen if chosen else _whole
        layer, block_E = level(plan, routing, most * speed_P / cluster.devices, l)
        touched = float(layer.weight_P.sum()) / layer.scale
        per_token = 2 * price / float(routing.weight_T.sum())
        if spare_one:
            found.append(Level(layer, per_token, per_token * touched, block_E))
        else:
            found.append(Level(layer, per_token * (1 - 1 / places), 0.0, block_E))
    return tuple(found)


def _whole(plan: Plan, routing: BoundedRouting, most_P: F64, l: int) -> tuple[ColumnLayer, I32]:
    """All slots; ``most_P`` is the share of the load that each place may have."""
    row_S, places = plan.expert_LS[l], len(most_P)
    order = np.argsort(row_S, kind="stable")
    place_of = (np.arange(plan.num_slots) // (plan.num_slots // places))[order].astype(np.int32)
    slot_TK = slots_of_tokens(row_S[order], routing.topk_TLK[:, l], plan.num_experts)
    item_PK, weight_P, scale = patterns_of(slot_TK, routing.weight_T)
    share_S = (routing.load_LE[l] / plan.copies_LE[l])[row_S[order]]
    least = 1.0 - float(most_P.sum() - most_P.min())
    load_S, top, low = whole_loads(
        share_S, float((slot_TK >= 0).sum()), float(most_P.max()) + _ROUNDING, least - _ROUNDING
    )
    size = plan.num_slots // places
    return ColumnLayer(item_PK, weight_P, load_S, size, places, low, top, scale=scale), place_of


def _chosen(plan: Plan, routing: BoundedRouting, most_P: F64, l: int) -> tuple[ColumnLayer, I32]:
    """Experts with one copy; the others may lie where a token goes anyway."""
    row_S, topk_TK = plan.expert_LS[l], routing.topk_TLK[:, l]
    single_E = plan.copies_LE[l] == 1
    item_E = np.where(single_E, np.cumsum(single_E) - 1, -1).astype(np.int32)
    item_TK = np.where(topk_TK >= 0, item_E[topk_TK], np.int32(-1))
    item_PK, weight_P, scale = patterns_of(item_TK, routing.weight_T)
    places = len(most_P)
    size = min(plan.num_slots // places, int(single_E.sum()))
    share_E = routing.load_LE[l] / routing.load_LE[l].sum()
    load_E, top, _ = whole_loads(
        np.append(share_E[single_E], share_E[~single_E].sum()), float((topk_TK >= 0).sum()),
        float(most_P.max()) + _ROUNDING, 0.0,
    )  # fmt: skip
    place_S = np.arange(plan.num_slots) // (plan.num_slots // places)
    place_E = np.zeros(plan.num_experts, np.int32)
    place_E[row_S] = place_S
    layer = ColumnLayer(
        item_PK, weight_P, np.ascontiguousarray(load_E[:-1]), size, places, -ANY_LOAD, top,
        at_most=True, scale=scale,
    )  # fmt: skip
    return layer, place_E[single_E]
