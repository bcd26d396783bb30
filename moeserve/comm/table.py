"""Which copies of a batch's tokens go where: natively, by the numpy twin (``assign``), or on the
device where the tokens are (``device_table``).

Letters: T tokens, C choices, N copies, U units (ranks, or nodes of several).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from moeserve.comm.assign import assign, by_unit
from moeserve.comm.layout import LayerLayout, require_numbered
from moeserve.comm.native import native_half
from moeserve.kernels.wire import SLOT_DTYPE, Copies, Wire, record_rows, record_slots

# Brings numbers to the host: an exchange's, whose wait has a deadline, or ``Tensor.cpu``.
Fetch = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Assigned:
    """``count_R`` as a list: how many copies for each unit."""

    copies: Copies
    count_R: list[int]


class AssignmentTable(Protocol):
    """The slots of one layer, ready for look-up."""

    def assign(
        self, ids_TC: Tensor, home: int, *, ranks_per_unit: int = 1, fetch: Fetch = Tensor.cpu
    ) -> Assigned:
        """Copies of the tokens of rank ``home``; a unit's slots are numbered through its ranks.

        ``ids_TC`` is int32 and contiguous, of known experts, on the device; -1 is no choice.
        """
        ...

    def relay(
        self, segments: Sequence[Tensor], wire: Wire, ranks: int, *, fetch: Fetch = Tensor.cpu
    ) -> Assigned:
        """Copies of records that came to a unit of ``ranks``, by rank; their slots say where to."""
        ...


def table_of(layout: LayerLayout, ranks_per_unit: int = 1) -> AssignmentTable:
    """For units of so many ranks. PlacementError where a record cannot number the slots of one."""
    require_numbered(layout.slots, ranks_per_unit)
    native, _ = native_half()
    return NumpyAssignmentTable(layout) if native is None else NativeAssignmentTable(layout, native)


class NumpyAssignmentTable:
    """In numpy."""

    def __init__(self, layout: LayerLayout) -> None:
        self._layout = layout

    def assign(
        self, ids_TC: Tensor, home: int, *, ranks_per_unit: int = 1, fetch: Fetch = Tensor.cpu
    ) -> Assigned:
        return counted(assign(fetch(ids_TC), self._layout, home, ranks_per_unit))

    def relay(
        self, segments: Sequence[Tensor], wire: Wire, ranks: int, *, fetch: Fetch = Tensor.cpu
    ) -> Assigned:
        slots = record_slots(wire, record_rows(wire, segments))
        return counted(by_unit(slots.numpy().astype(np.int32), ranks, self._layout.slots))


class NativeAssignmentTable:
    """By ``comm/assign.cc``."""

    def __init__(self, layout: LayerLayout, native: ModuleType) -> None:
        self._slots = layout.slots
        self._world = layout.world
        self._relay = native.relay
        self._handle = native.AssignmentTable(
            layout.expert_S.tolist(), layout.num_experts, layout.world
        )

    def assign(
        self, ids_TC: Tensor, home: int, *, ranks_per_unit: int = 1, fetch: Fetch = Tensor.cpu
    ) -> Assigned:
        ids_TC = fetch(ids_TC)
        tokens, chosen = ids_TC.shape
        units = self._world // ranks_per_unit
        buffers = _buffers(units, tokens, chosen)
        counts = self._handle.assign(
            ids_TC.data_ptr(), tokens, chosen, home, ranks_per_unit, *_addresses(buffers)
        )
        return _filled(buffers, counts)

    def relay(
        self, segments: Sequence[Tensor], wire: Wire, ranks: int, *, fetch: Fetch = Tensor.cpu
    ) -> Assigned:
        rows = [len(s) // wire.row_bytes for s in segments]
        buffers = _buffers(ranks, sum(rows), wire.top_k)
        counts = self._relay(
            [s.data_ptr() for s in segments],
            rows,
            wire.row_bytes,
            wire.slots_at,
            wire.top_k,
            ranks,
            self._slots,
            *_addresses(buffers),
        )
        return _filled(buffers, counts)


def _buffers(units: int, tokens: int, chosen: int) -> tuple[Tensor, Tensor, Tensor]:
    most = tokens * min(units, chosen)
    return (
        torch.empty(units + 1, dtype=torch.int32),
        torch.empty(most, dtype=torch.int32),
        torch.empty(most, chosen, dtype=SLOT_DTYPE),
    )


def _addresses(buffers: tuple[Tensor, Tensor, Tensor]) -> tuple[int, int, int]:
    return buffers[0].data_ptr(), buffers[1].data_ptr(), buffers[2].data_ptr()


def _filled(buffers: tuple[Tensor, Tensor, Tensor], counts: list[int]) -> Assigned:
    start_R1, token_N, slot_NC = buffers
    copies = sum(counts)
    return Assigned(Copies(start_R1, token_N[:copies], slot_NC[:copies]), counts)


def counted(copies: Copies) -> Assigned:
    return Assigned(copies, copies.start_R1.diff().tolist())
