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
given. A migrating token ends each layer on the device in S with the largest guide sum.

Which copy of a replicated expert a token uses depends, where it returns home, on home and on the
tokens beside it (``split``): tokens of one home are cut into batches of ``batch``, in their order;
homes that are not given are those of one batch after the other, in turn. A migrating token with
index t uses copy ``t % copies``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeserve.errors import PlacementError
from moeserve.placement.cluster import Dataflow, Phase
from moeserve.placement.plan import Plan
from moeserve.placement.routing import Routing
from moeserve.placement.split import split_batches

BATCH = 64
_LANES = 8192  # batches split at once, which bounds memory

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
    """[L, S]: the copies of an expert share its load equally."""
    share_LE = load_LE / plan.copies_LE
    share_LS: F64 = np.take_along_axis(share_LE, plan.expert_LS.astype(np.int64), axis=1)
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


def slots_of_tokens(expert_S: I32, topk_TK: I32, num_experts: int) -> I32:
    """[T, K] slots, -1 kept: token t uses copy ``t % copies`` of each expert."""
    order_S = np.argsort(expert_S, kind="stable").astype(np.int32)
    copies_E = np.bincount(expert_S, minlength=num_experts)
    first_E = np.concatenate(([0], np.cumsum(copies_E)[:-1]))
    expert_TK = np.maximum(topk_TK, 0)
    token_T = np.arange(len(topk_TK))[:, None]
    slot_TK = order_S[first_E[expert_TK] + token_T % copies_E[expert_TK]]
    return np.where(topk_TK >= 0, slot_TK, np.int32(-1)).astype(np.int32)


def occupied(device_TK: I32, devices: int) -> NDArray[np.bool_]:
    """[T, D]: does the token use the device; -1 is none."""
    used_TD = np.zeros((len(device_TK), devices + 1), np.bool_)
    np.put_along_axis(used_TD, np.where(device_TK < 0, devices, device_TK), True, axis=1)
    return used_TD[:, :devices]


@dataclass(frozen=True, slots=True, eq=False)
class LayerUse:
    """Where the tokens of one layer go."""

    device_TK: I32
    used_TD: NDArray[np.bool_]
    used_TN: NDArray[np.bool_]


def layer_uses(plan: Plan, topk_TLK: I32) -> Iterator[LayerUse]:
    """Copies of an expert take turns."""
    _check_routing(plan, topk_TLK)
    for l in range(plan.num_layers):
        yield _use(plan, slots_of_tokens(plan.expert_LS[l], topk_TLK[:, l], plan.num_experts))


