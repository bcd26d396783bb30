"""What is kept of one request by whoever passes its events on, and how these leave: one call per
sink and turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from moeserve.core import Event, FinishReason, Request, RequestId, Timing
from moeserve.errors import ExhaustedError, MoeserveError, UnavailableError


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


def reason_refused(error: MoeserveError) -> FinishReason:
    """How a request ends that an engine did not take: a full queue here is nothing that its client
    has asked for wrongly."""
    again = isinstance(error, UnavailableError | ExhaustedError) and error.param is None
    return FinishReason.UNAVAILABLE if again else FinishReason.ERROR


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
    received: int = 0
    came_cached: int | None = None

    def start(self, now: float, found: int) -> None:
        """Its first step, which finds so many tokens computed: from a cache, unless it came with
        KV (``History.cached``)."""
        self.scheduled = now
        self.cached = found if self.came_cached is None else self.came_cached
        self.received = max(0, min(found, len(self.request.prompt_ids)) - self.cached)

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
            received_tokens=self.received,
        )

    def end(self, reason: FinishReason, error: str) -> Event:
        """The last event, where it brings no token."""
        return Event(self.request.id, (), (), reason, error, self.cached, self.queue_s)


class Gaps:
    """Times between tokens that one turn brought, for whoever passes on events that others made."""

    def __init__(self, now: float) -> None:
        self._now = now
        self._before: dict[float, int] = {}  # when the token before it came, and how often

    def count(self, state: RequestState, event: Event) -> bool:
        """Tokens of ``event`` have come, one or more; several at once count as one after the other,
        without a gap. Whether the first of the request is among them."""
        now, before = self._now, self._before
        first = state.first_token is None
        state.made += len(event.token_ids)
        if first:
            state.first_token, state.cached = now, event.cached_tokens
        else:
            before[state.last_token] = before.get(state.last_token, 0) + 1
        if gaps := len(event.token_ids) - 1:
            before[now] = before.get(now, 0) + gaps
        state.last_token = now
        return first

    def seconds(self) -> dict[float, int]:
        """How many tokens came how long after the one before them."""
        return {self._now - then: count for then, count in self._before.items()}


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
