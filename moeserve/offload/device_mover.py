"""Moves experts from disk into a device's slots, by way of slots in host memory.

Host slots are page-locked, and a tier of their own: an expert that was read stays there, as room
and ``Residency`` allow, so that it is copied to the device again without the disk. With one slot
for each expert all are read once; with a few they are buffers that reads pass through.

A ``DiskMover`` to whoever submits, which addresses slots of the device's arena. An expert in host
memory is on its way at once, by a copy that runs after the kernels launched before ``submit`` (they
may read what the slot held). What is on disk is copied when it was read and checked, which is seen
whenever this object is called: it has no thread. ``wait`` returns when the copy is on its way and
kernels launched from then on run after it; the host waits for the disk alone, and for a copy where
no host slot is free.

A host slot is held from the reading into it to the end of the last copy out of it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from moeserve.errors import DataLossError, DeadlineError
from moeserve.offload.arena import Arena, DeviceArena
from moeserve.offload.copies import DeviceCopies, Mark
from moeserve.offload.disk_file import DiskRegion
from moeserve.offload.mover import MOST_TICKETS, DiskMover, MoverCounts, Read, Ticket, too_many
from moeserve.offload.residency import EMPTY, Residency

CLOSE_DEADLINE_S = 30.0


@dataclass(slots=True)
class CopyCounts:
    """Experts copied to the device, their bytes, and how many of them were in host memory already.
    ``host_evictions`` are experts that gave their host slot to another."""

    copies: int = 0
    copied_bytes: int = 0
    from_host: int = 0
    host_evictions: int = 0


@dataclass(slots=True)
class _Move:
    """Of one expert to the device's slot at ``read.address``. It waits for a host slot (``host`` is
    None), or is read from disk (``disk``), or its copy is on its way (``copying``), or there is a
    ``fault``."""

    ticket: Ticket
    read: Read
    layer: int
    expert: int
    after: Mark
    ahead: bool
    host: int | None = None
    disk: Ticket | None = None
    copying: bool = False
    mark: Mark = None
    fault: DataLossError | None = None


class HostSlots:
    """Where experts lie in host memory. ``regions`` has the record of each expert of each layer
    that has experts; they are told from one another by where they are in their files."""

    def __init__(self, regions: Mapping[int, Sequence[DiskRegion]], arena: Arena) -> None:
        layers = max(regions, default=-1) + 1
        counts = [len(regions.get(l, ())) for l in range(layers)]
        self.arena, self.residency = arena, Residency(counts, arena.slots)
        self.regions = regions
        self.place_of = {
            (id(region.file), region.offset): (l, e)
            for l, of_layer in regions.items()
            for e, region in enumerate(of_layer)
        }


class DeviceMover:
    """``disk`` reads into ``host``, ``copies`` bring it to ``arena``. It owns ``disk``."""

    def __init__(
        self,
        host: HostSlots,
        arena: DeviceArena,
        disk: DiskMover,
        copies: DeviceCopies,
        *,
        check_always: bool = False,
        most: int = MOST_TICKETS,
    ) -> None:
        self.copied = CopyCounts()
        self.host, self.arena, self.copies = host, arena, copies
        self._disk, self._check_always, self._most = disk, check_always, most
        self._open: dict[Ticket, _Move] = {}
        self._waiting: tuple[deque[Ticket], deque[Ticket]] = deque(), deque()  # now, ahead
        self._reading: list[_Move] = []
        self._copying: deque[tuple[int, Mark]] = deque()  # host slots that copies read
        self._checked: set[tuple[int, int]] = set()
        self._next = 0
        copies.pin(host.arena.memory)

    def submit(self, reads: Sequence[Read], *, ahead: bool = False) -> list[Ticket]:
        if len(self._open) + len(reads) > self._most:
            raise too_many(len(self._open), len(reads), self._most)
        after = self.copies.launched()
        made = [self._add(read, after, ahead) for read in reads]
        self._pump()
        return [move.ticket for move in made]

    def _add(self, read: Read, after: Mark, ahead: bool) -> _Move:
        layer, expert = self.host.place_of[id(read.file), read.offset]
        self.host.residency.use(layer, np.array([expert]))
        move = _Move(Ticket(self._next), read, layer, expert, after, ahead)
        self._next += 1
        self._open[move.ticket] = move
        slot = int(self.host.residency.slot_LE[layer, expert])
        if slot == EMPTY:
            self._waiting[ahead].append(move.ticket)
        else:
            move.host = slot
            self.host.residency.hold([slot])
            self.copied.from_host += 1
            self._copy(move)
        return move

    def wait(self, ticket: Ticket, deadline_s: float) -> None:
        """As ``DiskMover.wait``; a copy is then ordered before kernels that are launched later, and
        not waited for."""
        move, until = self._open[ticket], time.monotonic() + deadline_s
        self.promote(ticket)
        self._pump()
        while move.host is None and move.fault is None:
            self._make_room(until)
        if move.disk is not None:
            self._finish_read(move, max(0.0, until - time.monotonic()))
        del self._open[ticket]
        if move.fault is not None:
            raise move.fault
        self.copies.need(move.mark)

    def promote(self, ticket: Ticket) -> None:
        move = self._open[ticket]
        if not move.ahead:
            return
        move.ahead = False
        if move.disk is not None:
            self._disk.promote(move.disk)
        elif move.host is None and move.fault is None:
            self._waiting[True].remove(ticket)
            self._waiting[False].append(ticket)

    def cancel(self, ticket: Ticket) -> bool:
        move = self._open[ticket]
        if move.host is None and move.fault is None:
            self._waiting[move.ahead].remove(ticket)
        elif move.disk is not None and self._disk.cancel(move.disk):
            self._reading.remove(move)
            self._give_back(move)
        else:
            return False
        del self._open[ticket]
        return True

    def counts(self) -> MoverCounts:
        """What was read from disk."""
        return self._disk.counts()

    def close(self) -> None:
        self._disk.close()
        for _, mark in self._copying:
            self.copies.finish(mark, CLOSE_DEADLINE_S)
        self._copying.clear()
        self._open.clear()
        self.copies.unpin(self.host.arena.memory)

    def _pump(self) -> None:
        """All that goes on without waiting: slots whose copies are done are let go of, reads begin
        where there is room, and what was read is copied."""
        while self._copying and self.copies.done(self._copying[0][1]):
            self.host.residency.release_one(self._copying.popleft()[0])
        for queue in self._waiting:
            while queue and self._begin_read(self._open[queue[0]]):
                queue.popleft()
        for move in list(self._reading):
            with suppress(DeadlineError):
                self._finish_read(move, 0.0)

    def _begin_read(self, move: _Move) -> bool:
        """Whether there was a slot for it."""
        residency, arena = self.host.residency, self.host.arena
        slots = residency.place(move.layer, [move.expert], move.layer)
        self.copied.host_evictions = residency.evictions
        if not slots:
            return False
        move.host, read = slots[0], move.read
        into = Read(read.file, read.offset, read.nbytes, arena.address(move.host))
        try:
            (move.disk,) = self._disk.submit([into], ahead=move.ahead)
        except BaseException:
            self._give_back(move)
            raise
        self._reading.append(move)
        return True

    def _finish_read(self, move: _Move, deadline_s: float) -> None:
        """The record is in host memory, checked, and its copy on its way; or the fault is known.
        DeadlineError where it is still being read."""
        assert move.disk is not None and move.host is not None, move
        try:
            self._disk.wait(move.disk, deadline_s)
            self._check(move, move.host)
        except DeadlineError:
            raise
        except DataLossError as fault:
            self._reading.remove(move)
            self._give_back(move)
            move.fault = fault
        else:
            self._reading.remove(move)
            move.disk = None
            self._copy(move)

    def _check(self, move: _Move, slot: int) -> None:
        region = self.host.regions[move.layer][move.expert]
        place = move.layer, move.expert
        region.file.require_unchanged()
        if region.digest and (self._check_always or place not in self._checked):
            data = self.host.arena.data(slot, region.nbytes)
            region.file.require_digest(data, region.offset, region.digest)
            self._checked.add(place)

    def _copy(self, move: _Move) -> None:
        assert move.host is not None and not move.copying, move
        start, nbytes = move.host * self.host.arena.nbytes, move.read.nbytes
        source = self.host.arena.memory[start : start + nbytes]
        target = self.arena.place(move.read.address, nbytes)
        move.mark, move.copying = self.copies.copy(source, target, move.after), True
        self._copying.append((move.host, move.mark))
        self.copied.copies += 1
        self.copied.copied_bytes += nbytes

    def _give_back(self, move: _Move) -> None:
        """The host slot of what could not be read, or is not wanted."""
        assert move.host is not None, move
        self.host.residency.vacate(move.host)
        self.host.residency.release_one(move.host)
        move.host = move.disk = None

    def _make_room(self, until: float) -> None:
        """Waits for the oldest copy or read, after which a host slot is free."""
        left = max(0.0, until - time.monotonic())
        if self._copying:
            self.copies.finish(self._copying[0][1], left)
        else:
            assert self._reading, "all host slots are held, and none is read or copied"
            self._finish_read(self._reading[0], left)
        self._pump()
