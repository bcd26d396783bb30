"""When a part of a cluster that has ended by itself is started anew, and when it no longer is.

After a wait that doubles from end to end, ``most`` times within ``within_s``; a part that has run
for longer than that begins with the first wait again. One that was asked to leave, or refuses its
settings, would only do so again. Pure: times are arguments, in seconds of a monotonic clock.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

# What a part ends with when it was asked to leave, and when its settings are wrong.
LEFT, REFUSED = 0, 2


@dataclass(frozen=True, slots=True)
class RestartLimits:
    """Waits of ``first_s``, twice that, and so on, ``most_s`` at most."""

    first_s: float = 1.0
    most_s: float = 30.0
    most: int = 5
    within_s: float = 300.0


class Restarts:
    """Of one part."""

    def __init__(self, limits: RestartLimits = RestartLimits()) -> None:
        self._limits = limits
        self._ends: deque[float] = deque()

    def wait_s(self, status: int, now: float) -> float | None:
        """It has ended: how long until it is started anew; None: it is not."""
        limits = self._limits
        while self._ends and self._ends[0] <= now - limits.within_s:
            self._ends.popleft()
        if status in (LEFT, REFUSED) or len(self._ends) >= limits.most:
            return None
        self._ends.append(now)
        return float(min(limits.most_s, limits.first_s * 2 ** (len(self._ends) - 1)))

    def why_not(self, status: int) -> str:
        """After ``wait_s`` has said None."""
        if status == LEFT:
            return "it was asked to leave, and is not started anew"
        if status == REFUSED:
            return "its settings are wrong: it is not started anew"
        limits = self._limits
        return (
            f"it is given up, for it has ended {limits.most + 1} times within "
            f"{limits.within_s:.0f} s: what it printed last says why"
        )
