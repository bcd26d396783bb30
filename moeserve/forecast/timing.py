"""Time one call again and again; the median counts, as it does where whole steps are timed; and
tell a cost that comes in any case from one that comes with each of something.

The clock is an argument: where everything runs on one thread, that thread's CPU time leaves out who
else uses the machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

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


def two_costs(points: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Seconds in any case and of each, from points of how many there were, seconds, and how much
    that counts: least squares, with nothing below 0."""
    if not points:
        return 0.0, 0.0
    count_N, seconds_N, weight_N = (np.array(column, float) for column in zip(*points, strict=True))
    both_NC = np.stack([np.ones_like(count_N), count_N], 1) * weight_N[:, None]
    y_N = seconds_N * weight_N
    tried = [(0.0, 0.0)]
    for columns in ([0], [1], [0, 1]):
        found = np.zeros(2)
        found[columns] = np.linalg.lstsq(both_NC[:, columns], y_N, rcond=None)[0]
        if (found >= 0).all():
            tried.append((float(found[0]), float(found[1])))
    return min(tried, key=lambda one: float(np.square(y_N - both_NC @ np.array(one)).sum()))
