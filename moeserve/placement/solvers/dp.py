"""Exact answers where they are affordable, by dynamic programming over the layers.

``best_chain`` finds the placement of every layer that keeps the largest mass of (expert, next
expert) pairs on one device: over all ways to place E experts on D devices in equal numbers (2,520
for 8 on 4). Any load limit per layer and any objective that is a sum over adjacent layers fits.
``best_labels`` solves MoETuner's second program, the sum over layers of the worst link, exactly:
over all D! ways to name the groups of a layer.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeserve.errors import PlacementError

F64 = NDArray[np.float64]
I32 = NDArray[np.int32]

LARGEST = 3000  # states per layer; a transition table is at most this squared


def num_even_placements(experts: int, devices: int) -> int:
    per_device = experts // devices
    return int(math.factorial(experts) // math.factorial(per_device) ** devices)


def affordable(experts: int, devices: int) -> bool:
    return experts % devices == 0 and num_even_placements(experts, devices) <= LARGEST


def even_placements(experts: int, devices: int) -> I32:
    """[X, E]: the device of each expert, in every way to place them in equal numbers."""
    if not affordable(experts, devices):
        raise PlacementError(
            f"{experts} experts on {devices} devices: too many placements per layer for the exact "
            f"method (at most {LARGEST}, and experts must divide); use --solver auto"
        )
    per_device = experts // devices
    found: list[list[int]] = []
    device = [-1] * experts
    room = [per_device] * devices

    def place(e: int) -> None:
        if e == experts:
            found.append(device.copy())
            return
        for d in range(devices):
            if room[d]:
                device[e], room[d] = d, room[d] - 1
                place(e + 1)
                room[d] += 1

    place(0)
    return np.array(found, np.int32)


def affinity(topk_TLK: I32, experts: int) -> F64:
    """[L - 1, E, E]: share of token mass going from expert to expert, all K x K pairs alike."""
    layers, k = topk_TLK.shape[1:]
    pairs_LEE = np.zeros((layers - 1, experts, experts))
    for l in range(layers - 1):
        for a, b in itertools.product(range(k), range(k)):
            from_T, to_T = topk_TLK[:, l, a], topk_TLK[:, l + 1, b]
            valid = (from_T >= 0) & (to_T >= 0)
            flat = np.bincount(
                from_T[valid].astype(np.int64) * experts + to_T[valid], minlength=experts**2
            )
            pairs_LEE[l] += flat.reshape(experts, experts)
    pairs_LEE /= np.maximum(1e-300, pairs_LEE.sum(axis=(1, 2), keepdims=True))
    return pairs_LEE


def kept(device_LE: I32, pairs_LEE: F64) -> float:
    """Mean share of pair mass that stays on its device."""
    same_LEE = device_LE[:-1, :, None] == device_LE[1:, None, :]
    return float((pairs_LEE * same_LEE).sum() / len(pairs_LEE))


@dataclass(frozen=True, slots=True, eq=False)
class Exact:
    """``device_LE`` and its objective, which nothing allowed goes beyond."""

    device_LE: I32
    value: float


def best_chain(
    pairs_LEE: F64, load_LE: F64, devices: int, *, max_imbalance: float = math.inf
) -> Exact:
    """The largest ``kept`` among placements whose every layer keeps the load limit.

    Viterbi over the layers: the value of a placement is that of the best chain that ends in it. A
    layer that cannot keep the limit may use those of its placements with the least imbalance.
    """
    device_XE = even_placements(load_LE.shape[1], devices)
    holds_XED = (device_XE[:, :, None] == np.arange(devices)).astype(np.float64)
    flat_X = holds_XED.reshape(len(device_XE), -1)
    # Renaming devices changes no value: it is enough to arrive at one placement (R) of a class.
    class_X, arrive_R = _classes(device_XE)
    allowed = [_allowed(holds_XED, load_E, max_imbalance) for load_E in load_LE]
    value_X = np.where(allowed[0], 0.0, -math.inf)
    best_LR: list[NDArray[np.int64]] = []  # the placement before, of each that is arrived at
    for pairs_EE, allowed_X in zip(pairs_LEE, allowed[1:], strict=True):
        wanted_X = np.einsum("ef,xed->xfd", pairs_EE, holds_XED).reshape(len(device_XE), -1)
        total_RX = flat_X[arrive_R] @ wanted_X.T
        total_RX += value_X
        best_LR.append(np.argmax(total_RX, axis=1))
        value_R = np.take_along_axis(total_RX, best_LR[-1][:, None], axis=1)[:, 0]
        value_X = np.where(allowed_X, value_R[class_X], -math.inf)
    last = int(np.argmax(value_X))
    value = float(value_X[last]) / max(1, len(pairs_LEE))
    return Exact(_traced_back(device_XE, class_X, arrive_R, best_LR, last), value)


def _traced_back(
    device_XE: I32,
    class_X: NDArray[np.int64],
    arrive_R: NDArray[np.int64],
    best_LR: list[NDArray[np.int64]],
    last: int,
) -> I32:
    """[L, E]: the chain that ends in placement ``last``, its devices named as there."""
    chosen, state = [device_XE[last]], last
    for best_R in reversed(best_LR):
        arrived_E = device_XE[arrive_R[class_X[state]]]
        names_D = np.empty(int(arrived_E.max()) + 1, np.int32)
        names_D[arrived_E] = chosen[-1]  # from the names in the class's placement to those in use
        state = int(best_R[class_X[state]])
        chosen.append(names_D[device_XE[state]])
    return np.stack(chosen[::-1])


def _classes(device_XE: I32) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(class of each placement, one placement of each class); a class differs in names only."""
    ordered_XE = np.zeros_like(device_XE)
    for x, device_E in enumerate(device_XE.tolist()):
        seen: dict[int, int] = {}
        ordered_XE[x] = [seen.setdefault(d, len(seen)) for d in device_E]
    _, first_R, class_X = np.unique(ordered_XE, axis=0, return_index=True, return_inverse=True)
    return class_X.ravel(), first_R


