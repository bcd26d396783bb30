"""The pages of a cache member that are on its disk: bounded in bytes, read and written by threads.

Files are written and deleted by one thread, in the order in which that was asked for, and read by
``READERS`` others; the event loop, whose thread has the ledger, never waits for the disk. A page
that cannot be written (the disk is full, or fails) is not kept, and one that cannot be read, or is
not what was written, is dropped: both are counted, and change nothing else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from moeserve.errors import DataLossError
from moeserve.pools.cache.keys import Namespace, PageKey
from moeserve.pools.cache.ledger import Ledger
from moeserve.pools.cache.page_files import HEADER_BYTES, PageFolder, is_full
from moeserve.pools.cache.pages import StoredPage

log = logging.getLogger(__name__)

READERS = 4
CLOSE_S = 10.0
# What a file takes beside its bytes, at most: its last block, its inode and its name.
OVERHEAD = 8192

T = TypeVar("T")


@dataclass(slots=True)
class DiskCounts:
    """Pages since the start. ``found`` were there when it began; ``bad`` were not what was
    written; ``full`` met a full disk, ``failed`` an error of it, reading or writing."""

    found: int = 0
    written: int = 0
    read: int = 0
    evicted: int = 0
    bad: int = 0
    full: int = 0
    failed: int = 0


class DiskTier:
    """Made by ``open_disk``. The folder belongs to it until it is closed."""

    def __init__(self, folder: PageFolder, capacity: int, quota: int) -> None:
        self.ledger = Ledger(capacity, quota)
        self.counts = DiskCounts()
        self._folder = folder
        self._writer = ThreadPoolExecutor(1, "moeserve-cache-write")
        self._readers = ThreadPoolExecutor(READERS, "moeserve-cache-read")

    def load(self) -> None:
        """Takes what the folder holds, newest first while there is room; the rest is deleted.
        Before it is used, on any thread: it blocks."""
        kept: dict[PageKey, tuple[Namespace, int]] = {}
        nbytes = 0
        of: dict[Namespace, int] = {}
        for page in reversed(self._folder.scan()):
            size, own = page.nbytes + OVERHEAD, of.get(page.namespace, 0)
            fits = nbytes + size <= self.ledger.capacity and own + size <= self.ledger.quota
            if page.key in kept or not fits:
                self._folder.delete(page.key, page.namespace)
                continue
            kept[page.key] = (page.namespace, size)
            nbytes, of[page.namespace] = nbytes + size, own + size
        for key, (namespace, size) in reversed(kept.items()):
            self.ledger.add(key, namespace, size)
        self.counts.found = len(kept)

    async def write(self, page: StoredPage) -> bool:
        """Whether it is on the disk now. The page is not here, and is written by one call alone."""
        nbytes = page.nbytes + HEADER_BYTES + OVERHEAD
        going = self.ledger.make_room(page.namespace, nbytes)
        if going is None:
            return False
        self.counts.evicted += len(going)
        for key in going:
            self.drop(key)
        # It counts from now on, but nobody is told of it before it is there.
        self.ledger.add(page.key, page.namespace, nbytes)
        held = self.ledger.get(page.key)
        self.ledger.pin(page.key)
        try:
            await self._run(self._writer, lambda: self._folder.write(page))
        except OSError as error:
            if self.ledger.get(page.key) is held:
                self.ledger.remove(page.key)
            if is_full(error):
                self.counts.full += 1
            else:
                self.counts.failed += 1
                log.warning("cache folder: a page was not written: %s", error)
            return False
        self.counts.written += 1
        if self.ledger.get(page.key) is not held:  # dropped meanwhile
            return False
        self.ledger.unpin(page.key)
        return True

    async def read(self, key: PageKey) -> StoredPage | None:
        """None where it is not here, or no longer as it was written."""
        held = self.ledger.get(key)
        if held is None or self.ledger.is_pinned(key):
            return None
        namespace, most = held.namespace, held.nbytes
        try:
            page = await self._run(self._readers, lambda: self._folder.read(key, namespace, most))
        except FileNotFoundError:  # evicted meanwhile
            if self.ledger.get(key) is held:
                self.drop(key)
            return None
        except (DataLossError, OSError) as error:
            lost = isinstance(error, DataLossError)
            self.counts.bad += lost
            self.counts.failed += not lost
            log.warning("cache folder: a page is dropped: %s", error)
            if self.ledger.get(key) is held:
                self.drop(key)
            return None
        self.counts.read += 1
        return page

    def has(self, key: PageKey) -> bool:
        """Whether it can be read: not one that is still being written."""
        return key in self.ledger and not self.ledger.is_pinned(key)

    def drop(self, key: PageKey) -> bool:
        """Whether it was here; its file goes in its turn."""
        if key not in self.ledger:
            return False
        namespace = self.ledger.remove(key).namespace
        self._writer.submit(self._delete, key, namespace)
        return True

    async def close(self) -> None:
        """After what was asked for is done, or ``CLOSE_S`` on a disk that hangs."""
        pools = (self._writer, self._readers)
        ends = [asyncio.create_task(asyncio.to_thread(pool.shutdown)) for pool in pools]
        await asyncio.wait(ends, timeout=CLOSE_S)
        self._folder.close()

    def _delete(self, key: PageKey, namespace: Namespace) -> None:
        try:
            self._folder.delete(key, namespace)
        except OSError as error:
            log.warning("cache folder: a page was not deleted: %s", error)

    async def _run(self, pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, work)
