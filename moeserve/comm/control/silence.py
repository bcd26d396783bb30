"""Which ranks have been silent for too long. Pure: times are arguments.

A rank is late when nothing was received from it for longer than the limit while this one was itself
running: one that was stopped does not blame the others for its own sleep.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(slots=True)
class SilenceDetector:
    """``looked`` is when ``late`` was last asked, which is meant to be every ``period_s``;
    ``received_at[r]`` when rank r's last heartbeat came."""

    limit_s: float
    period_s: float
    looked: float
    received_at: dict[int, float] = field(default_factory=dict)

    @classmethod
    def begin(
        cls, ranks: Iterable[int], now: float, limit_s: float, period_s: float
    ) -> SilenceDetector:
        return cls(limit_s, period_s, now, dict.fromkeys(ranks, now))

    def record(self, rank: int, now: float) -> None:
        self.received_at[rank] = now

    def late(self, now: float) -> Mapping[int, float]:
        """Late ranks and how long they have been silent; what has arrived is recorded before."""
        slept = now - self.looked - 2 * self.period_s
        self.looked = now
        if slept > 0:
            for rank in self.received_at:
                self.received_at[rank] = min(now, self.received_at[rank] + slept)
        silent = {rank: now - received for rank, received in self.received_at.items()}
        return {rank: s for rank, s in silent.items() if s > self.limit_s}
