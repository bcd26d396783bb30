"""Moves running requests of a gateway off members whose memory runs full (``routing.crowding``).

A timer of the event loop looks at the loads; what is to move, ``ClusterEngine`` does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from moeserve.pools.routing.crowding import Crowding
from moeserve.pools.routing.loads import LoadTable

# As often as members report.
LOOK_S = 0.5


class RequestMover(Protocol):
    """``pools.cluster.ClusterEngine``."""

    def move_from(self, source: str, target: str) -> bool: ...


@dataclass(slots=True)
class RebalanceCounts:
    """Pairs of a crowded member and a free one, requests of this gateway that were asked to move,
    and members that are crowded now."""

    pairs: int = 0
    asked: int = 0
    crowded: int = 0


class Rebalancing:
    """From ``start`` to ``close``, on the event loop's thread. ``table`` is by ``clock``."""

    def __init__(
        self,
        table: LoadTable,
        mover: RequestMover,
        crowding: Crowding,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._table = table
        self._mover = mover
        self._crowding = crowding
        self._clock = clock
        self._timer: asyncio.TimerHandle | None = None
        self.counts = RebalanceCounts()

    def start(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._tick)

    def look(self) -> None:
        """What is due now."""
        heard = [row for row in self._table.rows.values() if not self._table.is_late(row)]
        pairs = self._crowding.decide(heard, self._clock())
        self.counts.crowded = len(self._crowding.crowded)
        for pair in pairs:
            self.counts.pairs += 1
            self.counts.asked += self._mover.move_from(pair.source, pair.target)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _tick(self) -> None:
        self.start()
        self.look()
