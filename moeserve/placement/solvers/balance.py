"""Balance every layer over all workloads at once, never worse than the baseline on any layer.

Copies go greedily to the heaviest expert, copies to the coolest device, then the hottest device is
cooled swap by swap; with time left the number of copies itself is searched (``recounts``). Several
workloads share one placement: what is made small is the worst of them.
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from moeserve.placement.plan import tidy
from moeserve.placement.problem import Problem
from moeserve.placement.solvers.bounds import balance_bound
from moeserve.placement.solvers.eplb import balance_layer
from moeserve.placement.solvers.search import balance

F64 = NDArray[np.float64]
I32 = NDArray[np.int32]

_GOOD = 1.001  # within this of the bound, recounting is not worth its time


def peak(expert_S: I32, load_EW: F64, speed_D: F64) -> float:
    """Worst over workloads of max load / speed over the ideal."""
    copies_E = np.bincount(expert_S, minlength=len(load_EW))
    share_EW = load_EW / load_EW.sum(axis=0) / copies_E[:, None]
    load_DW = share_EW[expert_S].reshape(len(speed_D), -1, load_EW.shape[1]).sum(axis=1)
    return float((load_DW / speed_D[:, None]).max() * len(speed_D))


def balance_layers(
    problem: Problem, load_LEW: F64, *, recounts: int = 0, deadline: float = float("inf")
) -> I32:
    """[L, S]. Recounting stops at ``deadline`` (of ``time.monotonic``)."""
    speed_D = problem.cluster.speed_D
    rows = [_balanced(problem, load_EW, speed_D, 0) for load_EW in load_LEW]
    if recounts:
        for l, load_EW in enumerate(load_LEW):
            if time.monotonic() >= deadline:
                break
            floor = max(balance_bound(load_E, speed_D, problem.slots) for load_E in load_EW.T)
            if peak(rows[l], load_EW, speed_D) > _GOOD * floor:
                found = _balanced(problem, load_EW, speed_D, recounts)
                rows[l] = min((rows[l], found), key=lambda r: peak(r, load_EW, speed_D))
    return tidy(np.stack(rows), problem.cluster.devices)


def _balanced(problem: Problem, load_EW: F64, speed_D: F64, recounts: int) -> I32:
    share_EW = load_EW / load_EW.sum(axis=0) * len(speed_D)
    ours_S, _ = balance(share_EW, speed_D, slots=problem.slots, recounts=recounts)
    base_S = balance_layer(share_EW.mean(axis=1), problem.slots, len(speed_D))
    return min((ours_S, base_S), key=lambda row: peak(row, load_EW, speed_D))
