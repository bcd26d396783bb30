"""One client's running sequences, as an async iterator that leaves nothing behind.

The engine's events arrive through the mailbox, as token ids; here they become text, in which stop
strings are looked for. So a sequence may end a few tokens before its request does in the engine:
what the engine made beyond is dropped, and not counted. ``Delta`` is what a door shows. Leaving a
stream, however it ends, aborts what still runs, so that its KV is free at the next step.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

from moeserve.core import Event, FinishReason, Logprobs, Request
from moeserve.engine.loop import ServingEngine
from moeserve.errors import (
    CancelledError,
    DeadlineError,
    InternalError,
    InvalidRequestError,
    MoeserveError,
    UnavailableError,
)
from moeserve.gateway.mailbox import Mailbox
from moeserve.gateway.text import Decodes, TextStream

log = logging.getLogger(__name__)

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
    """News of sequence ``index`` (prompt * n + i); the last one has finish, usage and timing, and
    the stop string that ended it, if one did.

    ``prompt_logprobs`` are those of the prompt's tokens from the second on, as far as they are new.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...]
    finish: FinishReason | None = None
    usage: Usage | None = None
    timing: Durations | None = None
    stop: str = ""
    prompt_logprobs: tuple[Logprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Totals:
    """Of all sequences of a stream. ``finish`` has each reason once; ``complete`` when all have
    one. Seconds, None where there was no token: the shortest queue and time to a first token, and
    the mean between tokens."""

    complete: bool
    finish: tuple[FinishReason, ...]
    cached_tokens: int
    output_tokens: int
    longest: int
    queue_s: float | None
    ttft_s: float | None
    tpot_s: float | None


@dataclass(slots=True)
class _Sequence:
    """One sequence, and what came for it since it was last read.

    ``last`` is its end: the engine's, or its own where the text says so. Nothing is taken after.
    Its client has the next ``skip`` tokens: they are made into text, and dropped.
    """

    request: Request
    text: TextStream | None
    skip: int = 0
    tokens: int = 0
    queue_s: float = 0.0
    cached: int = 0
    first_token: float = 0.0
    last_token: float = 0.0
    last: Event | None = None
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    prompt_logprobs: list[Logprobs] = field(default_factory=list)

    def take(self, event: Event, now: float) -> None:
        """What the engine made. A tokenizer may raise anything; then nothing is taken."""
        if known := min(self.skip, len(event.token_ids)):
            ids, logprobs = event.token_ids, event.logprobs
            old = event._replace(token_ids=ids[:known], logprobs=logprobs[:known], finish=None)
            self._take(old, now)
            self.skip -= known
            self.tokens, self.texts, self.token_ids, self.logprobs = 0, [], [], []
            event = event._replace(
                token_ids=ids[known:], logprobs=logprobs[known:], prompt_logprobs=()
            )
            if self.last is not None or not (event.token_ids or event.finish):
                return
        self._take(event, now)

    def _take(self, event: Event, now: float) -> None:
        token_ids, finish, stopped = event.token_ids, event.finish, False
        if event.prompt_logprobs:
            self.prompt_logprobs += event.prompt_logprobs
        if self.request.params.only_prompt:
            if finish is not None:
                self.first_token = self.last_token = now
                self.last = event if _failed(event) else event._replace(finish=FinishReason.LENGTH)
            return
        if self.text is not None:
            ending = finish if finish is None or not _failed(event) else None
            text, made, stopped = self.text.extend(token_ids, ending)
            self.texts.append(text)
            token_ids = token_ids[:made]
        if token_ids:
            self.last_token = now
            if not self.tokens:
                self.first_token = now
                self.queue_s = event.queue_s or self.queue_s
                self.cached = event.cached_tokens
            self.tokens += len(token_ids)
            self.token_ids += token_ids
        if event.logprobs:
            self.logprobs += event.logprobs[: len(token_ids)]
        if stopped:
            self.last = event._replace(finish=FinishReason.STOP)
        elif finish is not None:
            self.last = event

    def durations(self) -> Durations:
        making = self.last_token - self.first_token
        return Durations(
            ttft_s=self.first_token - self.request.arrival,
            tpot_s=making / (self.tokens - 1) if self.tokens > 1 else 0.0,
            total_s=self.last_token - self.request.arrival,
        )

    def read(self, index: int) -> Delta:
        """What came, once; with the end, if it ended well."""
        delta = Delta(index, "".join(self.texts), tuple(self.token_ids), tuple(self.logprobs))
        if self.prompt_logprobs:
            delta = replace(delta, prompt_logprobs=tuple(self.prompt_logprobs))
            self.prompt_logprobs = []
        self.texts, self.token_ids, self.logprobs = [], [], []
        if self.last is None or _failed(self.last):
            return delta
        return replace(
            delta,
            finish=self.last.finish,
            usage=Usage(len(self.request.prompt_ids), self.tokens, self.last.cached_tokens),
            timing=self.durations(),
            stop="" if self.text is None else self.text.stop_met,
        )


class ResponseStream:
    """The running sequences of one client request. Use as ``async with``; iterate once. Of each the
    client has the first ``skip`` tokens, which are not given again.

    A reader slower than the engine gets fewer, longer deltas: what came for a sequence in the
    meantime is one.
    """

    def __init__(
        self,
        request_id: str,
        engine: ServingEngine,
        requests: list[Request],
        tokenizer: Decodes | None,
        mailbox: Mailbox,
        clock: Callable[[], float],
        on_close: Callable[[ResponseStream, BaseException | None], None],
        skip: int = 0,
    ) -> None:
        self.request_id = request_id
        self._engine = engine
        self._sequences = [
            _Sequence(r, None if tokenizer is None else TextStream(tokenizer, r), skip)
            for r in requests
        ]
        self._mailbox = mailbox
        self._clock = clock
        self._on_close = on_close
        self._unread: dict[int, None] = {}  # the sequence that waits longest first
        self._waiter: asyncio.Future[None] | None = None  # of the reader, while it waits
        self._timer: asyncio.TimerHandle | None = None
        self._heard = False  # anything since the timer was set
        self._aborted = False
        self._closed = False
        self.started = False  # every sequence was taken in

    @property
    def made(self) -> int:
        """Tokens that came, of all sequences together."""
        return sum(sequence.tokens for sequence in self._sequences)

    @property
    def prompt_lens(self) -> tuple[int, ...]:
        """Tokens of each sequence's prompt."""
        return tuple(len(s.request.prompt_ids) for s in self._sequences)

    @property
    def prompt_tokens(self) -> int:
        """Of the first prompt."""
        return len(self._sequences[0].request.prompt_ids)

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """The prompt of every sequence, as token ids."""
        return [sequence.request.prompt_ids for sequence in self._sequences]

    def start(self) -> None:
        """Submits every sequence, or none."""
        for index, sequence in enumerate(self._sequences):
            try:
                self._submit(index, sequence.request)
            except MoeserveError as error:
                for unsent in self._sequences[index:]:
                    unsent.last = Event(unsent.request.id, finish=FinishReason.ABORT)
                self.close(error)
                raise
        self.started = True

    def _submit(self, index: int, request: Request) -> None:
        self._mailbox.open(request.id, functools.partial(self._receive, index))
        try:
            self._engine.submit(request, self._mailbox)
        except MoeserveError:
            self._mailbox.close(request.id)
            raise

    def _receive(self, index: int, event: Event) -> None:
        sequence = self._sequences[index]
        if self._closed or sequence.last is not None:
            return
        try:
            sequence.take(event, self._clock())
        except Exception:  # a tokenizer that cannot decode ends one request
            log.exception("request %s: tokens %s", event.request_id, event.token_ids)
            sequence.last = event._replace(
                finish=FinishReason.ERROR,
                error="internal error: the server's log has the cause",
            )
        if sequence.last is not None and event.finish is None:
            assert sequence.last.finish is not None
            self._engine.abort(event.request_id, sequence.last.finish)
        self._unread[index] = None
        self._heard = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(error)

    def close(self, error: BaseException | None = None) -> None:
        """Aborts what still runs, because of ``error`` if there is one. May be called again."""
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for sequence in self._sequences:
            if sequence.last is None:
                self._engine.abort(sequence.request.id)
        self._on_close(self, error)

    def totals(self) -> Totals:
        """What its sequences have come to by now."""
        begun = [s for s in self._sequences if s.tokens]
        gaps = sum(s.tokens - 1 for s in begun)
        making = sum(s.last_token - s.first_token for s in begun)
        reasons = [s.last.finish for s in self._sequences if s.last is not None and s.last.finish]
        return Totals(
            complete=len(reasons) == len(self._sequences),
            finish=tuple(dict.fromkeys(reasons)),
            cached_tokens=sum(s.cached for s in begun),
            output_tokens=sum(s.tokens for s in begun),
            longest=max((s.tokens for s in begun), default=0),
            queue_s=min((s.queue_s for s in begun), default=None),
            ttft_s=min((s.durations().ttft_s for s in begun), default=None),
            tpot_s=making / gaps if gaps else None,
        )

    def abort(self) -> None:
        """Ends the stream from outside: its reader gets CancelledError."""
        self._aborted = True
        self._wake()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        while not self._unread and not self._aborted:
            if all(s.last is not None for s in self._sequences):
                raise StopAsyncIteration
            await self._wait()
        if self._aborted:
            raise CancelledError(f"request {self.request_id} was aborted")
        index = next(iter(self._unread))
        del self._unread[index]
        sequence = self._sequences[index]
        if sequence.last is not None and _failed(sequence.last):
            if not sequence.token_ids:
                raise _failure(sequence.last, self.request_id)
            self._unread[index] = None  # after what was made before
        return sequence.read(index)

    async def _wait(self) -> None:
        """For an event. DeadlineError where the engine lets a deadline pass; InternalError where
        it ends no step for ``SILENCE_S``."""
        if self._timer is None:
            self._watch()
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _watch(self) -> None:
        """One timer for many waits: what it costs does not depend on the number of events."""
        deadline = self._sequences[0].request.deadline
        wait_s = SILENCE_S
        if deadline is not None:
            wait_s = max(0.0, deadline - self._clock()) + DEADLINE_GRACE_S
        self._heard = False
        steps = self._engine.counters.steps
        self._timer = asyncio.get_running_loop().call_later(wait_s, self._late, deadline, steps)

    def _late(self, deadline: float | None, steps: int) -> None:
        self._timer = None
        if self._waiter is None or self._waiter.done():
            return  # the next wait sets it again
        if deadline is not None:
            self._waiter.set_exception(
                DeadlineError(f"request {self.request_id} passed its deadline")
            )
        elif self._heard or self._engine.counters.steps != steps:
            self._watch()
        else:
            self._waiter.set_exception(
                InternalError(f"the engine ended no step for {SILENCE_S:g} s")
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
        case FinishReason.INVALID:
            return InvalidRequestError(reason)
        case _:
            return InternalError(reason)
