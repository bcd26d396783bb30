"""The baseline: DeepSeek's expert-parallel load balancer, written anew from its description.

Greedy copies (again and again one more for the expert whose copies are heaviest), then greedy
packing (heaviest copy first, to the least loaded device with room). With expert groups that divide
over the nodes it packs groups to nodes first. It knows nothing of co-activation.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from moeserve.errors import PlacementError

F64 = NDArray[np.float64]
I32 = NDArray[np.int32]


def pack(weight_I: F64, packs: int) -> NDArray[np.int64]:
    """Pack of each item: equal numbers, heaviest first to the lightest pack with room."""
    room = len(weight_I) // packs
    pack_I = np.zeros(len(weight_I), np.int64)
    used = [0] * packs
    lightest = [(0.0, p) for p in range(packs)]
    for i in np.argsort(-weight_I, kind="stable"):
        load, p = heapq.heappop(lightest)
        pack_I[i] = p
        used[p] += 1
        if used[p] < room:
            heapq.heappush(lightest, (load + float(weight_I[i]), p))
    return pack_I


def replicate(weight_E: F64, slots: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(expert of each copy, copies of each expert); the first copies are the experts in order."""
    copies_E = np.ones(len(weight_E), np.int64)
    extra = np.zeros(slots - len(weight_E), np.int64)
    for i in range(len(extra)):
        extra[i] = np.argmax(weight_E / copies_E)
        copies_E[extra[i]] += 1
    return np.concatenate((np.arange(len(weight_E)), extra)), copies_E


def _by_pack(pack_I: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.argsort(pack_I, kind="stable")


def balance_layer(weight_E: F64, slots: int, devices: int) -> I32:
    """Slot -> expert, whatever the nodes."""
    expert_I, copies_E = replicate(weight_E, slots)
    pack_I = pack((weight_E / copies_E)[expert_I], devices)
    return expert_I[_by_pack(pack_I)].astype(np.int32)


def balance_layer_by_groups(
    weight_E: F64, slots: int, devices: int, nodes: int, groups: int
) -> I32:
    """Groups of experts to nodes, copies inside a node, copies to its devices."""
    experts_of_group = np.arange(len(weight_E)).reshape(groups, -1)
    node_of_group = pack(weight_E[experts_of_group].sum(axis=1), nodes)
    rows = []
    for n in range(nodes):
        mine = experts_of_group[node_of_group == n].ravel()
        local_S = balance_layer(weight_E[mine], slots // nodes, devices // nodes)
        rows.append(mine[local_S])
    return np.concatenate(rows).astype(np.int32)


def eplb(load_LE: F64, *, slots: int, devices: int, nodes: int = 1, groups: int = 1) -> I32:
    """[L, S] slot -> expert."""
    experts = load_LE.shape[1]
    if slots < experts or slots % devices or devices % nodes or experts % groups:
        raise PlacementError(
            f"{experts} experts in {groups} groups, {slots} slots, {devices} devices, {nodes} "
            "nodes: slots must be at least the experts, and each must divide into the next"
        )
    if nodes > 1 and groups % nodes == 0:
        return np.stack(
            [balance_layer_by_groups(w_E, slots, devices, nodes, groups) for w_E in load_LE]
        )
    return np.stack([balance_layer(w_E, slots, devices) for w_E in load_LE])
