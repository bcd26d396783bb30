"""Time one call again and again; the shortest counts, for whatever disturbs a call makes it longer.

The clock is an argument: where everything runs on one thread, that thread's CPU time leaves out who
else uses the machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

LEAST, MOST = 3, 400
LEAST_SECONDS = 1e-9


@dataclass(frozen=True, slots=True)
class CallTimer:
    """At least three calls, then as many as fit into so many ``seconds`` of ``clock``."""

    clock: Callable[[], float] = time.perf_counter
    seconds: float = 0.012

    def shortest(self, call: Callable[[], object]) -> float:
        """Seconds, after one call to warm up."""
        call()
        best, count = float("inf"), 0
        end = self.clock() + self.seconds
        while count < LEAST or (count < MOST and self.clock() < end):
            begin = self.clock()
            call()
            took = self.clock() - begin
            # A clock of CPU time may stand still for a moment.
            best = min(best, took) if took > 0 else best
            count += 1
        return best if best < float("inf") else LEAST_SECONDS
