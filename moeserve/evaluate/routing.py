"""Do two runs send the same tokens to the same experts, layer by layer?

A flipped expert is a discrete error that a small error of a router's input can cause; its weight
was near that of the expert it replaces, so agreement below 1 is not by itself a loss. The order of
a token's experts does not count. Letters: T tokens, C experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


class RoutingNotes:
    """A routing observer of one run: the choices since ``take`` was last called."""

    def __init__(self) -> None:
        self._seen: dict[int, list[Ids]] = {}

    def record(self, layer: int, ids_TC: NDArray[Any]) -> None:
        # A copy: the array belongs to the step. Sorted, for the order does not count.
        self._seen.setdefault(layer, []).append(np.sort(ids_TC.astype(np.int64), axis=1))

    def take(self) -> dict[int, Ids]:
        taken = {layer: np.concatenate(parts) for layer, parts in self._seen.items()}
        self._seen = {}
        return taken


@dataclass(frozen=True, slots=True)
class LayerAgreement:
    """Shares of a layer's tokens with equal expert sets, and of experts that both runs chose."""

    layer: int
    equal: float
    overlap: float


class RoutingTally:
    """Adds up agreement, chunk by chunk; of layers that both runs have."""

    def __init__(self) -> None:
        self._tokens: dict[int, int] = {}
        self._equal: dict[int, int] = {}
        self._shared: dict[int, float] = {}

    def add(self, reference: Mapping[int, Ids], tested: Mapping[int, Ids]) -> None:
        for layer in reference.keys() & tested.keys():
            one_TC, other_TC = reference[layer], tested[layer]
            if one_TC.shape != other_TC.shape:
                continue
            both_T = (one_TC[:, :, None] == other_TC[:, None, :]).sum((1, 2))
            self._tokens[layer] = self._tokens.get(layer, 0) + len(both_T)
            self._equal[layer] = self._equal.get(layer, 0) + int((both_T == one_TC.shape[1]).sum())
            self._shared[layer] = self._shared.get(layer, 0.0) + both_T.sum() / one_TC.shape[1]

    def layers(self) -> Sequence[LayerAgreement]:
        return [
            LayerAgreement(layer, self._equal[layer] / n, self._shared[layer] / n)
            for layer, n in sorted(self._tokens.items())
        ]

    @property
    def tokens(self) -> int:
        """Of each layer."""
        return max(self._tokens.values(), default=0)
