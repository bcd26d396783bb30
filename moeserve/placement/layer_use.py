"""Where the tokens of a layer go under a plan: slots, devices, nodes. Pure.

Which copy of a replicated expert a token uses is chosen in one of two ways. Copies take turns
(``layer_uses``): a token with index t uses copy ``t % copies``. Or as senders do at run time
(``split_uses``): tokens of one home are cut into batches, in their order, and ``split`` chooses
for each batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeserve.errors import PlacementError
from moeserve.placement.plan import Plan
from moeserve.placement.split import slots_of, split_batches

_LANES = 8192  # batches split at once, which bounds memory

I32 = NDArray[np.int32]


def slots_of_tokens(expert_S: I32, topk_TK: I32, num_experts: int) -> I32:
    """[T, K] slots, -1 kept: token t uses copy ``t % copies`` of each expert."""
    slots = slots_of(expert_S, num_experts)
    expert_TK = np.maximum(topk_TK, 0)
    token_T = np.arange(len(topk_TK))[:, None]
    slot_TK = slots.slot_S[slots.first_E1[expert_TK] + token_T % slots.copies_E[expert_TK]]
    return np.where(topk_TK >= 0, slot_TK, np.int32(-1)).astype(np.int32)


def occupied(device_TK: I32, devices: int) -> NDArray[np.bool_]:
    """[T, D]: does the token use the device; -1 is none."""
    used_TD = np.zeros((len(device_TK), devices + 1), np.bool_)
    np.put_along_axis(used_TD, np.where(device_TK < 0, devices, device_TK), True, axis=1)
    return used_TD[:, :devices]


@dataclass(frozen=True, slots=True, eq=False)
class LayerUse:
    """Where the tokens of one layer go: the device of each choice (-1 none), and which are used."""

    device_TK: I32
    used_TD: NDArray[np.bool_]
    used_TN: NDArray[np.bool_]


def layer_uses(plan: Plan, topk_TLK: I32) -> Iterator[LayerUse]:
    """Of every layer; the copies of an expert take turns."""
    _check_routing(plan, topk_TLK)
    for l in range(plan.num_layers):
        yield _use(plan, slots_of_tokens(plan.expert_LS[l], topk_TLK[:, l], plan.num_experts))


def split_uses(plan: Plan, topk_TLK: I32, home_T: I32, batch: int) -> Iterator[LayerUse]:
    """Of every layer; copies are chosen as senders do, each a batch of its own tokens at a time."""
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


def round_robin_homes(tokens: int, devices: int, batch: int) -> I32:
    """[T]: one batch after the other, each at the next home."""
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
