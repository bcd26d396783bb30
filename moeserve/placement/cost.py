"""What a plan costs on given routing: balance, and copies per token and layer in each dataflow.

Pure. The formulas, with S the devices that hold a token's experts in a layer, N their nodes, h its
home and p the device it was on (docs/placement.md says why):

=================  =====================================  =================================
dataflow           copies per token-layer                 of these across nodes
=================  =====================================  =================================
replicated         2 (D - 1), whatever the plan           2 (D - D / nodes)
home-per-expert    2 #(experts not on h)                  2 #(experts not on h's node)
home-dedup         2 |S without h|                        2 |N without h's node|
migrate            2 |S| - [p in S] - 1                   the same with nodes
=================  =====================================  =================================

Homes are uniformly distributed, and the figures their exact mean, unless a device per token is
given. A migrating token ends each layer where ``migration`` says.

Which copy of a replicated expert a token uses depends, where it returns home, on home and on the
tokens beside it (``layer_use.split_uses``), in batches of ``batch``; homes that are not given are
those of one batch after the other, in turn. Copies used by migrating tokens take turns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeserve.placement.cluster import Dataflow, Phase
from moeserve.placement.layer_use import LayerUse, layer_uses, round_robin_homes, split_uses
from moeserve.placement.migration import landing
from moeserve.placement.plan import EMPTY, Plan
from moeserve.placement.routing import Routing

BATCH = 64

F64 = NDArray[np.float64]
I32 = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Traffic:
    """Mean copies per token of each layer, dispatch and combine together."""

    copies_L: F64
    cross_L: F64

    @property
    def copies(self) -> float:
        return float(self.copies_L.mean())

    @property
    def cross(self) -> float:
        return float(self.cross_L.mean())


def priced(copies: float, cross: float, node_ratio: float) -> float:
    """Copies, those across nodes counted ``node_ratio`` times."""
    return copies + (node_ratio - 1) * cross


def slot_loads(plan: Plan, load_LE: F64) -> F64:
    """[L, S]: the copies of an expert share its load equally; an empty slot has none."""
    share_LE = load_LE / plan.copies_LE
    share_LS: F64 = np.take_along_axis(share_LE, np.maximum(plan.expert_LS, 0).astype(np.int64), 1)
    share_LS[plan.expert_LS == EMPTY] = 0.0
    return share_LS


def device_loads(plan: Plan, load_LE: F64) -> F64:
    """[L, D]."""
    by_device = slot_loads(plan, load_LE).reshape(plan.num_layers, plan.num_devices, -1)
    load_LD: F64 = by_device.sum(axis=2)
    return load_LD


def imbalance(plan: Plan, load_LE: F64, speed_D: F64 | None = None) -> F64:
    """[L]: the slowest device's time over what all would need if load divided perfectly."""
    time_LD = device_loads(plan, load_LE) / (1.0 if speed_D is None else speed_D)
    ideal_L = load_LE.sum(axis=1) / plan.num_devices
    worst_L: F64 = time_LD.max(axis=1) / ideal_L
    return worst_L


def phase_loads(load_LE: F64, phase: Phase, *, batch: int, k: int) -> F64:
    """Tokens per expert, or in decode the chance that a batch reads the expert's weights at all."""
    if phase is Phase.PREFILL:
        return load_LE
    chance_LE = np.minimum(1.0, load_LE / load_LE.sum(axis=1, keepdims=True) * k)
    read_LE: F64 = 1.0 - (1.0 - chance_LE) ** batch
    return read_LE


def split_loads(plan: Plan, topk_TLK: I32, *, home_T: I32 | None = None, batch: int = BATCH) -> F64:
    """[L, D]: pairs of token and expert that each device gets, copies chosen as senders do."""
    if home_T is None:
        home_T = round_robin_homes(len(topk_TLK), plan.num_devices, batch)
    return np.stack(
        [
            np.bincount(use.device_TK[use.device_TK >= 0], minlength=plan.num_devices)
            for use in split_uses(plan, topk_TLK, home_T, batch)
        ]
    ).astype(np.float64)


def traffic(
    plan: Plan,
    topk_TLK: I32,
    *,
    dataflow: Dataflow | None = None,
    weight_T: F64 | None = None,
    home_T: I32 | None = None,
    batch: int = BATCH,
) -> Traffic:
    """Copies of every layer on these tokens; ``home_T`` None means uniformly distributed homes."""
    flow = plan.dataflow if dataflow is None else dataflow
    weight_T = np.ones(len(topk_TLK)) if weight_T is None else weight_T
    if flow is Dataflow.REPLICATED:
        return _replicated(plan)
    if flow is Dataflow.MIGRATE:
        return _migrating(plan, topk_TLK, weight_T, home_T)
    copies, cross = [], []
    uses = layer_uses(plan, topk_TLK)
    if (plan.copies_LE > 1).any():
        home_T = (
            round_robin_homes(len(topk_TLK), plan.num_devices, batch) if home_T is None else home_T
        )
        uses = split_uses(plan, topk_TLK, home_T, batch)
    for use in uses:
        if flow is Dataflow.HOME_DEDUP:
            device_T, node_T = _without_home(plan, use, home_T)
        else:
            device_T, node_T = _per_expert(plan, use, home_T)
        copies.append(np.average(2.0 * device_T, weights=weight_T))
        cross.append(np.average(2.0 * node_T, weights=weight_T))
    return Traffic(np.array(copies), np.array(cross))


