"""The thread on which a member moves bytes between its caches and the wire.

Jobs run one after the other, in the order in which they were given: what lets go of blocks, given
behind what reads them, comes after it, even if whoever waited for the reading does so no more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")

log = logging.getLogger(__name__)


class Mover:
    """Close it when nobody waits any more."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, f"moeserve-{name}")

    async def run(self, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What it returns or raises. Whoever is cancelled here stops waiting; the job runs on, or
        still will."""
        return await asyncio.shield(self.start(job, *args, **kwargs))

    def start(self, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """What it returns or raises, for whoever waits for it later or not at all; it is not to be
        cancelled."""
        done = asyncio.wrap_future(self._submit(job, *args, **kwargs))
        done.add_done_callback(look_at_error)
        return done

    def later(self, job: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Nobody waits for it; what it raises is logged. Never refused: a thread that is closed
        already has no jobs left, so it runs at once."""
        try:
            self._submit(job, *args, **kwargs).add_done_callback(_log_error)
        except RuntimeError:
            job(*args, **kwargs)

    def close(self) -> None:
        """All jobs that were given are done when this returns."""
        self._thread.shutdown(wait=True)

    def _submit(self, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        return self._thread.submit(job, *args, **kwargs)


def look_at_error(done: asyncio.Future[T]) -> None:
    """So that asyncio does not complain of an error that nobody waits for any more."""
    if not done.cancelled():
        done.exception()


def _log_error(done: Future[object]) -> None:
    if not done.cancelled() and (error := done.exception()) is not None:
        log.error("a job that nobody waits for failed", exc_info=error)
