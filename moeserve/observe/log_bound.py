"""A bound on how many lines the same thing may write: what strangers cause must not fill a disk."""

from __future__ import annotations

from collections.abc import Callable


class LogBound:
    """Admits ``most`` lines in each period, and counts those that are left out. ``clock`` is in
    seconds."""

    def __init__(self, most: int, period_s: float, clock: Callable[[], float]) -> None:
        self._most = most
        self._period_s = period_s
        self._clock = clock
        self._began = float("-inf")
        self._admitted = 0
        self._left_out = 0

    def admits(self) -> bool:
        """Whether one more is written; it counts as left out otherwise."""
        now = self._clock()
        if now - self._began >= self._period_s:
            self._began, self._admitted = now, 0
        if self._admitted >= self._most:
            self._left_out += 1
            return False
        self._admitted += 1
        return True

    def take_left_out(self) -> int:
        """How many were left out since this was asked the last time."""
        count, self._left_out = self._left_out, 0
        return count