def _replicated(plan: Plan) -> Traffic:
    ones_L = np.ones(plan.num_layers)
    devices = plan.num_devices
    return Traffic(
        2.0 * (devices - 1) * ones_L, 2.0 * (devices - devices / plan.num_nodes) * ones_L
    )


def _without_home(plan: Plan, use: LayerUse, home_T: I32 | None) -> tuple[F64, F64]:
    device_T = use.used_TD.sum(axis=1).astype(np.float64)
    node_T = use.used_TN.sum(axis=1).astype(np.float64)
    if home_T is None:
        return device_T * (1 - 1 / plan.num_devices), node_T * (1 - 1 / plan.num_nodes)
    rows = np.arange(len(home_T))
    return device_T - use.used_TD[rows, home_T], node_T - use.used_TN[rows, plan.node_D[home_T]]


def _per_expert(plan: Plan, use: LayerUse, home_T: I32 | None) -> tuple[F64, F64]:
    valid_TK = use.device_TK >= 0
    if home_T is None:
        count_T = valid_TK.sum(axis=1).astype(np.float64)
        return count_T * (1 - 1 / plan.num_devices), count_T * (1 - 1 / plan.num_nodes)
    home_T1 = home_T[:, None]
    away_T = (valid_TK & (use.device_TK != home_T1)).sum(axis=1)
    inter_node_TK = valid_TK & (plan.node_D[use.device_TK] != plan.node_D[home_T1])
    return away_T.astype(np.float64), inter_node_TK.sum(axis=1).astype(np.float64)


def _migrating(plan: Plan, topk_TLK: I32, weight_T: F64, home_T: I32 | None) -> Traffic:
    copies, cross = [], []
    at_T: I32 | None = home_T
    for l, use in enumerate(layer_uses(plan, topk_TLK)):
        device_T = use.used_TD.sum(axis=1).astype(np.float64)
        node_T = use.used_TN.sum(axis=1).astype(np.float64)
        if at_T is None:
            stay_T, near_T = device_T / plan.num_devices, node_T / plan.num_nodes
        else:
            rows = np.arange(len(at_T))
            stay_T = use.used_TD[rows, at_T].astype(np.float64)
            near_T = use.used_TN[rows, plan.node_D[at_T]].astype(np.float64)
        some_T = device_T > 0
        copies.append(np.average(some_T * (2 * device_T - stay_T - 1), weights=weight_T))
        cross.append(np.average(some_T * (2 * node_T - near_T - 1), weights=weight_T))
        landed_T = landing(plan, l, topk_TLK[:, l], use)
        kept_T = landed_T if at_T is None else np.where(some_T, landed_T, at_T)
        at_T = kept_T.astype(np.int32)
    return Traffic(np.array(copies), np.array(cross))


def histogram_homes(plan: Plan, routing: Routing, *, prefix: float, slack: float = 1.25) -> I32:
    """A home per sequence: the device its first tokens used most, within ``slack`` x fair share."""
    topk_TLK, lens_C = routing.tokens_TLK, routing.seq_lens_C
    start_C = np.concatenate(([0], np.cumsum(lens_C)[:-1]))
    position_T = np.arange(len(topk_TLK)) - np.repeat(start_C, lens_C)
    early_T = position_T < np.repeat(np.maximum(1, np.ceil(prefix * lens_C)), lens_C)
    sequence_T = np.repeat(np.arange(len(lens_C)), lens_C)
    score_CD = np.zeros((len(lens_C), plan.num_devices))
    for use in layer_uses(plan, topk_TLK):
        np.add.at(score_CD, sequence_T[early_T], use.used_TD[early_T])
    score_CD /= np.maximum(1, lens_C)[:, None]
    room_D = np.full(plan.num_devices, slack * lens_C.sum() / plan.num_devices)
    home_C = np.zeros(len(lens_C), np.int32)
    for c in np.argsort(-lens_C, kind="stable"):
        fits_D = room_D >= lens_C[c]
        allowed_D = fits_D if fits_D.any() else room_D == room_D.max()
        home_C[c] = np.argmax(np.where(allowed_D, score_CD[c], -1.0))
        room_D[home_C[c]] -= lens_C[c]
    home_T: I32 = np.repeat(home_C, lens_C).astype(np.int32)
    return home_T