def _allowed(holds_XED: F64, load_E: F64, limit: float) -> NDArray[np.bool_]:
    load_XD = np.einsum("e,xed->xd", load_E, holds_XED)
    peak_X = load_XD.max(axis=1) / load_XD.mean(axis=1)
    kept_X: NDArray[np.bool_] = peak_X <= max(limit, float(peak_X.min()) + 1e-9)
    return kept_X


def best_labels(flow_LGG: F64, cost_DD: F64) -> tuple[I32, float]:
    """([L, G] device of each group, sum over layers of the worst link's flow x cost), the least."""
    devices = len(cost_DD)
    if math.factorial(devices) > 720:
        raise PlacementError(f"{devices} devices: exact labels need at most 6")
    names_XG = np.array(list(itertools.permutations(range(devices))), np.int32)
    value_X = np.zeros(len(names_XG))
    steps = []
    for flow_GG in flow_LGG:
        worst_XX = np.zeros((len(names_XG), len(names_XG)))
        for a, b in itertools.product(range(devices), range(devices)):
            link_XX = cost_DD[names_XG[:, a][:, None], names_XG[:, b][None, :]]
            np.maximum(worst_XX, flow_GG[a, b] * link_XX, out=worst_XX)
        total_XX = value_X[:, None] + worst_XX
        steps.append(np.argmin(total_XX, axis=0))
        value_X = total_XX.min(axis=0)
    states = [int(np.argmin(value_X))]
    for best_X in reversed(steps):
        states.append(int(best_X[states[-1]]))
    return names_XG[states[::-1]], float(value_X.min())


def slots_of(device_LE: I32) -> I32:
    """[L, S] slot -> expert of placements with one copy each."""
    return np.argsort(device_LE, axis=1, kind="stable").astype(np.int32)
