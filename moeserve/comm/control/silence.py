"""When is a rank lost? Pure: times are arguments.

A rank is late when nothing was heard of it for longer than the limit while this one was itself
running: one that was stopped does not blame the others for its own sleep.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(slots=True)
class SilenceDetector:
    """``looked`` is when this rank last looked; it means to look every ``period_s``."""

    limit_s: float
    period_s: float
    looked: float
    heard: dict[int, float] = field(default_factory=dict)

    @classmethod
    def begin(
        cls, ranks: Iterable[int], now: float, limit_s: float, period_s: float
    ) -> SilenceDetector:
        return cls(limit_s, period_s, now, dict.fromkeys(ranks, now))

    def record(self, rank: int, now: float) -> None:
        self.heard[rank] = now

    def late(self, now: float) -> Mapping[int, float]:
        """Late ranks and how long they have been silent. What arrived must be heard before."""
        slept = now - self.looked - 2 * self.period_s
        self.looked = now
        if slept > 0:
            for rank in self.heard:
                self.heard[rank] = min(now, self.heard[rank] + slept)
        silent = {rank: now - heard for rank, heard in self.heard.items()}
        return {rank: s for rank, s in silent.items() if s > self.limit_s}
