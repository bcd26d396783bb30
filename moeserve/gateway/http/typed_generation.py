"""One generation whose events have types: OpenAI's Responses and Anthropic's Messages.

A stream begins with events that need no token, so the client hears at once; where the API has a
``ping``, it is sent while nothing else is to be told.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Protocol

from starlette.responses import JSONResponse, Response

from moeserve.errors import MoeserveError
from moeserve.gateway.http.generation import Events, Generation
from moeserve.gateway.openai.errors import Json
from moeserve.gateway.openai.fields import AnswerFormat
from moeserve.gateway.service import ClientRequest, InferenceService
from moeserve.gateway.stream import Delta, ResponseStream

# How long a stream may say nothing, where its API has a ping.
PING_S = 15.0


class TypedWriter(Protocol):
    """Writes one answer as events, and as a whole from the same events. Events have ``type``."""

    @property
    def ping(self) -> Json | None: ...

    def begin(self) -> Iterator[Json]:
        """What is told before the first token."""
        ...

    def events(self, delta: Delta) -> Iterator[Json]:
        """What a delta adds; the last one's end the answer."""
        ...

    def whole(self) -> Json:
        """The answer, after all its deltas."""
        ...

    def failed(self, error: MoeserveError) -> Json:
        """The event that ends a stream which has begun."""
        ...


class TypedGeneration(Generation):
    """``write`` makes the writer of an answer; ``refusal`` a failure before there is one."""

    def __init__(
        self,
        service: InferenceService,
        wanted: ClientRequest,
        form: AnswerFormat,
        write: Callable[[ResponseStream], TypedWriter],
        refusal: Callable[[MoeserveError], Response],
    ) -> None:
        super().__init__(service, wanted, form)
        self._write = write
        self._refuse = refusal
        self._streaming: TypedWriter | None = None

    async def _whole(self, stream: ResponseStream) -> Response:
        writer = self._write(stream)
        for _ in writer.begin():
            pass
        async for delta in stream:
            for _ in writer.events(delta):
                pass
        return JSONResponse(writer.whole(), headers=self._warning)

    async def _stream(self, stream: ResponseStream, events: Events) -> None:
        self._streaming = writer = self._write(stream)
        await _tell(events, writer.begin())
        async with _pinged(events, writer.ping):
            async for delta in stream:
                await _tell(events, writer.events(delta))
        await events.end()

    def _refusal(self, failed: MoeserveError) -> Response:
        return self._refuse(failed)

    async def _break_off(self, events: Events, failed: MoeserveError) -> None:
        assert self._streaming is not None
        await _tell(events, [self._streaming.failed(failed)])


async def _tell(events: Events, told: Iterable[Json]) -> None:
    for event in told:
        await events.send(event, event["type"])


@contextlib.asynccontextmanager
async def _pinged(events: Events, ping: Json | None) -> AsyncIterator[None]:
    """Pings while the body runs and sends nothing else."""
    if ping is None:
        yield
        return

    async def keep_on() -> None:
        while True:
            sent = events.sent
            await asyncio.sleep(PING_S)
            if events.sent == sent:
                await _tell(events, [ping])

    pinging = asyncio.create_task(keep_on())
    try:
        yield
    finally:
        pinging.cancel()
        await asyncio.wait({pinging})
