"""A request that waits for the cache pool, and sinks that tell of first tokens: parts of
``pooled_house``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from moeserve.core import Event, FinishReason, Request, RequestId
from moeserve.engine.request_state import EventSink, RankSink
from moeserve.engine.sequence import HeldKv, History


@dataclass(slots=True)
class LentBlocks:
    """``held`` was borrowed; the first ``computed`` positions are there."""

    held: HeldKv | None = None
    computed: int = 0


@dataclass(slots=True)
class PrefixArrival:
    """``fetched`` positions of what is ``lent`` came from the pool. ``ended`` says why it is not to
    go on."""

    request: Request
    sink: EventSink
    history: History
    lent: LentBlocks = field(default_factory=LentBlocks)
    fetched: int = 0
    ended: FinishReason | None = None
    task: asyncio.Task[None] | None = None
    begun: bool = False
    handed_over: bool = False

    def cancel(self, reason: FinishReason) -> None:
        """On the loop's thread. A task that has not begun sees ``ended`` when it does: one that is
        cancelled before never runs at all."""
        self.ended = self.ended or reason
        if self.begun and self.task is not None:
            self.task.cancel()

    def end(self, reason: FinishReason, error: str) -> None:
        self.sink.deliver([Event(self.request.id, finish=reason, error=error)])


class WatchedSink:
    """Passes everything on, then tells ``on_events``."""

    def __init__(self, sink: EventSink, on_events: Callable[[Sequence[Event]], None]) -> None:
        self._sink = sink
        self._on_events = on_events

    def deliver(self, events: Sequence[Event], /) -> None:
        self._sink.deliver(events)
        self._on_events(events)


class WatchedRankSink(WatchedSink):
    """Of a sink whose requests may go to another rank."""

    def __init__(
        self,
        sink: RankSink,
        on_events: Callable[[Sequence[Event]], None],
        on_return: Callable[[RequestId], object],
    ) -> None:
        super().__init__(sink, on_events)
        self._rank_sink = sink
        self._on_return = on_return

    def give_back(self, request_id: RequestId, reached: int, /) -> None:
        self._on_return(request_id)
        self._rank_sink.give_back(request_id, reached)
