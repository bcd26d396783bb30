"""What is counted of a model's routing, in real steps: how often a request chooses alike."""

from __future__ import annotations

from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeserve.core import StepPlan
from moeserve.engine.rates import is_decode


class UseCounter:
    """A ``StepObserver`` that counts how often each expert of each layer is chosen; and keeps what
    requests chose in steps of newest tokens alone, in which they come in the same order; and how
    often two of these choose alike."""

    def __init__(self) -> None:
        self.chosen: dict[int, NDArray[np.int64]] = {}
        self._steps: list[dict[int, NDArray[np.int64]]] = []
        self._decodes = False
        self._alike: list[float] = []

    def begin(self, plan: StepPlan) -> None:
        self._decodes = bool(plan.chunks) and all(map(is_decode, plan.chunks))
        if self._decodes:
            self._steps.append({})

    def record(self, layer: int, ids_TC: NDArray[Any]) -> None:
        more, (tokens, top_k) = np.bincount(ids_TC.ravel()), ids_TC.shape
        if self._decodes and tokens > 1:
            pairs = tokens * (tokens - 1) * top_k
            self._alike.append(float((more * (more - 1)).sum()) / pairs)
        before = self.chosen.get(layer, np.zeros(0, np.int64))
        total = np.zeros(max(len(before), len(more)), np.int64)
        total[: len(before)] += before
        total[: len(more)] += more
        self.chosen[layer] = total
        if self._decodes:
            self._steps[-1][layer] = np.array(ids_TC, np.int64)

    def end(self) -> None: ...

    @property
    def shared(self) -> float:
        """Of what a newest token chooses, the share that another request's chose too; 0 where no
        step had two."""
        return fmean(self._alike) if self._alike else 0.0

    @property
    def repeat(self) -> float:
        """Of what a request's token chooses, the share that another of its tokens chose too; 0
        where there are no two such steps."""
        alike = [
            float((one[layer][:, :, None] == other[layer][:, None, :]).any(-1).mean())
            for one, other in combinations(self._steps, 2)
            for layer in one
            if layer in other and one[layer].shape == other[layer].shape
        ]
        return sum(alike) / len(alike) if alike else 0.0
