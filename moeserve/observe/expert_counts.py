"""How often each expert was chosen, counted while serving.

A step observer (``engine.model_runner.StepObserver``). Every token of a step that ended counts,
also one that is computed again. It costs a pass over the choices of each layer and, as any observer
does, the steps that the native half would otherwise run in one piece: so it is there only where it
is asked for. Letters: L MoE layers, E experts, T tokens, C choices.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeserve.core import StepPlan


class ExpertCounts:
    """``layers`` are the decoder's numbers of the MoE layers. ``loads`` is for any thread."""

    def __init__(self, layers: Sequence[int], num_experts: int) -> None:
        self.layers = tuple(layers)
        self._column = {layer: l for l, layer in enumerate(self.layers)}
        self._step_LE = np.zeros((len(self.layers), num_experts), np.int64)
        self._lock = threading.Lock()
        self._load_LE = np.zeros_like(self._step_LE)

    def begin(self, plan: StepPlan) -> None:
        self._step_LE[:] = 0

    def record(self, layer: int, ids_TC: NDArray[Any]) -> None:
        l, experts = self._column[layer], self._step_LE.shape[1]
        self._step_LE[l] += np.bincount(ids_TC.ravel(), minlength=experts)

    def end(self) -> None:
        with self._lock:
            self._load_LE += self._step_LE

    def loads(self) -> NDArray[np.int64]:
        """[L, E] since the start, a copy."""
        with self._lock:
            return self._load_LE.copy()
