"""What is kept to be shown: totals of the last minutes, and which answers came in time. Pure.

Memory is bounded by the time that is kept, whatever the number of requests.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass

from moeserve.errors import CancelledError
from moeserve.observe.requests import OK, RequestRecord

# Seconds between two points of a series, and how long they are kept.
SAMPLE_S = 5.0
KEPT_S = 600.0
# Answers are judged over so many seconds.
WINDOW_S = 60


@dataclass(frozen=True, slots=True)
class SloTargets:
    """Objectives of service level: seconds to the first token, and between tokens on average."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class Attainment:
    """Of the ``requests`` that ended within ``window_s``, how many had their first token in
    ``ttft_s``, how many had ``tpot_s`` or less between tokens, and how many both (``good``).

    One that failed has neither; one of a single token has no gaps that could be long. Those that
    were refused, or whose client left, are not among them.
    """

    window_s: int
    ttft_s: float
    tpot_s: float
    requests: int = 0
    ttft: int = 0
    tpot: int = 0
    good: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class Point:
    """``age_s`` seconds ago: tokens per second since the point before."""

    age_s: float
    prompt_per_s: float
    generated_per_s: float


@dataclass(frozen=True, slots=True)
class TrafficTotals:
    """Since the start."""

    prompt_tokens: int
    generated_tokens: int


class SloWindow:
    """Counts by the second in which a request ended."""

    def __init__(self, targets: SloTargets) -> None:
        self._targets = targets
        # Second, then requests, ttft, tpot, good, failed.
        self._seconds: deque[list[int]] = deque()

    def add(self, now: float, record: RequestRecord) -> None:
        """A request has ended."""
        if record.refused or record.status == CancelledError.code:
            return
        second = int(now)
        if not self._seconds or self._seconds[-1][0] != second:
            self._seconds.append([second, 0, 0, 0, 0, 0])
            self._forget(second)
        well = record.status == OK
        ttft = well and record.ttft_s is not None and record.ttft_s <= self._targets.ttft_s
        tpot = well and (record.tpot_s is None or record.tpot_s <= self._targets.tpot_s)
        counts = self._seconds[-1]
        for place, counted in enumerate((True, ttft, tpot, ttft and tpot, not well), 1):
            counts[place] += counted

    def attainment(self, now: float) -> Attainment:
        self._forget(int(now))
        sums = [sum(counts[place] for counts in self._seconds) for place in range(1, 6)]
        return Attainment(WINDOW_S, self._targets.ttft_s, self._targets.tpot_s, *sums)

    def _forget(self, second: int) -> None:
        while self._seconds and self._seconds[0][0] <= second - WINDOW_S:
            self._seconds.popleft()


class TrafficHistory:
    """TrafficTotals at intervals of ``SAMPLE_S``, the newest ``KEPT_S`` seconds of them."""

    def __init__(self) -> None:
        self._kept: deque[tuple[float, TrafficTotals]] = deque(maxlen=int(KEPT_S / SAMPLE_S) + 1)

    def add(self, now: float, totals: TrafficTotals) -> None:
        self._kept.append((now, totals))

    def points(self, now: float) -> tuple[Point, ...]:
        """One for each two totals that follow one another, oldest first."""
        found = []
        for (then, before), (at, totals) in itertools.pairwise(self._kept):
            seconds = max(at - then, 1e-3)
            found.append(
                Point(
                    age_s=round(now - at, 3),
                    prompt_per_s=_rate(before.prompt_tokens, totals.prompt_tokens, seconds),
                    generated_per_s=_rate(
                        before.generated_tokens, totals.generated_tokens, seconds
                    ),
                )
            )
        return tuple(found)


def _rate(before: int, now: int, seconds: float) -> float:
    return round(max(0, now - before) / seconds, 3)
