"""From another thread: something done on the event loop's, and waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from moeserve.errors import UnavailableError

T = TypeVar("T")


def on_loop(
    loop: asyncio.AbstractEventLoop, start: Callable[[], Awaitable[T]], timeout_s: float
) -> T:
    """What ``start`` gives there; UnavailableError if that takes longer."""

    async def run() -> T:
        return await start()

    running = asyncio.run_coroutine_threadsafe(run(), loop)
    try:
        return running.result(timeout_s)
    except TimeoutError as error:
        running.cancel()
        raise UnavailableError(f"the event loop has not answered for {timeout_s:.0f} s") from error
