"""What a rank counts of its own tokens' routing while it serves: loads, and a sample of tokens.

Loads count every token. The sample takes a few tokens of each step, evenly, and keeps the newest;
which experts go together can only be seen in whole tokens. Letters: L layers, E experts, T tokens,
K choices.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeserve.core import StepPlan
from moeserve.engine.model_runner import StepObserver

SAMPLE_BYTES = 96 << 10
PER_STEP = 8


class RoutingCounts:
    """A step observer; ``take`` gives what came since the last ``take``, as JSON has it."""

    def __init__(self, moe_layers: Sequence[int], num_experts: int, top_k: int) -> None:
        self._column = {layer: l for l, layer in enumerate(moe_layers)}
        self._shape = len(moe_layers), top_k
        self._load_LE = np.zeros((len(moe_layers), num_experts), np.int64)
        self._most = max(1, SAMPLE_BYTES // (2 * len(moe_layers) * top_k))
        self._kept: list[NDArray[np.int16]] = []
        self._rows_NLK = np.empty((0, *self._shape), np.int16)
        self._picked_N = np.empty(0, np.int64)
        self._tokens = 0

    def begin(self, plan: StepPlan) -> None:
        count = plan.num_tokens
        self._picked_N = np.unique(np.linspace(0, count - 1, min(count, PER_STEP)).astype(int))
        self._rows_NLK = np.full((len(self._picked_N), *self._shape), -1, np.int16)
        self._tokens += count

    def record(self, layer: int, ids_TC: NDArray[Any]) -> None:
        l = self._column[layer]
        self._load_LE[l] += np.bincount(ids_TC.ravel(), minlength=self._load_LE.shape[1])
        self._rows_NLK[:, l, : ids_TC.shape[1]] = ids_TC[self._picked_N]

    def end(self) -> None:
        if len(self._rows_NLK):
            self._kept.append(self._rows_NLK)
            while len(self._kept) > 1 and sum(map(len, self._kept)) > self._most:
                del self._kept[0]

    def take(self) -> Mapping[str, Any]:
        sample = np.concatenate([np.empty((0, *self._shape), np.int16), *self._kept])
        found = {
            "tokens": self._tokens,
            "load": self._load_LE.tolist(),
            "sample": base64.b64encode(sample[-self._most :].tobytes()).decode("ascii"),
        }
        self._load_LE[:] = 0
        self._kept.clear()
        self._tokens = 0
        return found


def sample_of(counts: Mapping[str, Any], layers: int, top_k: int) -> NDArray[np.int32]:
    """[T, L, K] out of what ``take`` gave."""
    flat = np.frombuffer(base64.b64decode(counts["sample"], validate=True), np.int16)
    return flat.reshape(-1, layers, top_k).astype(np.int32)


def chain_observers(first: StepObserver | None, second: StepObserver | None) -> StepObserver | None:
    """Those that are there as one, in this order; None if neither is."""
    return (first and second and ChainedObservers(first, second)) or first or second


class ChainedObservers:
    """Two step observers as one."""

    def __init__(self, first: StepObserver, second: StepObserver) -> None:
        self._pair = first, second

    def begin(self, plan: StepPlan) -> None:
        for one in self._pair:
            one.begin(plan)

    def record(self, layer: int, ids_TC: NDArray[Any]) -> None:
        for one in self._pair:
            one.record(layer, ids_TC)

    def end(self) -> None:
        for one in self._pair:
            one.end()
