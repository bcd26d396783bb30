"""Which copies of a batch's tokens go where, by native code; ``assign`` is its numpy twin.

Letters: T tokens, C choices, N copies, U units (ranks, or nodes of several).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeserve.comm import _comm
from moeserve.comm.layout import LayerLayout
from moeserve.errors import ConfigError
from moeserve.kernels.wire import Copies, Wire

MOST_SLOTS = 32767


@dataclass(frozen=True, slots=True)
class Assigned:
    """``count_R`` as a list: how many copies for each unit."""

    copies: Copies
    count_R: list[int]


class Table:
    """The slots of one layer, ready for look-up."""

    def __init__(self, layout: LayerLayout) -> None:
        if len(layout.expert_S) > MOST_SLOTS:
            raise ConfigError(
                f"{len(layout.expert_S)} slots in a layer: at most {MOST_SLOTS} are served"
            )
        self._slots = layout.slots
        self._world = layout.world
        self._handle = _comm.Table(layout.expert_S.tolist(), layout.num_experts, layout.world)

    def assign(self, ids_TC: Tensor, home: int, *, ranks_per_unit: int = 1) -> Assigned:
        """Copies of the tokens of rank ``home``; a unit's slots are numbered through its ranks.

        ``ids_TC`` is int32 and contiguous, of known experts; -1 is no choice.
        """
        tokens, chosen = ids_TC.shape
        units = self._world // ranks_per_unit
        room = _room(units, tokens, chosen)
        counts = self._handle.assign(
            ids_TC.data_ptr(), tokens, chosen, home, ranks_per_unit, *_addresses(room)
        )
        return _cut(room, counts)

    def spread(self, segments: Sequence[Tensor], wire: Wire, ranks: int) -> Assigned:
        """Copies of records that came to a unit of ``ranks``, by rank; their slots say where to."""
        rows = [len(s) // wire.row_bytes for s in segments]
        room = _room(ranks, sum(rows), wire.top_k)
        slots_at = wire.row_bytes - -(-2 * wire.top_k // 4) * 4
        counts = _comm.spread(
            [s.data_ptr() for s in segments],
            rows,
            wire.row_bytes,
            slots_at,
            wire.top_k,
            ranks,
            self._slots,
            *_addresses(room),
        )
        return _cut(room, counts)


def _room(units: int, tokens: int, chosen: int) -> tuple[Tensor, Tensor, Tensor]:
    most = tokens * min(units, chosen)
    return (
        torch.empty(units + 1, dtype=torch.int32),
        torch.empty(most, dtype=torch.int32),
        torch.empty(most, chosen, dtype=torch.int16),
    )


def _addresses(room: tuple[Tensor, Tensor, Tensor]) -> tuple[int, int, int]:
    return room[0].data_ptr(), room[1].data_ptr(), room[2].data_ptr()


def _cut(room: tuple[Tensor, Tensor, Tensor], counts: list[int]) -> Assigned:
    start_R1, token_N, slot_NC = room
    copies = sum(counts)
    return Assigned(Copies(start_R1, token_N[:copies], slot_NC[:copies]), counts)
