"""What one door believes of the ranks: the newest table, and what it has sent since.

A request that was sent counts at its rank until a table shows it. Of several doors, which all see
the same table, each takes part of what it shows: where more requests wait at doors than there are
slots, each has a share of the slots by what waits at it (``slots_of_door``); in any case each
prefers ranks that the others do not prefer, in turn from the one with the fewest tokens on.

Letters at the end of names are shapes: R ranks. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeserve.core import RequestId
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.ranks.loads import I64, RankLoads, room_of

# The fraction that rotates shares: multiples of the golden ratio, in 1 / _TURNS.
_TURNS, _STRIDE = 1024, 633


@dataclass(frozen=True, slots=True)
class Doors:
    """An instance's doors, each in the process of one of ``ranks``; this is that of ``own``."""

    ranks: tuple[int, ...] = (0,)
    own: int = 0

    def __post_init__(self) -> None:
        assert self.own in self.ranks, f"no door at rank {self.own}, only at {self.ranks}"


@dataclass(slots=True)
class _Sent:
    """What a request adds to its rank's load; tables show it from step ``taken`` on."""

    rank: int
    tokens: int
    uncomputed: int
    blocks: int
    taken: int | None = None


class RankView:
    """Room and load of every rank, as far as known. ``ahead`` requests may wait at each."""

    def __init__(
        self, config: SchedulerConfig, loads: RankLoads, doors: Doors, *, ahead: int
    ) -> None:
        self._config = config
        self._door_ranks = np.array(doors.ranks)
        self._door = doors.ranks.index(doors.own)
        self._ahead = ahead
        self._unshown: dict[RequestId, _Sent] = {}
        self.publish(loads)

    def publish(self, loads: RankLoads) -> None:
        """The newest table."""
        room, doors = room_of(loads, self._config), len(self._door_ranks)
        self.step = loads.step
        self.running_R = loads.running_R + loads.waiting_R
        self.tokens_R = loads.held_R.copy()
        self._slots_R, self._budget_R, self._blocks_R = room.slots_R, room.budget_R, room.blocks_R
        self._share_R = room.slots_R.copy()
        self._turn_R: NDArray[np.int64] | None = None
        if doors > 1:
            free_R = room.free_R
            order_R = np.lexsort((loads.held_R, free_R == 0))
            self._turn_R = np.empty_like(order_R)
            self._turn_R[order_R] = (np.arange(len(order_R)) - self._door) % doors
            queued_D = loads.queued_R[self._door_ranks]
            if queued_D.sum() > free_R.sum():
                self._share_R = slots_of_door(free_R, order_R, queued_D, self._door, loads.step)
        self._unshown = {
            request_id: sent
            for request_id, sent in self._unshown.items()
            if sent.taken is None or sent.taken > loads.step
        }
        self._count_unshown()

    def ranks_with_room(self, blocks: int) -> NDArray[np.intp]:
        """Those that can run a request of so many blocks in their next step; if there is none,
        those full ones where the fewest wait."""
        able_R = (self._budget_R > 0) & (self._blocks_R >= blocks)
        now = np.flatnonzero(able_R & (self._share_R > 0) & (self._slots_R > 0))
        if len(now) or not self._ahead:
            return now
        full = np.flatnonzero(able_R & (self._slots_R <= 0) & (self._slots_R > -self._ahead))
        if not len(full):
            return full
        slots_C = self._slots_R[full]
        fewest: NDArray[np.intp] = full[slots_C == slots_C.max()]
        return fewest

    def tokens_of(self, ranks: NDArray[np.intp]) -> I64:
        """Of these ranks' requests. Where another door's turn comes before this one's the rank
        counts as busier than any that is this door's."""
        tokens_C: I64 = self.tokens_R[ranks]
        if self._turn_R is not None:
            turn_C = self._turn_R[ranks]
            spread = int(tokens_C.max() - tokens_C.min()) + 1
            tokens_C[turn_C > 0] += spread
            tokens_C += spread * turn_C // len(self._door_ranks)
        return tokens_C

    def send(
        self, request_id: RequestId, rank: int, *, tokens: int, uncomputed: int, blocks: int
    ) -> None:
        """A request goes to a rank."""
        self._unshown[request_id] = sent = _Sent(rank, tokens, uncomputed, blocks)
        self._count(sent, 1)

    def taken(self, request_id: RequestId, step: int) -> None:
        """Tables show it from this step on."""
        sent = self._unshown.get(request_id)
        if sent is not None:
            sent.taken = step
            if step <= self.step:
                self.forget(request_id)

    def forget(self, request_id: RequestId, *, only_untaken: bool = False) -> None:
        """A request is no longer on its way, if it was."""
        sent = self._unshown.get(request_id)
        if sent is not None and not (only_untaken and sent.taken is not None):
            del self._unshown[request_id]
            self._count(sent, -1)

    def _count(self, sent: _Sent, sign: int) -> None:
        rank = sent.rank
        self.running_R[rank] += sign
        self.tokens_R[rank] += sign * sent.tokens
        self._slots_R[rank] -= sign
        self._share_R[rank] -= sign
        self._budget_R[rank] -= sign * sent.uncomputed
        self._blocks_R[rank] -= sign * (sent.blocks + 1)

    def _count_unshown(self) -> None:
        """``_count`` of all, at once."""
        if not self._unshown:
            return
        rows = [(s.rank, s.tokens, s.uncomputed, s.blocks) for s in self._unshown.values()]
        rank, tokens, uncomputed, blocks = np.array(rows, np.int64).T
        np.add.at(self.running_R, rank, 1)
        np.add.at(self.tokens_R, rank, tokens)
        np.subtract.at(self._slots_R, rank, 1)
        np.subtract.at(self._share_R, rank, 1)
        np.subtract.at(self._budget_R, rank, uncomputed)
        np.subtract.at(self._blocks_R, rank, blocks + 1)


def slots_of_door(
    free_R: I64, order_R: NDArray[np.intp], queued_D: I64, door: int, step: int
) -> I64:
    """By rank, which of ``free_R`` slots a door may take; those of all doors add up to all.

    Slots stand in a row, ranks in the given order. Each door has a stretch of it as long as its
    part of all ``queued_D`` requests; what rounding gives to one and not another differs by step.
    """
    total, queued = int(free_R.sum()), int(queued_D.sum())
    upto = np.cumsum(queued_D)
    turn = step * _STRIDE % _TURNS

    def edge(waiting: int) -> int:  # the first slot at or after this part of the row
        return max(0, -((turn * queued - _TURNS * total * waiting) // (_TURNS * queued)))

    first, end = edge(int(upto[door] - queued_D[door])), edge(int(upto[door]))
    stop = np.cumsum(free_R[order_R])
    share_R = np.empty_like(free_R)
    share_R[order_R] = np.clip(
        np.minimum(stop, end) - np.maximum(stop - free_R[order_R], first), 0, None
    )
    return share_R
