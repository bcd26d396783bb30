"""The requests of one door at this process's rank, and the news of them on their way to the door.

Engines deliver on their own thread, doors read on the event loop's. News wait in between, and there
is at most one call to the loop for all that wait: whoever is slow to read finds them together, in
the order of delivery.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from moeserve.core import Event, FinishReason, Request, RequestId
from moeserve.engine.request_state import RankSink, reason_refused
from moeserve.engine.sequence import NEW, History
from moeserve.errors import MoeserveError


class RankEngine(Protocol):
    """The part of ``loop.Engine`` that is needed here."""

    def submit(self, request: Request, sink: RankSink, history: History = NEW) -> None: ...

    def abort(self, request_id: RequestId, reason: FinishReason = FinishReason.ABORT) -> None: ...


@dataclass(frozen=True, slots=True)
class Return:
    """A request that the rank gives back, which has computed ``reached`` of its tokens at most."""

    request_id: RequestId
    reached: int


class DoorRequests:
    """A ``RankSink``, whose ``deliver`` and ``give_back`` may be called by any thread; all else is
    of the thread of the event loop that runs when it is made.

    ``on_news`` is called there when there is something to ``take``, perhaps once more than needed.
    A request is this door's from ``submit`` until ``take`` gives its last event or its return:
    nobody can end one that is another door's.
    """

    def __init__(self, engine: RankEngine, on_news: Callable[[], None]) -> None:
        self._engine = engine
        self._on_news = on_news
        self._loop = asyncio.get_running_loop()
        self._news: deque[Event | Return] = deque()
        self._refused: list[Event] = []
        self._called = False
        self._running: set[RequestId] = set()

    def deliver(self, events: Sequence[Event]) -> None:
        self._news.extend(events)
        self._call()

    def give_back(self, request_id: RequestId, reached: int) -> None:
        self._news.append(Return(request_id, reached))
        self._call()

    def submit(self, request: Request, history: History = NEW) -> bool:
        """False where it is refused; an event then says why."""
        if request.id in self._running:
            self.refuse(request.id, f"request id {request.id!r} is in use: choose another")
            return False
        try:
            self._engine.submit(request, self, history)
        except MoeserveError as error:
            self.refuse(request.id, error.message, reason_refused(error))
            return False
        self._running.add(request.id)
        return True

    def refuse(
        self, request_id: RequestId, error: str, reason: FinishReason = FinishReason.ERROR
    ) -> None:
        """An event that ends a request which did not begin here."""
        self._refused.append(Event(request_id, finish=reason, error=error))
        self._call()

    def end(self, request_id: RequestId, reason: FinishReason) -> None:
        """End a request; its last event follows. Those that are not this door's are left alone."""
        if request_id in self._running:
            self._engine.abort(request_id, reason)

    def take(self, most: int) -> list[Event | Return]:
        """The oldest news, up to ``most`` and the one that reaches it, each with log-probabilities
        of a prompt as many; should there be more, ``on_news`` is called again."""
        # Before the look: what is added after it makes another call.
        self._called = False
        found: list[Event | Return] = [*self._refused]
        self._refused.clear()
        while self._news and most > 0:
            news = self._news.popleft()
            if isinstance(news, Return) or news.finish is not None:
                self._running.discard(news.request_id)
            found.append(news)
            most -= 1 if isinstance(news, Return) else 1 + len(news.prompt_logprobs)
        if self._news:
            self._call()
        return found

    def close(self) -> None:
        """The door is gone: end what it has here."""
        for request_id in self._running:
            self._engine.abort(request_id)
        self._running.clear()

    def _call(self) -> None:
        # Read after the append: whoever sees True is read by the call that is still due.
        if not self._called:
            self._called = True
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody reads
                self._loop.call_soon_threadsafe(self._on_news)
