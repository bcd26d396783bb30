"""A new plan while serving: the layers that differ change hands one after the other.

Layers do not depend on each other, so every mixture of the old plan and the new one is a plan too.
A layer is prepared by all ranks beside their steps, and when the last has reported it, all take it
into use before the same step. One layer is on its way at a time: that is all the memory it takes.
Where a rank cannot prepare a layer, the rest of the change is abandoned, and what has been switched
stays.

Pure: rank 0 takes an order for all ranks from ``PlanSwitch`` at every step boundary, and gives it
their reports. Letters: S slots of a layer on all ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from moeserve.errors import PlacementError

# The experts in the slots of each layer, by model layer number.
Rows = Mapping[int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class PlanOrder:
    """What a rank does before a step, in this order: drop what it prepared (``abandon``); take into
    use layer ``switch``; begin to prepare layer ``prepare``, whose slots, of all ranks, are to hold
    ``expert_S``. ``turn`` counts preparations; the answer repeats it."""

    turn: int
    abandon: bool = False
    switch: int | None = None
    prepare: int | None = None
    expert_S: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PlanReport:
    """A rank has prepared the layer of ``turn``, or says in ``error`` why it cannot; or it has
    switched it (``pause_s`` is there then), which held up its step for so long."""

    turn: int
    error: str = ""
    pause_s: float | None = None
    prepare_s: float = 0.0
    bytes_read: int = 0


@dataclass(slots=True)
class PlanChange:
    """How a change went. ``pause_s`` is the longest that a switch held up a rank, ``paused_s`` the
    sum over layers of the slowest rank's, as is ``prepare_s``; ``bytes_read`` are of all ranks."""

    layers: int
    switched: int = 0
    bytes_read: int = 0
    prepare_s: float = 0.0
    pause_s: float = 0.0
    paused_s: float = 0.0
    error: str = ""
    finished: bool = False


class PlanSwitch:
    """Rank 0's. ``rows`` are what is in use now, layer by layer."""

    def __init__(self, rows: Rows, world: int) -> None:
        self.rows = dict(rows)
        self.change: PlanChange | None = None
        self._world = world
        self._pending: deque[tuple[int, tuple[int, ...]]] = deque()
        self._turn = 0
        self._preparing: tuple[int, tuple[int, ...]] | None = None
        self._unprepared: set[int] = set()
        self._unswitched: set[int] = set()
        self._switching: tuple[int, PlanChange] | None = None
        self._slowest_s = 0.0
        self._prepared_s = 0.0
        self._abandon = False

    def propose(self, rows: Rows) -> int:
        """Begin a change to ``rows``, instead of one that is under way; how many layers differ."""
        if rows.keys() != self.rows.keys():
            raise PlacementError(
                f"the new plan is for layers {sorted(rows)}, the model's are {sorted(self.rows)}"
            )
        for layer, expert_S in rows.items():
            held = self.rows[layer]
            if len(expert_S) != len(held):
                raise PlacementError(
                    f"layer {layer}: the new plan has {len(expert_S)} slots, and ranks were "
                    f"started with {len(held)}: solve with --slots {len(held)}, or start again"
                )
            if set(expert_S) != set(held):
                missing = sorted(set(held) ^ set(expert_S))
                raise PlacementError(f"layer {layer}: experts {missing} are in one plan only")
        self._stop("another plan came")
        differing = [(layer, row) for layer, row in rows.items() if row != self.rows[layer]]
        self._pending.extend(differing)
        self.change = PlanChange(len(differing), finished=not differing)
        return len(differing)

    @property
    def waiting_for(self) -> frozenset[int]:
        """Ranks that have yet to prepare the layer that is on its way."""
        return frozenset(self._unprepared)

    @property
    def ready(self) -> bool:
        """Whether ``order`` has something to say."""
        return self._abandon or self._may_switch or (self._preparing is None and self._may_prepare)

    def order(self) -> PlanOrder | None:
        """At a step boundary; what comes out reaches every rank before this step."""
        if not self.ready:
            return None
        abandon, self._abandon = self._abandon, False
        switch: int | None = None
        if self._may_switch and self._preparing is not None and self.change is not None:
            switch, expert_S = self._preparing
            self.rows[switch] = expert_S
            self._preparing = None
            self._switching, self._slowest_s = (self._turn, self.change), 0.0
            self._unswitched = set(range(self._world))
        if not self._may_prepare:
            return PlanOrder(self._turn, abandon, switch)
        self._preparing = self._pending.popleft()
        self._turn += 1
        self._unprepared, self._prepared_s = set(range(self._world)), 0.0
        return PlanOrder(self._turn, abandon, switch, *self._preparing)

    def report(self, rank: int, report: PlanReport) -> None:
        """Answers to turns that were abandoned change nothing."""
        change = self.change
        if report.pause_s is not None:
            self._count_pause(rank, report.turn, report.pause_s)
        elif change is not None and report.turn == self._turn and self._preparing is not None:
            change.bytes_read += report.bytes_read
            if report.error:
                self._stop(f"rank {rank}, layer {self._preparing[0]}: {report.error}")
            elif rank in self._unprepared:
                self._unprepared.discard(rank)
                more_s = max(0.0, report.prepare_s - self._prepared_s)
                change.prepare_s += more_s
                self._prepared_s += more_s

    @property
    def _may_switch(self) -> bool:
        return self._preparing is not None and not self._unprepared and not self._unswitched

    @property
    def _may_prepare(self) -> bool:
        return bool(self._pending) and self._preparing is None

    def _count_pause(self, rank: int, turn: int, pause_s: float) -> None:
        if self._switching is None or turn != self._switching[0] or rank not in self._unswitched:
            return
        change = self._switching[1]
        self._unswitched.discard(rank)
        self._slowest_s = max(self._slowest_s, pause_s)
        if not self._unswitched:
            change.switched += 1
            change.pause_s = max(change.pause_s, self._slowest_s)
            change.paused_s += self._slowest_s
            change.finished |= change.switched == change.layers

    def _stop(self, why: str) -> None:
        """Abandon what is not switched yet."""
        if self._preparing is not None:
            self._abandon = True
        if self.change is not None and not self.change.finished:
            self.change.error, self.change.finished = why, True
        self._preparing = None
        self._pending.clear()
        self._unprepared = set()
