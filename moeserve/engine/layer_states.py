"""The residual streams of prompts that are on their way through the layers (``Chunk.layers``).

Between two steps a prompt's rows are kept here, fp32 [tokens, H], until they have been in the last
layer or their request is forgotten. One thread runs steps; bounded by what a scheduler lets be on
its way (``policies.layered``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moeserve.core import Chunk, Request, RequestId, StepPlan
from moeserve.errors import InternalError
from moeserve.models.batch import GroupPass


@dataclass(frozen=True, slots=True)
class _Kept:
    """Of one request the tokens from position ``start`` on, which have been in the layers before
    ``layer``. ``routed`` as in ``GroupPass``."""

    request: Request
    start: int
    layer: int
    states_TH: Tensor
    routed: dict[int, Tensor]


class LayerStates:
    """``begin`` before a pass, ``end`` after it; a pass that fails has no ``end``, and its rows are
    gone."""

    def __init__(self) -> None:
        self._kept: dict[RequestId, _Kept] = {}

    @property
    def num_rows(self) -> int:
        """Tokens whose states are kept."""
        return sum(len(kept.states_TH) for kept in self._kept.values())

    def forget(self, request_ids: Iterable[RequestId]) -> None:
        """Ids that are not known are left out."""
        if self._kept:
            for request_id in request_ids:
                self._kept.pop(request_id, None)

    def begin(self, chunks: Sequence[Chunk]) -> GroupPass | None:
        """What the last chunks need that run in a group of layers; None where all run in all.

        InternalError where their states are not those that were kept.
        """
        if not chunks or (layers := chunks[-1].layers) is None:
            return None
        grouped = grouped_of(chunks)
        rows = sum(len(chunk.token_ids) for chunk in grouped)
        group = GroupPass(layers.start, layers.stop, layers.last, rows)
        if layers.start == 0:
            return group
        kept = [self._take(chunk, layers.start) for chunk in grouped]
        if len(kept) == 1:
            group.states_PH, group.routed = kept[0].states_TH, kept[0].routed
            return group
        group.states_PH = torch.cat([one.states_TH for one in kept])
        for layer in kept[0].routed:
            group.routed[layer] = torch.cat([one.routed[layer] for one in kept])
        return group

    def end(self, chunks: Sequence[Chunk], group: GroupPass) -> None:
        """What the pass has left of them is kept."""
        if group.states_PH is None:
            return
        at = 0
        for chunk in grouped_of(chunks):
            rows = slice(at, at + len(chunk.token_ids))
            routed = {layer: ids_PC[rows] for layer, ids_PC in group.routed.items()}
            states_TH, at = group.states_PH[rows], rows.stop
            kept = _Kept(chunk.request, chunk.start, group.stop, states_TH, routed)
            self._kept[chunk.request.id] = kept

    def _take(self, chunk: Chunk, layer: int) -> _Kept:
        kept = self._kept.pop(chunk.request.id, None)
        if (
            kept is None
            or kept.request is not chunk.request
            or (kept.start, kept.layer) != (chunk.start, layer)
            or len(kept.states_TH) != len(chunk.token_ids)
        ):
            raise InternalError(
                f"request {chunk.request.id}: the states of {len(chunk.token_ids)} tokens from "
                f"position {chunk.start} on are not kept before layer {layer}"
            )
        return kept


def grouped_of(chunks: Sequence[Chunk]) -> Sequence[Chunk]:
    """Those at the end that run in a group of layers, which is one and the same."""
    first = len(chunks)
    while first and chunks[first - 1].layers is not None:
        first -= 1
    grouped = chunks[first:]
    assert len({chunk.layers for chunk in grouped}) <= 1, [chunk.layers for chunk in grouped]
    return grouped


def as_shown(plan: StepPlan) -> StepPlan:
    """The plan for those who see every token once: with the last layer, as if it had run in all."""
    if not plan.chunks or plan.chunks[-1].layers is None:
        return plan
    chunks = (c._replace(layers=None) for c in plan.chunks if c.layers is None or c.layers.last)
    return replace(plan, chunks=tuple(chunks))
