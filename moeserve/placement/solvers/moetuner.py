"""MoETuner's two stages, as a baseline and an option: balanced groups, then their devices.

Stage 1 groups the experts of each layer (the integer program, or the same objective by packing and
swaps, which is as good in milliseconds). Stage 2 names the groups: exactly for up to six devices;
beyond, with links all alike, by the chain of assignment problems that minimises the sum of links.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from moeserve.placement.cluster import Cluster
from moeserve.placement.problem import Problem
from moeserve.placement.solvers.align import best_names, renamed
from moeserve.placement.solvers.balance import balance_layers
from moeserve.placement.solvers.dp import affinity, best_labels
from moeserve.placement.solvers.ilp import cluster_layer

F64 = NDArray[np.float64]
I32 = NDArray[np.int32]


def group_by_program(load_LE: F64, devices: int, *, limit_per_layer: float) -> I32:
    """Stage 1 as printed, with equal groups: [L, S]; a layer without incumbent stays contiguous."""
    rows = []
    for load_E in load_LE:
        answer = cluster_layer(load_E, devices, limit=limit_per_layer)
        device_E = (np.arange(len(load_E)) * devices // len(load_E)).astype(np.int32)
        if answer is not None:
            device_E = answer.device_E
        rows.append(np.argsort(device_E, kind="stable"))
    return np.stack(rows).astype(np.int32)


def flows(expert_LS: I32, pairs_LEE: F64, devices: int) -> F64:
    """[L - 1, G, G]: pair mass between the groups of adjacent layers; copies share alike."""
    flow = []
    experts = pairs_LEE.shape[1]
    for l, pairs_EE in enumerate(pairs_LEE):
        before_GE, after_GE = (_shares(expert_LS[i], experts, devices) for i in (l, l + 1))
        flow.append(before_GE @ pairs_EE @ after_GE.T)
    return np.stack(flow) if flow else np.zeros((0, devices, devices))


def _shares(expert_S: I32, experts: int, devices: int) -> F64:
    share_GE = np.zeros((devices, experts))
    device_S = np.arange(len(expert_S)) // (len(expert_S) // devices)
    np.add.at(share_GE, (device_S, expert_S), 1.0)
    share_GE /= share_GE.sum(axis=0)
    return share_GE


def link_costs(cluster: Cluster) -> F64:
    node_D = cluster.node_D
    cost_DD = np.where(node_D[:, None] == node_D[None, :], 1.0, cluster.node_ratio)
    np.fill_diagonal(cost_DD, 0.0)
    return cost_DD


def label(expert_LS: I32, pairs_LEE: F64, cluster: Cluster) -> I32:
    """Stage 2: [L, S] with groups moved to their devices."""
    devices = cluster.devices
    flow_LGG = flows(expert_LS, pairs_LEE, devices)
    if not len(flow_LGG):
        return expert_LS
    if math.factorial(devices) <= 720:
        names_LG, _ = best_labels(flow_LGG, link_costs(cluster))
        return np.stack([renamed(r, n) for r, n in zip(expert_LS, names_LG, strict=True)])
    rows = [expert_LS[0]]
    names_G = np.arange(devices, dtype=np.int32)
    for l, flow_GG in enumerate(flow_LGG):
        gain_GD = np.zeros((devices, devices))
        gain_GD[:, names_G] = flow_GG.T
        names_G = best_names(gain_GD, cluster.nodes)
        rows.append(renamed(expert_LS[l + 1], names_G))
    return np.stack(rows)


def two_stages(problem: Problem, load_LE: F64, topk_TLK: I32, *, limit: float = 0.0) -> I32:
    """Both stages. ``limit`` seconds for the integer programs; 0 groups by packing and swaps."""
    cluster = problem.cluster
    if limit > 0 and problem.slots == load_LE.shape[1]:
        expert_LS = group_by_program(load_LE, cluster.devices, limit_per_layer=limit / len(load_LE))
    else:
        expert_LS = balance_layers(problem, load_LE[:, :, None])
    return label(expert_LS, affinity(topk_TLK, load_LE.shape[1]), cluster)
