"""One client's running sequences, as an async iterator that leaves nothing behind.

The engine's events arrive through the mailbox; ``Delta`` is what a door shows. Leaving a stream,
however it ends, aborts what still runs, so that its KV is free at the next step.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from moeserve.core import Event, FinishReason, Logprobs, Request
from moeserve.engine.loop import Engine
from moeserve.errors import (
    CancelledError,
    DeadlineError,
    InternalError,
    MoeserveError,
    UnavailableError,
)
from moeserve.gateway.mailbox import Mailbox

# An engine that ends no step for so long, while a stream waits, is lost.
SILENCE_S = 600.0
# What the engine gets to report a passed deadline itself.
DEADLINE_GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Durations:
    """Seconds: arrival to first token; mean between tokens; arrival to last."""

    ttft_s: float
    tpot_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Delta:
    """News of sequence ``index`` (prompt * n + i); the last one has finish, usage and timing."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...]
    finish: FinishReason | None = None
    usage: Usage | None = None
    timing: Durations | None = None


@dataclass(slots=True)
class _Sequence:
    request: Request
    tokens: int = 0
    first_token: float = 0.0
    last_token: float = 0.0
    done: bool = False

    def durations(self) -> Durations:
        making = self.last_token - self.first_token
        return Durations(
            ttft_s=self.first_token - self.request.arrival,
            tpot_s=making / (self.tokens - 1) if self.tokens > 1 else 0.0,
            total_s=self.last_token - self.request.arrival,
        )


class ResponseStream:
    """The running sequences of one client request. Use as ``async with``; iterate once.

    A reader slower than the engine gets fewer, longer deltas: what came for a sequence in the
    meantime is one.
    """

    def __init__(
        self,
        request_id: str,
        engine: Engine,
        requests: list[Request],
        mailbox: Mailbox,
        clock: Callable[[], float],
        on_close: Callable[[str], None],
    ) -> None:
        self.request_id = request_id
        self._engine = engine
        self._sequences = [_Sequence(r) for r in requests]
        self._mailbox = mailbox
        self._clock = clock
        self._on_close = on_close
        self._unread: dict[int, list[Event]] = {}  # the sequence that waits longest first
        self._arrived = asyncio.Event()
        self._aborted = False
        self._closed = False

    def start(self) -> None:
        """Submits every sequence, or none."""
        for index, sequence in enumerate(self._sequences):
            try:
                self._engine.submit(sequence.request, functools.partial(self._sink, index))
            except MoeserveError:
                for unsent in self._sequences[index:]:
                    unsent.done = True
                self.close()
                raise

    def _sink(self, index: int, event: Event) -> None:
        """On the engine's thread."""
        sequence = self._sequences[index]
        if event.token_ids:
            sequence.last_token = self._clock()
            sequence.first_token = sequence.first_token or sequence.last_token
        self._mailbox.post(functools.partial(self._receive, index, event))

    def _receive(self, index: int, event: Event) -> None:
        self._unread.setdefault(index, []).append(event)
        self._arrived.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Aborts what still runs. May be called again."""
        if self._closed:
            return
        self._closed = True
        for sequence in self._sequences:
            if not sequence.done:
                self._engine.abort(sequence.request.id)
        self._on_close(self.request_id)

    def abort(self) -> None:
        """Ends the stream from outside: its reader gets CancelledError."""
        self._aborted = True
        self._arrived.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        if not self._unread and all(s.done for s in self._sequences) and not self._aborted:
            raise StopAsyncIteration
        while not self._unread and not self._aborted:
            await self._wait()
        if self._aborted:
            raise CancelledError(f"request {self.request_id} was aborted")
        index = next(iter(self._unread))
        events = self._unread.pop(index)
        if len(events) > 1 and _failed(events[-1]):
            self._unread[index] = [events.pop()]  # after what was made before
        return self._delta(index, events)

    async def _wait(self) -> None:
        """For an event; without a deadline, returns with none where others take their turn."""
        self._arrived.clear()
        steps = self._engine.counters.steps
        deadline = self._sequences[0].request.deadline
        wait_s = SILENCE_S
        if deadline is not None:
            wait_s = max(0.0, deadline - self._clock()) + DEADLINE_GRACE_S
        try:
            async with asyncio.timeout(wait_s):
                await self._arrived.wait()
        except TimeoutError as late:
            if deadline is not None:
                raise DeadlineError(f"request {self.request_id} passed its deadline") from late
            if self._engine.counters.steps == steps:
                raise InternalError(f"the engine ended no step for {SILENCE_S:g} s") from late

    def _delta(self, index: int, events: list[Event]) -> Delta:
        sequence, last = self._sequences[index], events[-1]
        delta = Delta(
            index,
            text="".join(e.text for e in events),
            token_ids=tuple(t for e in events for t in e.token_ids),
            logprobs=tuple(p for e in events for p in e.logprobs),
        )
        sequence.tokens += len(delta.token_ids)
        if last.finish is None:
            return delta
        sequence.done = True
        if _failed(last):
            raise _failure(last, self.request_id)
        return replace(
            delta,
            finish=last.finish,
            usage=Usage(len(sequence.request.prompt_ids), sequence.tokens, last.cached_tokens),
            timing=sequence.durations(),
        )


def _failed(event: Event) -> bool:
    return event.finish not in (None, FinishReason.STOP, FinishReason.LENGTH)


def _failure(event: Event, request_id: str) -> MoeserveError:
    reason = event.error or f"request {request_id} ended with {event.finish}"
    match event.finish:
        case FinishReason.ABORT:
            return CancelledError(reason)
        case FinishReason.DEADLINE:
            return DeadlineError(reason)
        case FinishReason.UNAVAILABLE:
            return UnavailableError(reason)
        case _:
            return InternalError(reason)