def split_uses(plan: Plan, topk_TLK: I32, home_T: I32, batch: int) -> Iterator[LayerUse]:
    """Copies of an expert are chosen as senders do, each a batch of its own tokens at a time."""
    _check_routing(plan, topk_TLK)
    place_BT, home_B = batches_of(home_T, batch)
    padded_BT = np.where(place_BT < 0, len(topk_TLK), place_BT)
    none_1LK = np.full((1, *topk_TLK.shape[1:]), -1, np.int32)
    topk_T1LK = np.concatenate((topk_TLK, none_1LK))
    together = max(1, _LANES // max(1, len(home_B)))
    for first in range(0, plan.num_layers, together):
        rows_LS = plan.expert_LS[first : first + together]
        ids_BTLK = topk_T1LK[padded_BT, first : first + together]
        ids_LBTK = np.moveaxis(ids_BTLK, 2, 0)
        chosen = split_batches(
            ids_LBTK.reshape(-1, *ids_LBTK.shape[2:]),
            np.repeat(rows_LS, len(home_B), axis=0),
            plan.num_experts,
            ranks=plan.num_devices,
            home_B=np.tile(home_B, len(rows_LS)),
        ).reshape(ids_LBTK.shape)
        for slot_BTK in chosen:
            slot_TK = np.empty_like(topk_TLK[:, 0])
            slot_TK[place_BT[place_BT >= 0]] = slot_BTK[place_BT >= 0]
            yield _use(plan, slot_TK)


def batches_of(home_T: I32, batch: int) -> tuple[I32, I32]:
    """[B, T] indices of each home's tokens, -1 behind the last of a batch; and the home of each."""
    places, homes = [], []
    for home in np.unique(home_T):
        at_T = np.flatnonzero(home_T == home)
        for start in range(0, len(at_T), batch):
            part = at_T[start : start + batch]
            places.append(np.pad(part, (0, batch - len(part)), constant_values=-1))
            homes.append(home)
    return np.array(places, np.int32).reshape(-1, batch), np.array(homes, np.int32)


def turns(tokens: int, devices: int, batch: int) -> I32:
    """One batch after the other, each at the next home."""
    home_T: I32 = (np.arange(tokens) // batch % devices).astype(np.int32)
    return home_T


def _check_routing(plan: Plan, topk_TLK: I32) -> None:
    if topk_TLK.shape[1] != plan.num_layers:
        raise PlacementError(
            f"the routing has {topk_TLK.shape[1]} layers, the plan {plan.num_layers}"
        )
    if topk_TLK.max(initial=-1) >= plan.num_experts:
        raise PlacementError(
            f"unknown expert {topk_TLK.max()} in the routing; the plan knows {plan.num_experts}"
        )


def _use(plan: Plan, slot_TK: I32) -> LayerUse:
    device_TK = np.where(slot_TK >= 0, slot_TK // plan.slots_per_device, -1).astype(np.int32)
    node_TK = np.where(device_TK >= 0, plan.node_D[device_TK], -1).astype(np.int32)
    used_TD = occupied(device_TK, plan.num_devices)
    return LayerUse(device_TK, used_TD, occupied(node_TK, plan.num_nodes))


def split_loads(plan: Plan, topk_TLK: I32, *, home_T: I32 | None = None, batch: int = BATCH) -> F64:
    """[L, D]: pairs of token and expert that each device gets, copies chosen as senders do."""
    home_T = turns(len(topk_TLK), plan.num_devices, batch) if home_T is None else home_T
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
        home_T = turns(len(topk_TLK), plan.num_devices, batch) if home_T is None else home_T
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
    abroad_TK = valid_TK & (plan.node_D[use.device_TK] != plan.node_D[home_T1])
    return away_T.astype(np.float64), abroad_TK.sum(axis=1).astype(np.float64)


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


def landing(plan: Plan, l: int, topk_TK: I32, use: LayerUse) -> I32:
    """Where the tokens are after layer ``l``: of their own devices, the best guess for the next."""
    if plan.guide_LED is None:
        score_TD = np.zeros(use.used_TD.shape, np.int64)
        for k in range(use.device_TK.shape[1]):
            valid = use.device_TK[:, k] >= 0
            np.add.at(score_TD, (np.flatnonzero(valid), use.device_TK[valid, k]), 1)
    else:
        padded_ED = np.vstack((plan.guide_LED[l], np.zeros_like(plan.guide_LED[l][:1])))
        score_TD = np.zeros(use.used_TD.shape, np.int64)
        for k in range(topk_TK.shape[1]):
            score_TD += padded_ED[topk_TK[:, k]]
    best_T: I32 = np.argmax(np.where(use.used_TD, score_TD + 1, 0), axis=1).astype(np.int32)
    return best_T


def fit_guide(plan: Plan, topk_TLK: I32) -> NDArray[np.uint8]:
    """[L, E, D]: how often tokens of an expert use a device in the layer after, of 255."""
    shape = (plan.num_layers, plan.num_experts, plan.num_devices)
    guide_LED = np.zeros(shape, np.uint8)
    uses = layer_uses(plan, topk_TLK)
    next(uses)
    for l, use in enumerate(uses):
        hits_ED = np.zeros(shape[1:])
        seen_E = np.zeros(shape[1])
        for k in range(topk_TLK.shape[2]):
            expert_T = topk_TLK[:, l, k]
            valid = expert_T >= 0
            np.add.at(seen_E, expert_T[valid], 1)
            np.add.at(hits_ED, expert_T[valid], use.used_TD[valid])
        guide_LED[l] = np.round(255 * hits_ED / np.maximum(1, seen_E)[:, None])
    return guide_LED


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
