"""The pages of a cache member that are in its memory: bounded, least recently used ones go.

What a page takes is its body and ``OVERHEAD`` for what Python has beside it. A page that is being
sent or written to the disk is pinned: it stays, so that what is in use is within the bound too.
On one thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from moeserve.pools.cache.keys import Namespace, PageKey
from moeserve.pools.cache.ledger import Held, Ledger
from moeserve.pools.cache.pages import StoredPage

OVERHEAD = 1024


class MemoryTier:
    """Bytes of all pages, and of those of one namespace at most."""

    def __init__(self, capacity: int, quota: int) -> None:
        self.ledger = Ledger(capacity, quota)
        self.evicted = 0
        self._pages: dict[PageKey, StoredPage] = {}

    def get(self, key: PageKey) -> StoredPage | None:
        return self._pages.get(key)

    def put(self, page: StoredPage) -> bool:
        """Takes a page that is not here; False where there is no room for it."""
        nbytes = page.nbytes + OVERHEAD
        going = self.ledger.make_room(page.namespace, nbytes)
        if going is None:
            return False
        for key in going:
            self.drop(key)
        self.evicted += len(going)
        self.ledger.add(page.key, page.namespace, nbytes)
        self._pages[page.key] = page
        return True

    def could_hold(self, namespace: Namespace, nbytes: int) -> bool:
        """Whether ``put`` would take a page of this size now."""
        return self.ledger.make_room(namespace, nbytes + OVERHEAD) is not None

    def drop(self, key: PageKey) -> bool:
        """Whether it was here."""
        if self._pages.pop(key, None) is None:
            return False
        self.ledger.remove(key)
        return True

    def pin(self, page: StoredPage) -> Held | None:
        """The page stays, if it is here, until ``unpin`` with what this returns."""
        if self._pages.get(page.key) is not page:
            return None
        self.ledger.pin(page.key)
        return self.ledger.get(page.key)

    def unpin(self, page: StoredPage, pinned: Held | None) -> None:
        """Of a page that was dropped meanwhile, perhaps to come back, nothing is left to unpin."""
        if pinned is not None and self.ledger.get(page.key) is pinned:
            self.ledger.unpin(page.key)

    @contextmanager
    def in_use(self, page: StoredPage) -> Iterator[None]:
        pinned = self.pin(page)
        try:
            yield
        finally:
            self.unpin(page, pinned)
