"""An op table that sends rows where a recording says, in place of the router's own choice.

The router still runs and its weights, best first, go to the recorded experts in their order: what
a row becomes follows from the row and the recording alone, so that law 1 can be held against it.
Letters: P places in the KV cache, one for each token of each sequence; L layers, K choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moeserve.kernels.ops import Layer, Ops, Part, Routed, RouterWeights, Step


class ForcedRouting:
    """All of ``ops``, but for ``route``. ``ids_LPK`` (int32) holds the experts of the token whose
    KV is in place p; ``layers`` all route."""

    def __init__(self, ops: Ops, layers: Sequence[Layer], ids_LPK: Tensor) -> None:
        self._ops = ops
        self._ids_of = {
            id(_router(layer)): ids_PK for layer, ids_PK in zip(layers, ids_LPK, strict=True)
        }

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def route(self, x_TH: Tensor, part: Part[RouterWeights], step: Step) -> Routed:
        routed = self._ops.route(x_TH, part, step)
        ids_TK = self._ids_of[id(part)].index_select(0, step.slot_T)
        return Routed(routed.normed_TH, ids_TK, routed.weights_TC)


def _router(layer: Layer) -> Part[RouterWeights]:
    assert not isinstance(layer.mlp, Part), "a layer without a router"
    return layer.mlp[0]


def places(ids_SWLK: Tensor, block: int) -> Tensor:
    """[L, P, K]: sequences follow one another, each in whole blocks of so many places."""
    sequences, window, layers, top_k = ids_SWLK.shape
    padded = torch.zeros(sequences, -(-window // block) * block, layers, top_k, dtype=torch.int32)
    padded[:, :window] = ids_SWLK
    return padded.flatten(0, 1).transpose(0, 1).contiguous()
