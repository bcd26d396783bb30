"""Parts of given routing that stand for traffic to come: a plan is judged on what it did not see.

Workloads are the parts where there are several. One workload is cut into parts that are as unlike
as its own text allows: windows of tokens are cut along the directions in which their use of experts
differs most, so that a part is something like a topic, and leaving it out something like a shift.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moeserve.placement.routing import Routing, Workload, counted
from moeserve.placement.solvers.covariance import WINDOW

PARTS = 4  # a power of two
_ROUNDS = 12
_FEATURE_LAYERS = 8

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """``unseen`` is one part, ``seen`` are all others."""

    name: str
    seen: Routing
    unseen: Routing


def folds_of(routing: Routing) -> Iterator[Fold]:
    """One fold for each workload of several."""
    for i, left_out in enumerate(routing.workloads):
        rest = routing.workloads[:i] + routing.workloads[i + 1 :]
        if rest:
            seen = Routing(rest, routing.moe_layers)
            yield Fold(left_out.name, seen, Routing((left_out,), routing.moe_layers))


def in_parts(routing: Routing) -> Routing:
    """Several workloads as they are; one trace as up to ``PARTS`` workloads of unlike windows.

    A trace too short to cut, and one of counts, stays whole.
    """
    only = routing.workloads[0]
    if len(routing.workloads) > 1 or only.topk_TLK is None:
        return routing
    window_T = _windows(only)
    count = int(window_T[-1]) + 1
    if count < 2 * PARTS:
        return routing
    part_W = unlike_parts(_features(only, window_T, count))
    part_T = part_W[window_T]
    parts = [_part(only, part_T == p, p) for p in np.unique(part_W)]
    return Routing(tuple(parts), routing.moe_layers) if len(parts) > 1 else routing


def unlike_parts(feature_WF: F32) -> I64:
    """[W]: the part of each window, all of about one size: halves of halves, each cut at the median
    along the direction in which its windows differ most."""
    parts = [np.arange(len(feature_WF))]
    while len(parts) < PARTS:
        halves = []
        for at_N in parts:
            ordered_N = at_N[np.argsort(_spread(feature_WF[at_N]), kind="stable")]
            halves += np.array_split(ordered_N, 2)
        parts = halves
    part_W = np.zeros(len(feature_WF), np.int64)
    for p, at_N in enumerate(parts):
        part_W[at_N] = p
    return part_W


def thinned(routing: Routing, most_tokens: int, most_layers: int) -> Routing:
    """Fewer windows of each workload and fewer layers, evenly: enough to judge by."""
    layers = routing.num_layers
    kept_L = np.unique(np.linspace(0, layers - 1, min(layers, most_layers)).astype(int))
    total = sum(len(w.tokens) for w in routing.workloads)
    step = -(-total // most_tokens)
    found = []
    for workload in routing.workloads:
        window_T = _windows(workload)
        kept_T = window_T % step == 0
        topk_TLK = np.ascontiguousarray(workload.tokens[kept_T][:, kept_L])
        lens_C = np.bincount(window_T[kept_T]).astype(np.int64)
        found.append(_of_tokens(workload, topk_TLK, lens_C[lens_C > 0], workload.name))
    return Routing(tuple(found), tuple(routing.moe_layers[l] for l in kept_L))


def _windows(workload: Workload) -> I64:
    """[T]: number of the window of each token; none spans two sequences."""
    starts, first = [], 0
    for length in workload.lengths.tolist():
        starts.append(np.arange(first, first + length, WINDOW))
        first += length
    begins_T = np.zeros(first, np.int64)
    begins_T[np.concatenate(starts)] = 1
    window_T: I64 = np.cumsum(begins_T) - 1
    return window_T


def _features(workload: Workload, window_T: I64, count: int) -> F32:
    """[W, F]: how much a window uses each expert of some layers."""
    layers, experts = workload.load_LE.shape
    chosen = np.unique(np.linspace(0, layers - 1, min(layers, _FEATURE_LAYERS)).astype(int))
    feature_WLE = np.zeros((count, len(chosen), experts), np.float32)
    for at, l in enumerate(chosen):
        ids_TK = workload.tokens[:, l]
        row_TK = np.broadcast_to(window_T[:, None], ids_TK.shape)
        valid_TK = ids_TK >= 0
        np.add.at(feature_WLE[:, at], (row_TK[valid_TK], ids_TK[valid_TK]), 1.0)
    flat_WF = feature_WLE.reshape(count, -1)
    flat_WF /= np.maximum(1.0, flat_WF.sum(axis=1, keepdims=True))
    return flat_WF


def _spread(feature_NF: F32) -> F32:
    """[N]: places along the first principal direction, by power iteration from the row that is
    farthest from the mean."""
    centred_NF = feature_NF - feature_NF.mean(axis=0)
    direction_F = centred_NF[int((centred_NF**2).sum(axis=1).argmax())]
    for _ in range(_ROUNDS):
        direction_F = centred_NF.T @ (centred_NF @ direction_F)
        direction_F = direction_F / max(1e-30, float(np.linalg.norm(direction_F)))
    along_N: F32 = centred_NF @ direction_F
    return along_N


def _part(workload: Workload, kept_T: NDArray[np.bool_], number: int) -> Workload:
    lens_C = np.bincount(_windows(workload)[kept_T]).astype(np.int64)
    name = f"{workload.name}, part {number + 1}"
    return _of_tokens(workload, workload.tokens[kept_T], lens_C[lens_C > 0], name)


def _of_tokens(workload: Workload, topk_TLK: NDArray[np.int32], lens_C: I64, name: str) -> Workload:
    """A workload of some of another's tokens, cut into sequences anew."""
    return replace(
        workload,
        name=name,
        load_LE=counted(topk_TLK, workload.load_LE.shape[1]),
        topk_TLK=topk_TLK,
        seq_lens_C=lens_C,
        domain_C=None,
    )
