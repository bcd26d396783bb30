"""What one cache member keeps: its memory, and its disk if it has one, as one store.

A page that is put goes into the memory, and is written to the disk behind it, so that memory can
let it go at any time and a restart finds it. One that is read from the disk goes into the memory
again. What is used counts as used in both. Pages that wait to be written are pinned in memory, at
most ``WAITING`` of it, but one at least; beyond that a page is kept in memory alone, and counted.

A store knows no tokens. It takes nothing whose digest is wrong, and reads nothing from the disk
without checking it; what leaves the memory is checked by whoever gets it, who says so if it is
wrong (``doubt``). On the event loop's thread.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from moeserve.errors import ConfigError
from moeserve.pools.cache.disk import DiskTier
from moeserve.pools.cache.keys import Namespace, PageKey
from moeserve.pools.cache.ledger import Held
from moeserve.pools.cache.memory import MemoryTier
from moeserve.pools.cache.page_files import PageFolder
from moeserve.pools.cache.pages import StoredPage

# Of the memory's bytes, how many may wait to be written; one page may in any case.
WAITING = 0.25
# What a page may take to come from the disk.
READ_S = 5.0
# What pages that wait get to be written when the store is closed.
FLUSH_S = 10.0


class PutOutcome(StrEnum):
    """``HELD`` is here already; ``FULL`` has no room, within its quota or at all."""

    STORED = "stored"
    HELD = "held"
    FULL = "full"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """Bytes of memory and disk; the share of each that one namespace may have."""

    memory: int
    disk: int = 0
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.memory < 1 or self.disk < 0:
            raise ConfigError(f"a cache of {self.memory} bytes of memory, {self.disk} of disk")
        if not 0 < self.share <= 1:
            raise ConfigError(f"share={self.share}: expected more than 0, at most 1")


@dataclass(slots=True)
class StoreCounts:
    """Pages since the start. ``unwritten`` were kept in memory alone: too many waited."""

    stored: int = 0
    held: int = 0
    full: int = 0
    bad_put: int = 0
    memory_hits: int = 0
    disk_hits: int = 0
    misses: int = 0
    late_reads: int = 0
    doubted: int = 0
    bad: int = 0
    unwritten: int = 0


class PageStore:
    """``open`` makes one."""

    def __init__(self, memory: MemoryTier, disk: DiskTier | None) -> None:
        self.memory = memory
        self.disk = disk
        self.counts = StoreCounts()
        self._waiting: deque[tuple[StoredPage, Held | None]] = deque()
        self._waiting_bytes = 0
        self._writing: asyncio.Task[None] | None = None
        self._loading: dict[PageKey, asyncio.Task[StoredPage | None]] = {}

    @classmethod
    async def open(cls, limits: StoreLimits, folder: Path | None = None) -> PageStore:
        """With the pages that the folder holds. ConfigError where it cannot be used."""
        memory = MemoryTier(limits.memory, int(limits.memory * limits.share))
        if folder is None or not limits.disk:
            return cls(memory, None)
        files = await asyncio.to_thread(PageFolder, folder)
        disk = DiskTier(files, limits.disk, int(limits.disk * limits.share))
        try:
            await asyncio.to_thread(disk.load)
        except BaseException:
            await disk.close()
            raise
        return cls(memory, disk)

    @property
    def stored_bytes(self) -> int:
        """In both tiers; a page in both counts twice, as it takes room in both."""
        return self.memory.ledger.nbytes + (self.disk.ledger.nbytes if self.disk else 0)

    @property
    def capacity_bytes(self) -> int:
        return self.memory.ledger.capacity + (self.disk.ledger.capacity if self.disk else 0)

    def size_of(self, key: PageKey) -> int | None:
        """About how many bytes a page has; None where it is not here."""
        page = self.memory.get(key)
        if page is not None:
            return page.nbytes
        if self.disk is None or not self.disk.has(key):
            return None
        held = self.disk.ledger.get(key)
        return held.nbytes if held else None

    def could_hold(self, namespace: Namespace, nbytes: int) -> bool:
        """Whether a page of this size would be taken now."""
        return self.memory.could_hold(namespace, nbytes)

    def counted(self) -> dict[str, int]:
        """All that is counted, by name; of the disk with ``disk_`` before it."""
        disk = asdict(self.disk.counts) if self.disk else {}
        return {
            **asdict(self.counts),
            "memory_pages": len(self.memory.ledger),
            "memory_bytes": self.memory.ledger.nbytes,
            "memory_evicted": self.memory.evicted,
            "disk_pages": len(self.disk.ledger) if self.disk else 0,
            "disk_bytes": self.disk.ledger.nbytes if self.disk else 0,
            **{f"disk_{name}": count for name, count in disk.items()},
        }

    def touch(self, keys: Sequence[PageKey]) -> None:
        """Consecutive pages of one prefix are of use now."""
        self.memory.ledger.touch(keys)
        if self.disk is not None:
            self.disk.ledger.touch(keys)

    def put(self, page: StoredPage) -> PutOutcome:
        """Takes it, or says why not. The page is written later."""
        if self.size_of(page.key) is not None:
            self.counts.held += 1
            self.touch([page.key])
            return PutOutcome.HELD
        if not page.is_whole():
            self.counts.bad_put += 1
            return PutOutcome.BAD
        if not self.memory.put(page):
            self.counts.full += 1
            return PutOutcome.FULL
        self.counts.stored += 1
        self._write_later(page)
        return PutOutcome.STORED

    async def get(self, key: PageKey) -> StoredPage | None:
        """None where it is not here, or does not come from the disk in ``READ_S``."""
        page = self.memory.get(key)
        if page is not None:
            self.counts.memory_hits += 1
            return page
        page = await self._read(key)
        if page is None:
            self.counts.misses += 1
        else:
            self.counts.disk_hits += 1
        return page

    async def doubt(self, key: PageKey) -> bool:
        """Somebody got other bytes than were put: looks at what is here, and drops what is wrong;
        whether something was. A page on the disk is looked at whenever it is read."""
        self.counts.doubted += 1
        page = self.memory.get(key)
        if page is not None and not page.is_whole():
            self.counts.bad += 1
            self.memory.drop(key)
            return True
        if page is not None or self.disk is None:
            return False
        bad = self.disk.counts.bad
        await self._read(key)
        return self.disk.counts.bad > bad

    def drop(self, key: PageKey) -> bool:
        """Whether it was here."""
        in_memory = self.memory.drop(key)
        return (self.disk is not None and self.disk.drop(key)) or in_memory

    async def close(self) -> None:
        """Pages that wait are written, within ``FLUSH_S``."""
        for task in (*self._loading.values(), self._writing):
            if task is not None:
                await asyncio.wait([task], timeout=FLUSH_S)
        self._waiting.clear()
        if self.disk is not None:
            await self.disk.close()

    async def _read(self, key: PageKey) -> StoredPage | None:
        """From the disk, once for all who want it now."""
        if self.disk is None:
            return None
        task = self._loading.get(key)
        if task is None:
            task = self._loading[key] = asyncio.create_task(self._load(self.disk, key))
            task.add_done_callback(lambda _: self._loading.pop(key, None))
        done, _ = await asyncio.wait([task], timeout=READ_S)
        if not done:
            self.counts.late_reads += 1
            return None
        return task.result()

    async def _load(self, disk: DiskTier, key: PageKey) -> StoredPage | None:
        page = await disk.read(key)
        if page is None or self.memory.get(key) is not None:
            return page
        self.memory.put(page)  # where there is room
        return page

    def _write_later(self, page: StoredPage) -> None:
        if self.disk is None:
            return
        most = WAITING * self.memory.ledger.capacity
        if self._waiting_bytes and self._waiting_bytes + page.nbytes > most:
            self.counts.unwritten += 1
            return
        self._waiting.append((page, self.memory.pin(page)))
        self._waiting_bytes += page.nbytes
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_all(self.disk))

    async def _write_all(self, disk: DiskTier) -> None:
        while self._waiting:
            page, pinned = self._waiting.popleft()
            try:
                # A page that was dropped meanwhile is not to come back.
                if self.memory.get(page.key) is page and page.key not in disk.ledger:
                    await disk.write(page)
            finally:
                self._waiting_bytes -= page.nbytes
                self.memory.unpin(page, pinned)
