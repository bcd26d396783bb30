"""Which copies of a batch's tokens go where, found on the device: one number a unit comes back.

By elementwise steps, sums and sorts of torch alone, so that every accelerator has it; of the host
only the counts are asked for, once. What ``assign`` gives it gives, number by number. Where an
expert has several slots, the rule among them (``placement.split``) goes from pair to pair, which a
device is slow at: then the ids come to the host, once, and copies go back.

Letters: T tokens, C choices, N copies, U units (ranks, or nodes of several), E experts, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from moeserve.comm.layout import LayerLayout, require_numbered
from moeserve.comm.table import Assigned, AssignmentTable, Fetch, table_of
from moeserve.kernels.wire import SLOT_DTYPE, Copies, Wire, record_rows, record_slots


class DeviceAssignmentTable:
    """``copies`` are on ``device``, but for where those of a unit begin."""

    def __init__(self, layout: LayerLayout, device: torch.device, ranks_per_unit: int = 1) -> None:
        require_numbered(layout.slots, ranks_per_unit)
        filled_S = layout.expert_S >= 0
        copies_E = np.bincount(layout.expert_S[filled_S], minlength=layout.num_experts)
        self._device, self._layout = device, layout
        self._host: AssignmentTable | None = None
        if copies_E.max(initial=0) > 1:
            self._host = table_of(layout, ranks_per_unit)
        # One more, for -1, which is no choice.
        slot_E1 = np.full(layout.num_experts + 1, -1, np.int32)
        slot_E1[layout.expert_S[filled_S]] = np.flatnonzero(filled_S)
        self._slot_E1 = torch.from_numpy(slot_E1).to(device)

    def assign(
        self, ids_TC: Tensor, home: int, *, ranks_per_unit: int = 1, fetch: Fetch = Tensor.cpu
    ) -> Assigned:
        if self._host is not None:
            found = self._host.assign(ids_TC, home, ranks_per_unit=ranks_per_unit, fetch=fetch)
            return on_device(found, self._device)
        slot_TC = self._slot_E1[ids_TC.long()]
        layout = self._layout
        units, per_unit = layout.world // ranks_per_unit, layout.slots * ranks_per_unit
        return by_unit(slot_TC, units, per_unit, fetch)

    def relay(
        self, segments: Sequence[Tensor], wire: Wire, ranks: int, *, fetch: Fetch = Tensor.cpu
    ) -> Assigned:
        slot_NC = record_slots(wire, record_rows(wire, segments))
        return by_unit(slot_NC.int(), ranks, self._layout.slots, fetch)


def by_unit(slot_TC: Tensor, units: int, per_unit: int, fetch: Fetch) -> Assigned:
    """``assign.by_unit``, to the number, wherever the slots are; -1 is no slot."""
    unit_TC = torch.where(slot_TC >= 0, slot_TC // per_unit, -1)
    every_U = torch.arange(units, dtype=torch.int32, device=slot_TC.device)
    goes_UT = (unit_TC[None] == every_U[:, None, None]).any(2)
    # Pairs of a unit and a token that gets a copy come first, in their order.
    order = (~goes_UT).flatten().int().argsort(stable=True)
    count_R: list[int] = fetch(goes_UT.sum(1)).tolist()
    starts = list(accumulate(count_R, initial=0))
    pair_N = order[: starts[-1]]
    token_N = pair_N % max(1, len(slot_TC))
    unit_N1 = (pair_N // max(1, len(slot_TC)))[:, None]
    slot_NC = slot_TC[token_N]
    local_NC = torch.where(unit_TC[token_N] == unit_N1, slot_NC - unit_N1 * per_unit, -1)
    start_R1 = torch.tensor(starts, dtype=torch.int32)
    return Assigned(Copies(start_R1, token_N.int(), local_NC.to(SLOT_DTYPE)), count_R)


def on_device(assigned: Assigned, device: torch.device) -> Assigned:
    """Copies that were found on the host."""
    copies = assigned.copies
    there = Copies(copies.start_R1, copies.token_N.to(device), copies.slot_NC.to(device))
    return Assigned(there, assigned.count_R)
