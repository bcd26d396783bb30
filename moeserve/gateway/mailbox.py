"""From the engine's thread to the event loop, one wake-up for many events.

A step of the engine makes an event for every running sequence; waking the loop for each would cost
more than the events themselves.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

Callback = Callable[[], None]


class Mailbox:
    """Runs posted callbacks on the loop, in the order of ``post``. Owned by the loop's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._callbacks: deque[Callback] = deque()
        self._awake = False
        self.wakeups = 0

    def post(self, callback: Callback) -> None:
        """From any thread, never blocks."""
        self._callbacks.append(callback)
        # Read after the append: whoever saw True is emptied by the wake-up that is still due.
        if not self._awake:
            self._awake = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._awake = False
        self.wakeups += 1
        while self._callbacks:
            self._callbacks.popleft()()
