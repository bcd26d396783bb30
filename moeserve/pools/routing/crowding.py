"""Which members should give running requests away, and to whom, so that it does not swing.

A member is crowded from when it is less free than ``low`` (``freeness``: decode steps until memory
is full) until it is as free as ``calm``; it gives to members that are freer than ``high``, which
are not crowded for it. Pairs come at a bounded rate, so that reports can show what moved before
more does. One that drains is crowded whatever it holds.

Gateways decide by themselves: each moves its own requests, at its own rate.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moeserve.errors import ConfigError
from moeserve.pools.routing.freeness import HEADROOM, Headroom, Move, freeness, rebalance
from moeserve.pools.routing.loads import LoadRow

# Pairs that may come at once where none came for a while.
MOST_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class CrowdMarks:
    """Steps; ``low < calm <= high``, else ConfigError."""

    low: float = 32.0
    calm: float = 64.0
    high: float = 128.0

    def __post_init__(self) -> None:
        if not self.low < self.calm <= self.high:
            raise ConfigError(f"marks of crowding: expected low < calm <= high, got {self}")


class Crowding:
    """``per_s`` pairs a second, on average, at most; 0 is none. ``decide`` is told the time, which
    is monotonic."""

    def __init__(
        self, per_s: float, marks: CrowdMarks = CrowdMarks(), headroom: Headroom = HEADROOM
    ) -> None:
        self._per_s = per_s
        self._marks = marks
        self._headroom = headroom
        self._crowded: frozenset[str] = frozenset()
        self._left = 0.0
        self._asked: float | None = None

    @property
    def crowded(self) -> frozenset[str]:
        """Ids of members, as of the last decision."""
        return self._crowded

    def decide(self, rows: Iterable[LoadRow], now: float) -> tuple[Move, ...]:
        """The least free member first. Each pair is one request to be moved."""
        marks = self._marks
        free = [(freeness(row, self._headroom), row) for row in rows if row.member.role.decodes]
        self._crowded = frozenset(
            row.member.id
            for steps, row in free
            if steps < (marks.calm if row.member.id in self._crowded else marks.low)
        )
        looked = [r for steps, r in free if r.member.id in self._crowded or steps > marks.high]
        pairs = rebalance(looked, low=marks.calm, high=marks.high, headroom=self._headroom)
        if self._asked is not None:
            gained = self._per_s * max(0.0, now - self._asked)
            self._left = min(max(1.0, min(self._per_s, MOST_AT_ONCE)), self._left + gained)
        self._asked = now
        pairs = pairs[: int(self._left)]
        self._left -= len(pairs)
        return pairs
