"""From engines' threads to the event loop: one wake-up for many events, each to its stream.

A step of an engine makes an event for every running sequence; waking the loop for each would cost
more than the events themselves. So the mailbox is the one sink of all requests of a door: it keeps
what is delivered, and on the loop hands every event to the receiver of its request.

A request's route lives from ``open`` to its last event, also where its client has left: until then
its id is in use, and nothing of it can reach a later request of the same id.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from moeserve.core import Event, RequestId
from moeserve.errors import InvalidRequestError

Receiver = Callable[[Event], None]


class Mailbox:
    """Owned by the loop's thread; only ``deliver`` may be called from others."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._batches: deque[Sequence[Event]] = deque()
        self._receivers: dict[RequestId, Receiver] = {}
        self._awake = False
        self.wakeups = 0

    def open(self, request_id: RequestId, receiver: Receiver) -> None:
        """The receiver gets the request's events, on the loop, until one has ``finish``."""
        if request_id in self._receivers:
            raise InvalidRequestError(
                f"request id {request_id!r} is in use: choose another", param="request_id"
            )
        self._receivers[request_id] = receiver

    def close(self, request_id: RequestId) -> None:
        """Of a request that no engine has accepted: there will be no event."""
        del self._receivers[request_id]

    def deliver(self, events: Sequence[Event], /) -> None:
        """From any thread, never blocks."""
        self._batches.append(events)
        # Read after the append: whoever saw True is emptied by the wake-up that is still due.
        if not self._awake:
            self._awake = True
            self._loop.call_soon_threadsafe(self._empty)

    def _empty(self) -> None:
        self._awake = False
        self.wakeups += 1
        receivers = self._receivers
        while self._batches:
            for event in self._batches.popleft():
                receiver = receivers.get(event.request_id)
                if receiver is None:
                    continue
                if event.finish is not None:
                    del receivers[event.request_id]
                receiver(event)
