"""What a peer has computed, on its way into the cache pool: a queue that holds nobody up.

At most ``most_bytes`` of KV wait; when more comes, what has waited longest is dropped and counted,
for what is newest is most likely wanted again. One task sends: group by group of pages, to all
owners of a group at once. Members say first which pages they want, so a page is made into bytes (on
a thread) only where somebody lacks it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from moeserve.core import CacheScope
from moeserve.errors import UnavailableError
from moeserve.pools.cache.cache_members import CacheMembers
from moeserve.pools.cache.calls import CacheCalls, Offered
from moeserve.pools.cache.keys import GROUP, PageKey, namespace_of
from moeserve.pools.cache.pages import StoredRun, full_pages, seal, sealed_bytes
from moeserve.pools.cache.store import PutOutcome
from moeserve.pools.members import Member

log = logging.getLogger(__name__)


@dataclass(slots=True)
class PutCounts:
    """Pages since the start, each counted for every owner it was offered to. ``dropped`` are calls
    of ``add`` that waited too long; ``lost`` met a member that failed, ``unowned`` none at all."""

    stored: int = 0
    held: int = 0
    full: int = 0
    bad: int = 0
    lost: int = 0
    unowned: int = 0
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class _Waiting:
    keys: tuple[PageKey, ...]
    scope: CacheScope
    runs: tuple[StoredRun, ...]
    nbytes: int


class PutQueue:
    """On the event loop's thread; ``close`` it."""

    def __init__(
        self,
        members: CacheMembers,
        calls: CacheCalls,
        *,
        page_tokens: int,
        layers: int,
        replication: int,
        most_bytes: int,
    ) -> None:
        self.counts = PutCounts()
        self.waiting_bytes = 0
        self._members = members
        self._calls = calls
        self._page_tokens = page_tokens
        self._layers = layers
        self._replication = replication
        self._most_bytes = most_bytes
        self._waiting: deque[_Waiting] = deque()
        self._sending: asyncio.Task[None] | None = None

    def add(self, keys: tuple[PageKey, ...], scope: CacheScope, runs: Sequence[StoredRun]) -> None:
        """``keys`` are of all pages of the sequence that the runs are of."""
        nbytes = sum(memoryview(run.data).nbytes for run in runs)
        if nbytes > self._most_bytes:
            self.counts.dropped += 1
            return
        while self.waiting_bytes + nbytes > self._most_bytes and self._waiting:
            self.waiting_bytes -= self._waiting.popleft().nbytes
            self.counts.dropped += 1
        if self.waiting_bytes + nbytes > self._most_bytes:  # what is being sent is that much
            self.counts.dropped += 1
            return
        self._waiting.append(_Waiting(keys, scope, tuple(runs), nbytes))
        self.waiting_bytes += nbytes
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._send_all())

    async def flush(self, timeout_s: float) -> bool:
        """Until nothing waits; False if that takes longer."""
        if self._sending is not None:
            await asyncio.wait([self._sending], timeout=timeout_s)
        return self._sending is None or self._sending.done()

    async def close(self, timeout_s: float) -> None:
        """What waits is sent within this time, or dropped."""
        await self.flush(timeout_s)
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.wait([self._sending])
        self.counts.dropped += len(self._waiting)
        self._waiting.clear()
        self.waiting_bytes = 0

    async def _send_all(self) -> None:
        while self._waiting:
            one = self._waiting.popleft()
            try:
                await self._send(one)
            finally:
                self.waiting_bytes -= one.nbytes

    async def _send(self, one: _Waiting) -> None:
        namespace = namespace_of(one.scope)
        groups: dict[int, list[Offered]] = {}
        pages_of_runs = full_pages(one.runs, self._page_tokens, self._layers)
        for page, runs in await asyncio.to_thread(list, pages_of_runs):
            if page >= len(one.keys):
                break
            key = one.keys[page]
            make = functools.cache(functools.partial(seal, key, namespace, runs))
            offered = Offered(key, namespace, sealed_bytes(runs), make)
            groups.setdefault(page // GROUP, []).append(offered)
        for group, pages in groups.items():
            owners = self._members.owners(one.keys[group * GROUP], self._replication)
            if not owners:
                self.counts.unowned += len(pages)
            await asyncio.gather(*(self._put(owner, pages) for owner in owners))

    async def _put(self, owner: Member, pages: Sequence[Offered]) -> None:
        try:
            outcomes = await self._calls.put(owner, pages)
        except UnavailableError as error:
            log.info("cache pool: %s", error)
            self.counts.lost += len(pages)
            self._members.failed(owner)
            return
        self._members.worked(owner)
        self.counts.stored += outcomes.count(PutOutcome.STORED)
        self.counts.held += outcomes.count(PutOutcome.HELD)
        self.counts.full += outcomes.count(PutOutcome.FULL)
        self.counts.bad += outcomes.count(PutOutcome.BAD)
