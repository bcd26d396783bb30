"""Moves bytes from files into memory beside running steps.

Reads are submitted in batches and known by tickets. What is needed now is read before what is read
ahead; reads that follow one another in a file are one call, up to 4 MiB. Files are read without the
page cache (O_DIRECT) where the file system does that and offset, length and address are multiples
of 4096, else through it, and what was read is dropped from it.

Whoever submits keeps memory and file until each ticket has ended: waited for, or cancelled. A wait
has a deadline, after which the read still goes on and its ticket stays. What is not read whole is
an error that names the file and the place; never other bytes.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NewType, Protocol

from moeserve.errors import DataLossError, DeadlineError, ExhaustedError
from moeserve.offload.disk_file import DiskFile
from moeserve.offload.native import native_half

Ticket = NewType("Ticket", int)

PAGE = 4096
THREADS = 2
MOST_TICKETS = 1 << 16
# What ``_mover.Mover.wait`` gives.
DONE, LATE, CANCELLED, FAILED, TRUNCATED, UNKNOWN = range(6)


@dataclass(frozen=True, slots=True)
class Read:
    """``nbytes`` from ``offset`` of a file, to memory at ``address``."""

    file: DiskFile
    offset: int
    nbytes: int
    address: int


@dataclass(frozen=True, slots=True)
class MoverCounts:
    """``bytes`` read in ``calls`` of the system for ``reads``; ``waits`` that had to wait, for
    ``waited_ns`` together; reads ``cancelled`` before they began; calls that were ``buffered``."""

    bytes: int = 0
    calls: int = 0
    reads: int = 0
    cancelled: int = 0
    buffered: int = 0
    waits: int = 0
    waited_ns: int = 0


class DiskMover(Protocol):
    """One thread at a time submits and waits."""

    def submit(self, reads: Sequence[Read], *, ahead: bool = False) -> list[Ticket]:
        """ExhaustedError where more reads would be open than there may be."""
        ...

    def wait(self, ticket: Ticket, deadline_s: float) -> None:
        """Returns when all is read. DeadlineError names what is late, and the ticket stays;
        DataLossError what cannot be read. With a deadline of 0 it is a look, and counts as no
        wait."""
        ...

    def promote(self, ticket: Ticket) -> None:
        """It is needed now."""
        ...

    def cancel(self, ticket: Ticket) -> bool:
        """Whether it had not begun: it has ended then. Otherwise it is to be waited for."""
        ...

    def counts(self) -> MoverCounts:
        """Any thread may ask, also after ``close``."""
        ...

    def close(self) -> None:
        """Ends what is being read; no ticket may be waited for any more."""
        ...


def open_mover(threads: int = THREADS) -> DiskMover:
    """The native one, or its twin where that is not built."""
    module, _ = native_half()
    return PlainMover() if module is None else NativeMover(module, threads)


class NativeMover:
    """Threads of ``offload/mover.cc``."""

    def __init__(self, module: ModuleType, threads: int = THREADS, most: int = MOST_TICKETS):
        self._native = module.Mover(threads, most)
        self._most = most
        self._open: dict[Ticket, Read] = {}
        self._last = MoverCounts()

    def submit(self, reads: Sequence[Read], *, ahead: bool = False) -> list[Ticket]:
        wanted = [(r.file.direct, r.file.buffered, r.offset, r.nbytes, r.address) for r in reads]
        first = self._native.submit(wanted, ahead)
        if first < 0:
            raise too_many(len(self._open), len(reads), self._most)
        tickets = [Ticket(first + i) for i in range(len(reads))]
        self._open.update(zip(tickets, reads, strict=True))
        return tickets

    def wait(self, ticket: Ticket, deadline_s: float) -> None:
        read = self._open[ticket]
        outcome, at, error = self._native.wait(ticket, deadline_s)
        if outcome == LATE:
            raise late(read, deadline_s)
        del self._open[ticket]
        if outcome == TRUNCATED:
            raise truncated(read, at)
        if outcome == FAILED:
            raise unreadable(read, at, error)
        assert outcome == DONE, outcome

    def promote(self, ticket: Ticket) -> None:
        self._native.promote(ticket)

    def cancel(self, ticket: Ticket) -> bool:
        if not self._native.cancel(ticket):
            return False
        del self._open[ticket]
        return True

    def counts(self) -> MoverCounts:
        native = self._native
        return self._last if native is None else MoverCounts(**native.counts())

    def close(self) -> None:
        self._last = self.counts()
        self._native = None
        self._open.clear()


class PlainMover:
    """The slow twin: reads when it is told to, in order, with ``os.preadv``."""

    def __init__(self, most: int = MOST_TICKETS) -> None:
        self._most = most
        self._next = 0
        self._open: dict[Ticket, DataLossError | None] = {}
        self._bytes = self._calls = self._reads = 0

    def submit(self, reads: Sequence[Read], *, ahead: bool = False) -> list[Ticket]:
        if len(self._open) + len(reads) > self._most:
            raise too_many(len(self._open), len(reads), self._most)
        tickets = [Ticket(self._next + i) for i in range(len(reads))]
        self._next += len(reads)
        self._reads += len(reads)
        for ticket, read in zip(tickets, reads, strict=True):
            self._open[ticket] = self._fault(read)
        return tickets

    def _fault(self, read: Read) -> DataLossError | None:
        into = memoryview((ctypes.c_char * read.nbytes).from_address(read.address)).cast("B")
        done = 0
        while done < read.nbytes:
            try:
                got = os.preadv(read.file.buffered, [into[done:]], read.offset + done)
            except OSError as error:
                return unreadable(read, read.offset + done, error.errno or 0)
            self._calls += 1
            self._bytes += got
            done += got
            if got == 0:
                return truncated(read, read.offset + done)
        return None

    def wait(self, ticket: Ticket, deadline_s: float) -> None:
        fault = self._open.pop(ticket)
        if fault is not None:
            raise fault

    def promote(self, ticket: Ticket) -> None: ...

    def cancel(self, ticket: Ticket) -> bool:
        return False

    def counts(self) -> MoverCounts:
        return MoverCounts(self._bytes, self._calls, self._reads, buffered=self._calls)

    def close(self) -> None:
        self._open.clear()


def late(read: Read, deadline_s: float) -> DeadlineError:
    return DeadlineError(
        f"{read.file.path}: {read.nbytes} bytes at {read.offset} are not read after {deadline_s:g} "
        "s: the disk does not answer"
    )


def truncated(read: Read, at: int) -> DataLossError:
    return DataLossError(
        f"{read.file.path}: ends at byte {at}, {read.offset + read.nbytes - at} before the end of "
        f"what is read at {read.offset}: it was truncated; put it back and start again"
    )


def unreadable(read: Read, at: int, error: int) -> DataLossError:
    return DataLossError(
        f"{read.file.path}: cannot be read at byte {at} of {read.offset} to "
        f"{read.offset + read.nbytes}: {os.strerror(error)}"
    )


def too_many(now: int, more: int, most: int) -> ExhaustedError:
    return ExhaustedError(f"{now} reads are open, and {more} more would be over {most}")
