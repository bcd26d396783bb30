"""Experts of all layers in one arena of slots, read from disk as steps need them.

``ExpertStream`` owns the arena, decides by ``Residency`` what goes, and gives a layer's experts in
waves: those that are there first, so that they are computed with while the others are read. A wave
holds its experts until the next one is asked for. What fails leaves no slot half read: either all
of a record is there and checked, or its slot is empty.

Letters: see ``residency``.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeserve.errors import DataLossError, DeadlineError
from moeserve.offload.arena import ExpertSlots
from moeserve.offload.disk_file import DiskRegion
from moeserve.offload.mover import DiskMover, Read, Ticket
from moeserve.offload.residency import EMPTY, Residency

Ids = NDArray[np.int64]

# Parts in which a layer's missing experts are computed with as they come.
MOST_WAVES = 4
READ_DEADLINE_S = 30.0


@dataclass(slots=True)
class StreamCounts:
    """``hits``: experts a layer needed that were there, or being read ahead; ``misses``: that were
    not. Of those read ahead, ``ahead_used`` were needed by the layer and ``ahead_wasted`` were not,
    which read ``wasted_bytes``. ``waves`` of ``layers`` runs of a layer. ``evictions`` are experts
    that gave their slot to another."""

    layers: int = 0
    waves: int = 0
    hits: int = 0
    misses: int = 0
    ahead_used: int = 0
    ahead_wasted: int = 0
    wasted_bytes: int = 0
    evictions: int = 0


@dataclass(frozen=True, slots=True)
class _Load:
    ticket: Ticket
    region: DiskRegion


class ExpertStream:
    """``regions`` has the record of each expert of each layer that has experts. ``below`` are what
    ``mover`` decides by, whose steps begin with these. For one thread."""

    def __init__(
        self,
        regions: Mapping[int, Sequence[DiskRegion]],
        arena: ExpertSlots,
        residency: Residency,
        mover: DiskMover,
        *,
        check_always: bool = False,
        deadline_s: float = READ_DEADLINE_S,
        below: Sequence[Residency] = (),
    ) -> None:
        assert residency.slots == arena.slots, (residency.slots, arena.slots)
        self.counts = StreamCounts()
        self.arena, self.residency, self.mover = arena, residency, mover
        self._regions, self._below = regions, tuple(below)
        self._check_always, self._deadline_s = check_always, deadline_s
        self._loads: dict[int, _Load] = {}
        self._ahead: dict[int, set[int]] = {}
        self._wasted: set[int] = set()  # slots of those that no layer waits for
        self._checked: set[tuple[int, int]] = set()

    def begin_step(self) -> None:
        for residency in (self.residency, *self._below):
            residency.begin_step()

    def read_ahead(self, layer: int, experts: Ids, now: int) -> None:
        """Begin to read what is not there of these, as far as there is room."""
        missing = experts[self.residency.slot_LE[layer, experts] == EMPTY]
        begun = self._read(layer, missing.tolist(), now, ahead=True)
        self._ahead.setdefault(layer, set()).update(begun)

    def waves(
        self, layer: int, experts: Ids, *, together: bool = False
    ) -> Generator[Ids, None, None]:
        """The experts that the layer needs now, which are distinct, in parts: what is given can be
        computed with, by ``residency.slot_LE``, until the next part is asked for. To be closed
        where it is not asked to the end. ``together`` is an empty part when reading has begun, and
        then all of them at once, as far as there is room.

        Raises as ``DiskMover.wait`` and the checks of ``DiskFile``.
        """
        residency, counts = self.residency, self.counts
        residency.use(layer, experts)
        there = residency.slot_LE[layer, experts] != EMPTY
        counts.layers += 1
        counts.hits += int(there.sum())
        counts.misses += int((~there).sum())
        self._settle_ahead(layer, set(experts.tolist()))
        self._end_wasted()
        left = experts
        while len(left):
            now = self._begin_round(layer, left)
            if not len(now):
                self._finish(next(iter(self._loads)), needed=False)
                continue
            slots = residency.slot_LE[layer, now].copy()
            try:
                yield from self._parts(now, slots, together)
            finally:
                residency.release(slots)
            left = np.setdiff1d(left, now, assume_unique=True)

    def _begin_round(self, layer: int, experts: Ids) -> Ids:
        """Those that are there and those whose reading has begun, all held; none where all room is
        held by what is being read."""
        residency = self.residency
        there = residency.slot_LE[layer, experts] != EMPTY
        slots = residency.slot_LE[layer, experts[there]].copy()
        residency.hold(slots)  # what is there must not give way to what is missing
        try:
            missing = experts[~there].tolist()
            begun = np.array(self._read(layer, missing, layer, ahead=False), np.int64)
        except BaseException:
            residency.release(slots)
            raise
        residency.hold(residency.slot_LE[layer, begun])
        return np.concatenate((experts[there], begun))

    def _parts(self, experts: Ids, slots: NDArray[np.int32], together: bool) -> Iterator[Ids]:
        """Those whose record is there, then the others as they come, or ``together``."""
        coming = np.array([slot in self._loads for slot in slots.tolist()])
        if together:
            if coming.any():
                yield experts[:0]
            for slot in slots[coming].tolist():
                self._finish(slot, needed=True)
            self.counts.waves += 1
            yield experts
            return
        if not coming.all():
            self.counts.waves += 1
            yield experts[~coming]
        late = np.flatnonzero(coming)
        for part in np.array_split(late, min(MOST_WAVES, max(1, len(late)))):
            for slot in slots[part].tolist():
                self._finish(slot, needed=True)
            if len(part):
                self.counts.waves += 1
                yield experts[part]

    def _read(self, layer: int, experts: Sequence[int], now: int, *, ahead: bool) -> list[int]:
        """Those for which there is room, whose reading has begun into slots held for it."""
        if not experts:
            return []
        slots = self.residency.place(layer, experts, now)
        self.counts.evictions = self.residency.evictions
        begun = list(experts[: len(slots)])
        regions = [self._regions[layer][expert] for expert in begun]
        reads = [
            Read(region.file, region.offset, region.nbytes, self.arena.address(slot))
            for region, slot in zip(regions, slots, strict=True)
        ]
        try:
            tickets = self.mover.submit(reads, ahead=ahead)
        except BaseException:
            for slot in slots:
                self._let_go(slot, empty=True)
            raise
        for slot, ticket, region in zip(slots, tickets, regions, strict=True):
            self._loads[slot] = _Load(ticket, region)
        return begun

    def _settle_ahead(self, layer: int, needed: set[int]) -> None:
        """What was read ahead for the layer is needed now, or not at all."""
        for expert in sorted(self._ahead.pop(layer, set())):
            slot = int(self.residency.slot_LE[layer, expert])
            load = self._loads.get(slot)
            if expert in needed:
                self.counts.ahead_used += 1
                if load is not None:
                    self.mover.promote(load.ticket)
                continue
            self.counts.ahead_wasted += 1
            if load is not None and self.mover.cancel(load.ticket):
                del self._loads[slot]
                self._let_go(slot, empty=True)
            else:
                self.counts.wasted_bytes += self._regions[layer][expert].nbytes
                if load is not None:
                    self._wasted.add(slot)

    def _end_wasted(self) -> None:
        """What is read by now holds its slot no longer."""
        for slot in sorted(self._wasted):
            with suppress(DeadlineError):
                self._finish(slot, needed=False, deadline_s=0.0)

    def _finish(self, slot: int, *, needed: bool, deadline_s: float | None = None) -> None:
        """Wait until the slot's record is there, and check it. What could not be read is no fault
        where it is not ``needed``: it is read again when it is."""
        load = self._loads[slot]
        try:
            self.mover.wait(load.ticket, self._deadline_s if deadline_s is None else deadline_s)
            load.region.file.require_unchanged()
            self._check(slot, load.region)
        except DeadlineError:  # it is still being read
            raise
        except DataLossError:
            del self._loads[slot]
            self._let_go(slot, empty=True)
            if needed:
                raise
        else:
            del self._loads[slot]
            self._let_go(slot, empty=False)

    def _let_go(self, slot: int, *, empty: bool) -> None:
        """The reading into a slot has ended, or did not begin."""
        self._wasted.discard(slot)
        if empty:
            self.residency.vacate(slot)
        self.residency.release_one(slot)

    def _check(self, slot: int, region: DiskRegion) -> None:
        place = self.residency.occupant(slot)
        assert place is not None, slot
        if region.digest and (self._check_always or place not in self._checked):
            data = self.arena.data(slot, region.nbytes)
            region.file.require_digest(data, region.offset, region.digest)
            self._checked.add(place)
