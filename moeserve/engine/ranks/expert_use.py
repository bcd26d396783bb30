"""Whose experts prompts use, counted on the rank that runs them, for ``homes``.

The first tokens of a prompt's chunk show as much as all of them, so few are looked at. Letters:
T tokens, C choices, R ranks, E experts.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeserve.comm.layout import LayerLayout
from moeserve.comm.pipeline import ParallelLayerRunner
from moeserve.core import StepPlan
from moeserve.engine.model_runner import StepObserver
from moeserve.engine.ranks.homes import ExpertUse, kind_of

LOOKED_AT = 32


class ExpertUseCounter:
    """A step observer in front of another one, if there is any; a ``homes.ExpertUseSource``.

    What a step uses is added when the step ends, so that one that fails is not counted.
    """

    def __init__(
        self, parallel: ParallelLayerRunner, world: int, then: StepObserver | None = None
    ) -> None:
        self._parallel = parallel
        self._world = world
        self._then = then
        self._rows: list[tuple[str, slice]] = []
        self._step: dict[str, tuple[int, NDArray[np.int64]]] = {}
        self._found: dict[str, tuple[int, NDArray[np.int64]]] = {}
        self._lock = threading.Lock()  # of what is found, which other threads take
        self._held: dict[int, tuple[LayerLayout, NDArray[np.bool_]]] = {}

    def begin(self, plan: StepPlan) -> None:
        self._rows, self._step = [], {}
        row = 0
        for chunk in plan.chunks:
            count = len(chunk.token_ids)
            if chunk.start < len(chunk.request.prompt_ids) and count > 1:
                rows = slice(row, row + min(count, LOOKED_AT))
                self._rows.append((kind_of(chunk.request), rows))
            row += count
        if self._then is not None:
            self._then.begin(plan)

    def record(self, layer: int, ids_TC: NDArray[Any]) -> None:
        if self._then is not None:
            self._then.record(layer, ids_TC)
        if not self._rows:
            return
        held_ER = self._held_by(layer)
        for kind, rows in self._rows:
            used_TR = held_ER[ids_TC[rows]].any(axis=1)
            _add(self._step, kind, len(used_TR), used_TR.sum(axis=0))

    def end(self) -> None:
        with self._lock:
            for kind, (tokens, use_R) in self._step.items():
                _add(self._found, kind, tokens, use_R)
        if self._then is not None:
            self._then.end()

    def take(self) -> Sequence[ExpertUse]:
        with self._lock:
            found, self._found = self._found, {}
        return [ExpertUse(kind, n, tuple(use_R.tolist())) for kind, (n, use_R) in found.items()]

    def _held_by(self, layer: int) -> NDArray[np.bool_]:
        """[E, R]: has the rank a slot of the expert?"""
        sharded = self._parallel.sharded[layer]
        assert sharded is not None, layer
        held = self._held.get(layer)
        if held is None or held[0] is not sharded.layout:
            layout = sharded.layout
            held_ER = np.zeros((layout.num_experts, self._world), np.bool_)
            held_ER[layout.expert_S, np.arange(len(layout.expert_S)) // layout.slots] = True
            held = self._held[layer] = layout, held_ER
        return held[1]


def _add(
    counts: dict[str, tuple[int, NDArray[np.int64]]],
    kind: str,
    tokens: int,
    use_R: NDArray[np.int64],
) -> None:
    before, sum_R = counts.get(kind, (0, np.zeros_like(use_R)))
    counts[kind] = before + tokens, sum_R + use_R
