"""A rank's experts of one layer, read from disk as records for them come from the ranks.

What a record calls slot s of this rank is the layer's expert s in the stream; where it lies in the
arena changes from step to step. Which experts the next layer needs, other ranks choose: only where
a step needs nearly all of a layer's, the next layer's are read ahead. Letters: ``kernels.wire``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moeserve.kernels.ops import MoeWeights, Ops, Part
from moeserve.kernels.wire import Sums, Wire
from moeserve.offload.experts import ExpertStream
from moeserve.offload.model.distinct import NEARLY_ALL
from moeserve.offload.waves import PartedSums


@dataclass(frozen=True, slots=True)
class RankExperts:
    """Of layer ``layer``, whose ``part`` has the arena's slots; ``following`` is the next layer
    that routes, and ``first`` whether a step begins with this one."""

    ops: Ops
    part: Part[MoeWeights]
    wire: Wire
    stream: ExpertStream
    layer: int
    following: int | None
    first: bool

    def __call__(self, segments: Sequence[Tensor]) -> Sums:
        """As ``Ops.run_experts`` of a rank whose experts are all in memory, to the bit."""
        stream, residency = self.stream, self.stream.residency
        if self.first:
            stream.begin_step()
        empty = torch.empty(0, dtype=torch.uint8)
        parts = PartedSums(self.ops, self.part, self.wire, torch.cat([empty, *segments]))
        needed = np.unique(parts.slot_NC[parts.slot_NC >= 0]).astype(np.int64)
        with closing(stream.waves(self.layer, needed)) as waves:
            for n, wave in enumerate(waves):
                if n == 0:
                    self._read_ahead(len(needed))
                slot_of = np.full(residency.experts_L[self.layer] + 1, -1, np.int32)  # -1 stays -1
                slot_of[wave] = residency.slot_LE[self.layer, wave]
                parts.add(slot_of[parts.slot_NC])
        return parts.sums()

    def _read_ahead(self, needed: int) -> None:
        experts_L = self.stream.residency.experts_L
        if self.following is not None and needed >= NEARLY_ALL * experts_L[self.layer]:
            whole = np.arange(experts_L[self.following])
            self.stream.read_ahead(self.following, whole, self.layer)
