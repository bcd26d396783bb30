"""Where copies of KV lie in host memory: places of one position each, in long runs.

A copy is made of runs; of each, the KV of consecutive positions in all caches lies in consecutive
places. A free stretch that is long enough for a whole run is preferred, the shortest of them; else
the longest ones are taken, so a copy has as few runs as there can be. Stretches that are given back
join their free neighbours. Pure.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SwapRun:
    """Positions ``start .. start + count - 1`` of a sequence lie from the place ``at`` on."""

    start: int
    count: int
    at: int

    @property
    def stop(self) -> int:
        return self.start + self.count


class SwapSpace:
    """``places`` of them, all free at first."""

    def __init__(self, places: int) -> None:
        assert places >= 0, places
        self.places = self.num_free = places
        self._free: list[tuple[int, int]] = [(0, places)] if places else []  # place, how many

    def take(self, start: int, count: int) -> list[SwapRun] | None:
        """Places for ``count`` positions from ``start`` on, in as few runs as there can be; None
        where there are too few."""
        assert count > 0, count
        if count > self.num_free:
            return None
        runs: list[SwapRun] = []
        while count:
            fits = [found for found in self._free if found[1] >= count]
            at, free = min(fits, key=_length) if fits else max(self._free, key=_length)
            self._free.remove((at, free))
            taken = min(free, count)
            if taken < free:
                insort(self._free, (at + taken, free - taken))
            runs.append(SwapRun(start, taken, at))
            start, count = start + taken, count - taken
            self.num_free -= taken
        return runs

    def give_back(self, run: SwapRun) -> None:
        at, count = run.at, run.count
        here = bisect_left(self._free, (at, 0))
        assert here == len(self._free) or at + count <= self._free[here][0], f"{run} is free"
        if here < len(self._free) and self._free[here][0] == at + count:
            count += self._free.pop(here)[1]
        if here:
            before, free = self._free[here - 1]
            assert before + free <= at, f"{run} is free"
            if before + free == at:
                self._free.pop(here - 1)
                at, count = before, free + count
        insort(self._free, (at, count))
        self.num_free += run.count


def _length(stretch: tuple[int, int]) -> int:
    return stretch[1]
