"""One snapshot a second for all who watch, made while somebody does.

A viewer that reads slower than snapshots come gets the newest one and misses those between: what is
held for all of them is one snapshot.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable

from moeserve.errors import UnavailableError

log = logging.getLogger(__name__)

PERIOD_S = 1.0
MOST_VIEWERS = 64


class SnapshotFeed:
    """``make`` gives a snapshot as it is sent; ``made`` counts them. On the event loop's thread."""

    def __init__(
        self,
        make: Callable[[], Awaitable[str]],
        *,
        period_s: float = PERIOD_S,
        most_viewers: int = MOST_VIEWERS,
    ) -> None:
        self._make = make
        self._period_s = period_s
        self._most = most_viewers
        self._newest = ""
        self._arrival = asyncio.Condition()
        self._making: asyncio.Task[None] | None = None
        self._closed = False
        self.viewers = 0
        self.made = 0

    async def watch(self) -> AsyncGenerator[str, None]:
        """Snapshots from now on, until the feed is closed. UnavailableError where ``most_viewers``
        watch already. Whoever stops before the end closes the iterator (``aclose``)."""
        if self._closed:
            raise UnavailableError("the server stops: ask again shortly")
        if self.viewers >= self._most:
            raise UnavailableError(
                f"{self._most} viewers watch the dashboard already: close one of them"
            )
        self.viewers += 1
        if self._making is None:
            self._making = asyncio.create_task(self._keep_making())
        try:
            seen = self.made
            while not self._closed:
                async with self._arrival:
                    while self.made == seen and not self._closed:
                        await self._arrival.wait()
                if self.made > seen:
                    seen = self.made
                    yield self._newest
        finally:
            self.viewers -= 1
            if not self.viewers and self._making is not None:
                self._making.cancel()
                self._making = None

    async def close(self) -> None:
        """Ends all streams."""
        self._closed = True
        if self._making is not None:
            self._making.cancel()
            self._making = None
        async with self._arrival:
            self._arrival.notify_all()

    async def _keep_making(self) -> None:
        loop = asyncio.get_running_loop()
        due, failed = loop.time(), False
        while True:
            try:
                newest = await self._make()
            except Exception:  # a bug of ours, or in what a member said: the next second may do
                if not failed:
                    log.exception("no snapshot for the dashboard")
                failed = True
            else:
                failed = False
                self._newest = newest
                self.made += 1
                async with self._arrival:
                    self._arrival.notify_all()
            due = max(due + self._period_s, loop.time())
            await asyncio.sleep(due - loop.time())
