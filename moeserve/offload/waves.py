"""A mixture made in parts, with the experts of each part alone, to the bits of all at once.

Exact: partial sums are whole numbers of the row's unit, so that adding them in any order is the
same; ordered: each contribution goes to its place, and they are added in the end. Fast sums depend
on the order and cannot be made in parts (see ``kernels.wire``). Letters as there.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeserve.kernels.ops import MoeWeights, Ops, Part, Routed
from moeserve.kernels.wire import LOWEST, SLOT_DTYPE, Combine, Copies, Sums, Wire


class PartedSums:
    """The sums of records, made with the experts of some slots at a time. ``records`` are those of
    all segments, uint8, and this object's own: their slots are overwritten."""

    def __init__(self, ops: Ops, part: Part[MoeWeights], wire: Wire, records: Tensor) -> None:
        assert part.weights.combine is not Combine.FAST, part.weights.combine
        self._ops, self._part, self._wire, self._records = ops, part, wire, records
        by_row = records.numpy().reshape(-1, wire.row_bytes)
        end = wire.slots_at + SLOT_DTYPE.itemsize * wire.top_k
        self._slot_NC = by_row[:, wire.slots_at : end].view(np.int16)
        self.slot_NC: NDArray[np.int32] = self._slot_NC.astype(np.int32)  # as they came
        self._here_NC = self.slot_NC >= 0
        self._total: Tensor | None = None

    def add(self, slot_NC: NDArray[np.int32]) -> None:
        """The contributions of the experts in these slots, -1 where a choice is of another part."""
        self._slot_NC[:] = slot_NC
        made: Tensor = self._ops.run_experts(self._part, self._wire, [self._records]).data
        if self._part.weights.combine is Combine.ORDERED:
            if self._total is None:
                places = int(self._here_NC.sum())
                self._total = torch.zeros(places, made.shape[1], device=made.device)
            own = torch.from_numpy(np.flatnonzero(slot_NC[self._here_NC] >= 0))
            self._total[own.to(made.device)] = made
        elif self._total is None:
            self._total = made
        else:
            add_exact(self._total, made)

    def sums(self) -> Sums:
        """Of all parts; where there was none, of records without a choice that is here."""
        if self._total is None:
            self.add(np.full_like(self.slot_NC, -1))
            assert self._total is not None
        return Sums(len(self.slot_NC), self._total)


class PartedMixture:
    """The mixture of one batch's rows; ``x_TH`` must stay as it is until ``finish``.

    As one rank of one: every token has one record, whose slots are those of the part that runs.
    """

    def __init__(self, ops: Ops, part: Part[MoeWeights], x_TH: Tensor, routed: Routed) -> None:
        rows, chosen = routed.ids_TC.shape
        self._ops, self._part, self._routed = ops, part, routed
        self._wire = wire = ops.wire(part, chosen)
        self._copies = Copies(
            torch.tensor([0, rows], dtype=torch.int32),
            torch.arange(rows, dtype=torch.int32),
            torch.zeros(rows, chosen, dtype=SLOT_DTYPE),
        )
        self._records = torch.empty(rows * wire.row_bytes, dtype=torch.uint8)
        ops.pack_tokens(x_TH, part, routed, self._copies, [self._records])
        self._parts = PartedSums(ops, part, wire, self._records.clone())

    def add(self, slot_TC: NDArray[np.int32]) -> None:
        """As ``PartedSums.add``."""
        self._parts.add(slot_TC)

    def finish(self, x_TH: Tensor) -> None:
        """Adds the mixture, all parts and the shared expert, to ``x_TH``."""
        ops, part, wire = self._ops, self._part, self._wire
        area = torch.empty(ops.sums_bytes(part, wire, len(x_TH)), dtype=torch.uint8)
        (nbytes,) = ops.pack_sums(part, wire, self._parts.sums(), [self._records], [area])
        shared_TH = ops.shared(part, self._routed)
        ops.combine(x_TH, part, self._routed, self._copies, [area[:nbytes]], shared_TH)


def add_exact(total_NLH: Tensor, more_NLH: Tensor) -> None:
    """Adds exact sums in place: int32 [N, limbs, H]; what overflowed stays overflowed."""
    lost_NH = (total_NLH[:, 0] == LOWEST) | (more_NLH[:, 0] == LOWEST)
    total_NLH += more_NLH
    total_NLH[:, 0].masked_fill_(lost_NH, LOWEST)
