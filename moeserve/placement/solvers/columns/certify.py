"""Bounds on all layers of a plan within a time limit, and better layers where they turn up.

Every layer takes its searches in turn, the least advanced first, so that time that runs out leaves
all layers with a bound of about the same kind. What is reported at any moment is valid.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Condition

import numpy as np
from numpy.typing import NDArray

from moeserve.placement.cluster import Cluster
from moeserve.placement.plan import Plan
from moeserve.placement.solvers.columns.generation import ColumnSearch
from moeserve.placement.solvers.columns.levels import BoundedRouting, Level, levels_of
from moeserve.placement.solvers.columns.pricing import Effort

F64 = NDArray[np.float64]
I32 = NDArray[np.int32]

_SHARES = 3.0  # of the time that each unfinished search would have, for one step


class PlanBounds:
    """Owns the searches of a plan's layers on given routing, ``most_L`` being the load limits."""

    def __init__(self, plan: Plan, routing: BoundedRouting, cluster: Cluster, most_L: F64) -> None:
        self._plan = plan
        self._levels: list[list[tuple[Level, ColumnSearch]]] = []
        for l in range(plan.num_layers):
            levels = levels_of(plan, routing, cluster, float(most_L[l]), l)
            self._levels.append([(v, ColumnSearch(v.layer, [v.block_E])) for v in levels])

    def run(
        self,
        *,
        seconds: float | None,
        nodes: int,
        threads: int = 1,
        cpu: bool = False,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Searches until all are done, or ``seconds`` are over (None: no clock is looked at).

        ``nodes`` limits each single search. With ``cpu``, seconds are CPU time of this process.
        """
        searches = [search for levels in self._levels for _, search in levels]
        _Turns(searches, seconds, nodes, progress, cpu).run(threads)

    def bound_L(self) -> F64:
        """[L]: priced copies per token-layer that no plan within the limits goes below."""
        found = [
            sum(max(0.0, v.price * s.certified().bound - v.spared) for v, s in levels)
            for levels in self._levels
        ]
        return np.array(found, np.float64)

    def objective_L(self) -> F64:
        """[L]: priced copies per token-layer of the best cover of each level that is known."""
        found = [
            sum(max(0.0, v.price * v.layer.in_tokens(s.cost()) - v.spared) for v, s in levels)
            for levels in self._levels
        ]
        return np.array(found, np.float64)

    def better_rows(self) -> dict[int, I32]:
        """Layers for which a cheaper grouping of single copies on devices was found: its slots."""
        rows = {}
        single_L = (self._plan.copies_LE == 1).all(axis=1)
        for l, levels in enumerate(self._levels):
            if len(levels) == 1 and single_L[l] and levels[0][1].block_E is not None:
                block_E = levels[0][1].block_E
                rows[l] = np.argsort(block_E, kind="stable").astype(np.int32)
        return rows


class _Turns:
    """Hands the least advanced search that nobody works on to the next worker."""

    def __init__(
        self, searches: Sequence[ColumnSearch], seconds: float | None, nodes: int,
        progress: Callable[[int, int], None], cpu: bool,
    ) -> None:  # fmt: skip
        self._open = list(searches)
        self._total, self._nodes, self._progress = len(searches), nodes, progress
        self._cpu, self._clock = cpu, time.process_time if cpu else time.monotonic
        self._ends = math.inf if seconds is None else self._clock() + seconds
        self._busy: list[ColumnSearch] = []
        self._changed = Condition()
        self._threads = 1

    def run(self, threads: int) -> None:
        self._threads = threads
        if threads == 1:
            self._work()
            return
        with ThreadPoolExecutor(max_workers=threads) as pool:
            for worker in [pool.submit(self._work) for _ in range(threads)]:
                worker.result()

    def _work(self) -> None:
        while (search := self._next()) is not None:
            try:
                search.step(self._effort())
            finally:
                with self._changed:
                    self._busy.remove(search)
                    if not search.done:
                        self._open.insert(0, search)  # the same again, until it is ahead
                    self._progress(self._total - len(self._open) - len(self._busy), self._total)
                    self._changed.notify_all()

    def _next(self) -> ColumnSearch | None:
        with self._changed:
            while self._clock() < self._ends:
                self._open.sort(key=lambda search: search.progress)
                if self._open:
                    search = self._open.pop(0)
                    self._busy.append(search)
                    return search
                if not self._busy:
                    return None
                # Steps end by themselves, at the latest with the time for all.
                left = self._ends - self._clock()
                self._changed.wait(timeout=1.0 if math.isinf(left) else max(0.0, left))
            return None

    def _effort(self) -> Effort:
        left = self._ends - self._clock()
        if math.isinf(left):
            return Effort(nodes=self._nodes)
        with self._changed:
            waiting = len(self._open) + len(self._busy)
        share = _SHARES * left * self._threads / max(1, waiting)
        return Effort(self._nodes, max(0.0, min(left, share)), self._cpu)
