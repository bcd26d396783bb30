"""What the step loop keeps of one request, and how its events leave: one call per sink and turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from moeserve.core import Event, FinishReason, Request, RequestId, Timing


class EventSink(Protocol):
    """Whoever wants the events of one request or of many.

    ``deliver`` gets what a step made for all of them, in the order of the step. It must not block;
    where it raises, the requests that these events are of are aborted.
    """

    def deliver(self, events: Sequence[Event], /) -> None: ...


@runtime_checkable
class RankSink(EventSink, Protocol):
    """A sink whose requests may be at home at one rank or another."""

    def give_back(self, request_id: RequestId, reached: int, /) -> None:
        """The request waits at this rank no more, and is to be given to another. Of its tokens
        ``reached`` were computed here at most."""
        ...


@dataclass(frozen=True, slots=True)
class EachEvent:
    """A sink that passes events on one by one."""

    take: Callable[[Event], None]

    def deliver(self, events: Sequence[Event], /) -> None:
        for event in events:
            self.take(event)


@dataclass(slots=True)
class RequestState:
    """A request on its way through the engine; times are the engine's clock."""

    request: Request
    sink: EventSink
    submitted: float
    scheduled: float | None = None
    first_token: float | None = None
    last_token: float = 0.0
    made: int = 0
    cached: int = 0

    @property
    def queue_s(self) -> float:
        """From when it was submitted to its first step; 0 where there was none yet."""
        return 0.0 if self.scheduled is None else self.scheduled - self.submitted

    def timing(self, now: float) -> Timing:
        return Timing(
            prompt_tokens=len(self.request.prompt_ids),
            cached_tokens=self.cached,
            output_tokens=self.made,
            scheduled_s=None if self.scheduled is None else self.scheduled - self.submitted,
            first_token_s=None if self.first_token is None else self.first_token - self.submitted,
            elapsed_s=now - self.submitted,
            request_id=self.request.id,
            trace=self.request.trace,
        )

    def end(self, reason: FinishReason, error: str) -> Event:
        """The last event, where it brings no token."""
        return Event(self.request.id, (), (), reason, error, self.cached, self.queue_s)


class Outbox:
    """The events of one turn of the loop, kept by sink until ``send``. Not for several threads."""

    def __init__(self) -> None:
        # By the sink's identity: sinks need be neither hashable nor unequal.
        self._batches: dict[int, tuple[EventSink, list[Event]]] = {}

    @property
    def empty(self) -> bool:
        return not self._batches

    def add(self, sink: EventSink, event: Event) -> None:
        batch = self._batches.get(id(sink))
        if batch is None:
            self._batches[id(sink)] = (sink, [event])
        else:
            batch[1].append(event)

    def send(self) -> list[tuple[Exception, list[Event]]]:
        """Hands every sink its events, once; what the sinks raised, and over which events."""
        batches, self._batches = self._batches, {}
        failed: list[tuple[Exception, list[Event]]] = []
        for sink, events in batches.values():
            try:
                sink.deliver(events)
            except Exception as error:  # noqa: BLE001 - a sink that breaks has lost its client
                failed.append((error, events))
        return failed
