"""The cache pool as a peer uses it: which prefix is there, fetch it, put what was computed.

A request asks the owners of its groups of pages (``keys.GROUP``), as many as its length has it,
whatever the number of members. ``find`` asks who has what; ``fetch`` gives runs from the first
position that is wanted on, without a gap, for as long as there are any: from the first owner that
has them, else from the next. It never waits beyond its deadline, and never raises for what a member
does: whoever fetches computes the rest. What arrives is checked; a page that has changed is
counted, its keeper is told to look (and drops it), and it is taken from another.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from moeserve.core import CacheScope
from moeserve.errors import DataLossError, UnavailableError
from moeserve.pools.cache.cache_members import CacheMembers
from moeserve.pools.cache.calls import CacheCalls, Channels
from moeserve.pools.cache.keys import GROUP, PAGE_TOKENS, PageKey, groups_of, page_keys
from moeserve.pools.cache.pages import StoredPage, StoredRun, unseal
from moeserve.pools.cache.puts import PutQueue
from moeserve.pools.cache.recompute import RecomputePolicy
from moeserve.pools.members import Member

log = logging.getLogger(__name__)

# What a member gets for a small answer, for the next part of a page, and for a put.
ANSWER_S = 0.5
PROGRESS_S = 1.0
PUT_S = 20.0
# What a search and a fetch may take by default: so long that a second owner can be asked.
FIND_S = 1.5
FETCH_S = 10.0
# Groups that are asked about at once.
ASKED_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class PoolTerms:
    """Equal in all who share pages: ``compute_id`` and ``layers`` are of the model. ``put_bytes``
    of KV wait to be sent at most."""

    compute_id: str
    layers: int
    page_tokens: int = PAGE_TOKENS
    replication: int = 2
    put_bytes: int = 256 << 20


@dataclass(slots=True)
class PagePoolCounts:
    """Since the start. ``bad`` pages had changed, ``lost`` calls failed or were late, ``moved``
    went on with another owner, ``useless`` pages were whole but no runs."""

    asked: int = 0
    asked_tokens: int = 0
    hit_tokens: int = 0
    fetched_pages: int = 0
    fetched_tokens: int = 0
    fetched_bytes: int = 0
    bad: int = 0
    useless: int = 0
    lost: int = 0
    moved: int = 0


@dataclass(frozen=True, slots=True)
class PagePiece:
    """Consecutive pages that ``owners`` keep, of which the first is known to have them."""

    keys: tuple[PageKey, ...]
    owners: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class PoolHit:
    """Positions ``have`` to ``have + tokens`` are in the pool, in about so many bytes."""

    have: int
    tokens: int = 0
    nbytes: int = 0
    pieces: tuple[PagePiece, ...] = ()

    def beyond(self, have: int, page_tokens: int) -> PoolHit:
        """What of it is needed where so many positions are there, at least as many as before."""
        passed = skip = have // page_tokens - self.have // page_tokens
        pieces = []
        for piece in self.pieces:
            keys = piece.keys[skip:]
            skip = max(0, skip - len(piece.keys))
            if keys:
                pieces.append(replace(piece, keys=keys))
        whole = sum(len(piece.keys) for piece in self.pieces)
        left = max(0, whole - passed)
        tokens = max(0, self.have + self.tokens - have)
        nbytes = self.nbytes * left // whole if whole else 0
        return PoolHit(have, tokens, nbytes, tuple(pieces))


class PagePool:
    """Of one peer, for one model. On the event loop's thread; ``close`` it."""

    def __init__(
        self,
        members: CacheMembers,
        channels: Channels,
        terms: PoolTerms,
        *,
        policy: RecomputePolicy | None = None,
        answer_s: float = ANSWER_S,
        progress_s: float = PROGRESS_S,
        put_s: float = PUT_S,
        find_s: float = FIND_S,
    ) -> None:
        self.members = members
        self.terms = terms
        self.policy = policy or RecomputePolicy()
        self.counts = PagePoolCounts()
        self.find_s = find_s
        self._calls = CacheCalls(channels, answer_s=answer_s, progress_s=progress_s, put_s=put_s)
        self.puts = PutQueue(
            members,
            self._calls,
            page_tokens=terms.page_tokens,
            layers=terms.layers,
            replication=terms.replication,
            most_bytes=terms.put_bytes,
        )
        self._doubts: set[asyncio.Task[None]] = set()

    def keys(self, token_ids: Sequence[int], scope: CacheScope) -> tuple[PageKey, ...]:
        return page_keys(token_ids, scope, self.terms.compute_id, self.terms.page_tokens)

    async def find(
        self,
        token_ids: Sequence[int],
        scope: CacheScope,
        have: int = 0,
        timeout_s: float | None = None,
    ) -> PoolHit:
        """What follows the first ``have`` positions. The longest prefix, for all that is known
        within the time, ``find_s`` at most. Counted."""
        left = self.find_s if timeout_s is None else min(timeout_s, self.find_s)
        hit = await self._find(token_ids, scope, have, left)
        size = self.terms.page_tokens
        self.counts.asked += 1
        self.counts.asked_tokens += max(len(token_ids) // size * size - have, 0)
        self.counts.hit_tokens += hit.tokens
        return hit

    async def kept(self, token_ids: Sequence[int], scope: CacheScope) -> int:
        """How many positions are in the pool, from the first on: for who may put more."""
        return (await self._find(token_ids, scope, 0, self.find_s)).tokens

    async def _find(
        self, token_ids: Sequence[int], scope: CacheScope, have: int, timeout_s: float
    ) -> PoolHit:
        deadline = time.monotonic() + timeout_s
        keys, size = self.keys(token_ids, scope), self.terms.page_tokens
        first = have // size
        groups = groups_of(len(keys), first)
        pieces: list[PagePiece] = []
        count = nbytes = 0
        for at in range(0, len(groups), ASKED_AT_ONCE):
            wave = groups[at : at + ASKED_AT_ONCE]
            found = await asyncio.gather(*(self._ask(keys, group, deadline) for group in wave))
            whole = True
            for group, (own, own_bytes) in zip(wave, found, strict=True):
                pieces += own
                nbytes += own_bytes
                here = sum(len(piece.keys) for piece in own)
                count += here
                whole = here == len(group)
                if not whole:
                    break
            if not whole:
                break
        tokens = max((first + count) * size - have, 0) if count else 0
        return PoolHit(have, tokens, nbytes, tuple(pieces))

    async def fetch(
        self,
        token_ids: Sequence[int],
        scope: CacheScope,
        have: int = 0,
        timeout_s: float = FETCH_S,
    ) -> AsyncGenerator[StoredRun, None]:
        """Runs of the positions from ``have`` on, page by page and layer by layer; the first may
        begin before it. None where computing is cheaper. What has been yielded is whole, a page is
        yielded in all layers or not at all, and the end may come at any page."""
        deadline = time.monotonic() + timeout_s
        hit = await self.find(token_ids, scope, have, timeout_s)
        if not hit.tokens or not self.policy.choose_fetch(hit.tokens, hit.nbytes):
            return
        async with aclosing(self.fetch_hit(hit, deadline)) as runs:
            async for run in runs:
                yield run

    async def fetch_hit(self, hit: PoolHit, deadline: float) -> AsyncGenerator[StoredRun, None]:
        """What ``find`` has found, until a deadline of ``time.monotonic``."""
        for piece in hit.pieces:
            came = 0
            async with aclosing(self._get(piece, deadline)) as pages:
                async for runs in pages:
                    came += 1
                    for run in runs:
                        if run.end > hit.have:
                            yield run
            if came < len(piece.keys):
                return

    def put(self, token_ids: Sequence[int], scope: CacheScope, runs: Sequence[StoredRun]) -> None:
        """Stores the pages that these runs fill, later; what does not fit into the queue pushes
        out what has waited longest. The runs' bytes are not to change any more."""
        self.puts.add(self.keys(token_ids, scope), scope, runs)

    def reject(self, token_ids: Sequence[int], scope: CacheScope, position: int) -> None:
        """The run of this position, or one beside it, did not pass its own digest: whoever stored
        the page was wrong, and it goes."""
        at = position // self.terms.page_tokens
        keys = self.keys(token_ids, scope)[: at + 1]
        self.counts.useless += 1
        for member in self._owners(keys, at):
            self._doubt(member, keys[at], drop=True)

    async def close(self, timeout_s: float = 0.0) -> None:
        """What waits to be put is sent within this time."""
        await self.puts.close(timeout_s)
        for task in tuple(self._doubts):
            task.cancel()
        await asyncio.gather(*self._doubts, return_exceptions=True)

    def _owners(self, keys: Sequence[PageKey], page: int) -> tuple[Member, ...]:
        return self.members.owners(keys[page // GROUP * GROUP], self.terms.replication)

    async def _ask(
        self, keys: Sequence[PageKey], group: range, deadline: float
    ) -> tuple[list[PagePiece], int]:
        """What of a group is there without a gap, and its bytes."""
        owners = self._owners(keys, group.start)
        pieces: list[PagePiece] = []
        nbytes, left = 0, tuple(keys[page] for page in group)
        for owner in owners:
            if not left:
                break
            began = time.monotonic()
            try:
                count, size = await self._calls.have(owner, left, deadline)
            except UnavailableError as error:
                self._lose(owner, error, deadline)
                continue
            self.members.worked(owner)
            self.policy.asked(time.monotonic() - began)
            if count:
                others = tuple(other for other in owners if other is not owner)
                pieces.append(PagePiece(left[:count], (owner, *others)))
                nbytes += size
                left = left[count:]
        return pieces, nbytes

    async def _get(
        self, piece: PagePiece, deadline: float
    ) -> AsyncGenerator[tuple[StoredRun, ...], None]:
        left = piece.keys
        for owner in piece.owners:
            if not left:
                return
            self.counts.moved += owner is not piece.owners[0]
            async with aclosing(self._get_from(owner, left, deadline)) as pages:
                async for runs in pages:
                    left = left[1:]
                    yield runs

    async def _get_from(
        self, owner: Member, keys: tuple[PageKey, ...], deadline: float
    ) -> AsyncGenerator[tuple[StoredRun, ...], None]:
        """The runs of the first pages, as many as are whole."""
        waited, nbytes = 0.0, 0
        try:
            async with aclosing(self._calls.get(owner, keys, deadline)) as pages:
                while True:
                    began = time.monotonic()
                    page = await anext(pages, None)
                    waited += time.monotonic() - began
                    if page is None:
                        break
                    nbytes += page.nbytes
                    runs = self._open(owner, page)
                    if runs is None:
                        return
                    yield runs
        except UnavailableError as error:
            self._lose(owner, error, deadline)
            return
        finally:
            self.policy.fetched(nbytes, waited)
        self.members.worked(owner)

    def _open(self, owner: Member, page: StoredPage) -> tuple[StoredRun, ...] | None:
        try:
            runs = unseal(page)
        except DataLossError as error:
            log.warning("cache pool: %s (from %s)", error, owner.address)
            self.counts.bad += 1
            self._doubt(owner, page.key, drop=False)
            return None
        self.counts.fetched_pages += 1
        self.counts.fetched_tokens += self.terms.page_tokens
        self.counts.fetched_bytes += page.nbytes
        return runs

    def _lose(self, member: Member, error: UnavailableError, deadline: float) -> None:
        log.info("cache pool: %s", error)
        self.counts.lost += 1
        if time.monotonic() < deadline:  # else it may only have been asked too late
            self.members.failed(member)

    def _doubt(self, member: Member, key: PageKey, *, drop: bool) -> None:
        task = asyncio.create_task(self._tell(member, key, drop))
        self._doubts.add(task)
        task.add_done_callback(self._doubts.discard)

    async def _tell(self, member: Member, key: PageKey, drop: bool) -> None:
        try:
            await self._calls.doubt(member, [key], drop=drop)
        except UnavailableError as error:
            log.info("cache pool: %s", error)
