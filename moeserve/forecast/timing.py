"""Time one call again and again; the median counts, as it does where whole steps are timed; and
tell costs apart that come together, such as one in any case and one with each of something.

The clock is an argument: where everything runs on one thread, that thread's CPU time leaves out who
else uses the machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
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
    any_case, each = nearest_costs(
        [(weight, count * weight) for count, _, weight in points],
        [seconds * weight for _, seconds, weight in points],
    )
    return any_case, each


def nearest_costs(
    parts_NC: Sequence[Sequence[float]], seconds_N: Sequence[float]
) -> tuple[float, ...]:
    """C costs, none below 0, that come nearest to N sums by least squares; of a few parts, for
    every choice of those that cost something is tried."""
    A_NC, y_N = np.array(parts_NC, float), np.array(seconds_N, float)
    size_C = np.abs(A_NC).max(axis=0)
    A_NC = A_NC / np.where(size_C > 0, size_C, 1.0)
    count = A_NC.shape[1]
    tried = [np.zeros(count)]
    for n in range(1, count + 1):
        for columns in map(list, combinations(range(count), n)):
            found_C = np.zeros(count)
            found_C[columns] = np.linalg.lstsq(A_NC[:, columns], y_N, rcond=None)[0]
            if (found_C >= 0).all():
                tried.append(found_C)
    best_C = min(tried, key=lambda one_C: float(np.square(y_N - A_NC @ one_C).sum()))
    return tuple((best_C / np.where(size_C > 0, size_C, 1.0)).tolist())
