"""Polish a migrating plan layer by layer with the integer program, while there is time.

With its neighbours fixed, a layer is a generalised assignment: an expert gains, on a device, the
pair mass it shares with that device's experts in the layers before and after.
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from moeserve.placement.problem import Problem
from moeserve.placement.solvers.dp import affinity
from moeserve.placement.solvers.ilp import polish_layer

F64 = NDArray[np.float64]
I32 = NDArray[np.int32]


def gains(device_LE: I32, pairs_LEE: F64, l: int, devices: int) -> F64:
    """[E, D] pair mass kept by expert e of layer l on device d."""
    gain_ED = np.zeros((device_LE.shape[1], devices))
    if l > 0:
        np.add.at(gain_ED.T, device_LE[l - 1], pairs_LEE[l - 1])
    if l + 1 < len(device_LE):
        np.add.at(gain_ED.T, device_LE[l + 1], pairs_LEE[l].T)
    return gain_ED


def polish(
    problem: Problem, expert_LS: I32, topk_TLK: I32, load_LEW: F64, deadline: float,
    *, limit_per_layer: float = 3.0,
) -> I32:  # fmt: skip
    """[L, S]: each layer replaced where the program finds more kept pair mass under the caps."""
    layers, experts = load_LEW.shape[:2]
    devices = problem.cluster.devices
    if problem.slots != experts:
        return expert_LS
    pairs_LEE = affinity(topk_TLK, experts)
    device_LE = np.empty((layers, experts), np.int32)
    device_S = np.arange(experts) // (experts // devices)
    np.put_along_axis(device_LE, expert_LS.astype(np.int64), device_S[None].astype(np.int32), 1)
    for l in range(layers):
        if time.monotonic() + limit_per_layer > deadline:
            break
        load_E = load_LEW[l, :, 0]
        peak = np.bincount(device_LE[l], load_E, devices).max()
        fair_D = load_E.sum() / devices * problem.cluster.speed_D
        cap_D = np.maximum(fair_D * problem.max_imbalance, peak)
        gain_ED = gains(device_LE, pairs_LEE, l, devices)
        answer = polish_layer(gain_ED, load_E, cap_D, limit=limit_per_layer)
        if answer is not None and answer.value > gain_ED[np.arange(experts), device_LE[l]].sum():
            device_LE[l] = answer.device_E
    return np.argsort(device_LE, axis=1, kind="stable").astype(np.int32)
