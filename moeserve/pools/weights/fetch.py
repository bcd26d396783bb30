"""Chunks of a checkpoint from several members at once, into files.

Batches of ``BATCH`` chunks are taken in order by whoever is free: ``CALLS`` calls to each source. A
chunk is checked before it is written. One that has changed on its way is counted and asked for once
more, then elsewhere; a source with ``MOST_BAD`` of them, or one that fails or is late twice, is not
asked any more, and what it had is taken by others. So memory is bounded by a batch's chunk in each
call, and every wait by ``PROGRESS_S``. UnavailableError where nobody is left who has what is
missing: it says who failed last, and why; what has come by then stays, and ``run`` may be called
again with others. ExhaustedError where the folder takes no more.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

from moeserve.errors import ExhaustedError, UnavailableError
from moeserve.pools.cache.calls import CacheCalls, Channels
from moeserve.pools.cache.keys import PageKey
from moeserve.pools.cache.pages import StoredPage
from moeserve.pools.members import Member, Role
from moeserve.pools.weights.counts import WeightCounts
from moeserve.pools.weights.manifest import Manifest, WeightChunk

log = logging.getLogger(__name__)

BATCH = 8
CALLS = 2
# To all sources together.
MOST_CALLS = 8
# Of one chunk that is asked for again, of a source in all, and calls that failed.
MOST_WRONG, MOST_BAD, MOST_FAILED = 2, 4, 2
ANSWER_S = 2.0
PROGRESS_S = 5.0
BATCH_S = 120.0
# Before a source that failed is asked again.
REST_S = 0.2

Batch = tuple[WeightChunk, ...]


def weight_calls(channels: Channels) -> CacheCalls:
    """Calls with the time that weights get."""
    return CacheCalls(channels, answer_s=ANSWER_S, progress_s=PROGRESS_S, put_s=BATCH_S)


@dataclass(slots=True)
class WeightSource:
    """A member that is asked for the batches to whose first key ``keeps`` says yes."""

    member: Member
    keeps: Callable[[PageKey], bool] = lambda key: True
    bad: int = 0
    failed: int = 0
    refused: set[int] = field(default_factory=set)

    @property
    def lost(self) -> bool:
        return self.bad >= MOST_BAD or self.failed >= MOST_FAILED


class WeightFetch:
    """All of one manifest; ``folder`` has the files in their length. On the event loop's thread."""

    def __init__(
        self,
        manifest: Manifest,
        folder: Path,
        calls: CacheCalls,
        counts: WeightCounts,
        batch: int = BATCH,
    ) -> None:
        chunks = tuple(manifest.chunks())
        self._batches: dict[int, Batch] = {
            at: chunks[at : at + batch] for at in range(0, len(chunks), batch)
        }
        self._largest = max((chunk.nbytes for chunk in chunks), default=0)
        self._heads = {at: batch[0].key for at, batch in self._batches.items()}
        self._pending = list(self._batches)
        self._free = asyncio.Semaphore(MOST_CALLS)
        self._folder = folder
        self._calls = calls
        self._counts = counts
        self._wrong: Counter[tuple[str, bytes]] = Counter()
        self.came = 0
        self.why = "nobody was asked"

    @property
    def done(self) -> bool:
        return not self._batches

    async def run(self, sources: Sequence[WeightSource], batches: int | None = None) -> None:
        """Until all is here, or at least so many more ``batches``."""
        goal = 0 if batches is None else max(0, len(self._batches) - batches)
        while len(self._batches) > goal:
            before, troubles = self.came, _troubles(sources)
            workers = [
                asyncio.create_task(self._work(source, goal))
                for source in sources
                for _ in range(CALLS)
            ]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
            stuck = self.came == before and _troubles(sources) == troubles
            if (stuck or all(source.lost for source in sources)) and len(self._batches) > goal:
                missing = sum(len(batch) for batch in self._batches.values())
                raise UnavailableError(f"{missing} chunks of the weights are missing: {self.why}")

    async def _work(self, source: WeightSource, goal: int) -> None:
        room = bytearray(self._largest)
        while not source.lost and len(self._batches) > goal:
            at = self._take(source)
            if at is None:
                return
            try:
                async with self._free:
                    await self._get(source, at, room)
            finally:
                if at in self._batches:
                    self._pending.insert(0, at)

    def _take(self, source: WeightSource) -> int | None:
        for at in self._pending:
            if at not in source.refused and source.keeps(self._heads[at]):
                self._pending.remove(at)
                return at
        return None

    async def _get(self, source: WeightSource, at: int, room: bytearray) -> None:
        """What ``source`` has of a batch, as far as it is whole."""
        batch = self._batches[at]
        keys = [chunk.key for chunk in batch]
        deadline = time.monotonic() + BATCH_S
        try:
            async with aclosing(self._calls.get(source.member, keys, deadline, room)) as pages:
                async for page in pages:
                    if not await self._keep(source, self._batches[at][0], page):
                        break
                    self._come(at)
                else:
                    if at in self._batches:
                        self._counts.absent += 1
                        self._refuse(source, at, "it does not have them")
        except UnavailableError as error:
            self._counts.lost += 1
            source.failed += 1
            self.why = error.message
            log.info("weights: %s", error.message)
            await asyncio.sleep(REST_S)
        if at in self._batches and self._is_wrong(source, self._batches[at][0]):
            self._refuse(source, at, "what it sends has changed on the way")

    def _come(self, at: int) -> None:
        rest = self._batches[at][1:]
        if rest:
            self._batches[at] = rest
        else:
            del self._batches[at]

    async def _keep(self, source: WeightSource, chunk: WeightChunk, page: StoredPage) -> bool:
        """Checks it and writes it; False where it is not what it should be."""
        if not await asyncio.to_thread(_write, self._folder, chunk, page):
            self._counts.bad += 1
            source.bad += 1
            self._wrong[source.member.id, chunk.key] += 1
            log.warning(
                "weights: a chunk of %s has changed on its way from %s",
                chunk.file, source.member.address,
            )  # fmt: skip
            return False
        if source.member.role is Role.CACHE:
            self._counts.pool_bytes += chunk.nbytes
        else:
            self._counts.neighbour_bytes += chunk.nbytes
        self.came += chunk.nbytes
        return True

    def _is_wrong(self, source: WeightSource, chunk: WeightChunk) -> bool:
        return self._wrong[source.member.id, chunk.key] >= MOST_WRONG

    def _refuse(self, source: WeightSource, at: int, why: str) -> None:
        source.refused.add(at)
        self.why = f"{source.member.address}: {why}"


def _troubles(sources: Iterable[WeightSource]) -> int:
    return sum(source.failed + source.bad for source in sources)


def _write(folder: Path, chunk: WeightChunk, page: StoredPage) -> bool:
    """Whether it was whole. ExhaustedError where it cannot be written, for the disk may be full."""
    if page.key != chunk.key or page.nbytes != chunk.nbytes or not page.is_whole():
        return False
    try:
        opened = os.open(folder / chunk.file, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            written = os.pwrite(opened, page.body, chunk.start)
        finally:
            os.close(opened)
    except OSError as error:
        raise ExhaustedError(f"{folder}: cannot be written: {error}") from error
    if written < chunk.nbytes:
        raise ExhaustedError(f"{folder}: {written} of {chunk.nbytes} bytes were written")
    return True
