"""Time one call again and again; the median counts, as it does where whole steps are timed.

The clock is an argument: where everything runs on one thread, that thread's CPU time leaves out who
else uses the machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

LEAST, MOST = 3, 400
LEAST_SECONDS = 1e-9


@dataclass(frozen=True, slots=True)
class CallTimer:
    """At least three calls, then as many as fit into so many ``seconds`` of ``clock``."""

    clock: Callable[[], float] = time.perf_counter
    seconds: float = 0.012

    def typical(self, call: Callable[[], object]) -> float:
        """Seconds, after one call to warm up."""
        call()
        took, end = list[float](), self.clock() + self.seconds
        while len(took) < LEAST or (len(took) < MOST and self.clock() < end):
            begin = self.clock()
            call()
            took.append(self.clock() - begin)
        # A clock of CPU time may stand still for a moment.
        return max(LEAST_SECONDS, median(took))
