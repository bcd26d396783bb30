"""Connections of HTTP/1.1, and the target that uses them.

h11 reads and writes; it is driven from the transport's callback, so that a message has the time at
which its bytes were there, and costs a third of what httpx takes for one. Connections that an
answer has left whole are used again, the last one first. A server may close such a one at any
moment: where it does so before a byte of the answer, the request goes out again on a new one, as
HTTP's clients do, and its time goes on; ``resent`` counts them. Nothing else is sent twice.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import h11

from moeserve.bench.serving.openai import (
    APIS,
    AskedOfAll,
    StreamedAnswer,
    body_of,
    error_text,
)
from moeserve.bench.serving.outcomes import AnswerRecord, RequestFailed
from moeserve.bench.serving.plan import PlannedRequest
from moeserve.bench.serving.prompts import PromptSource
from moeserve.bench.serving.sse import SseReader
from moeserve.bench.serving.targets import SETUP_S, ClientTls, TargetAddress
from moeserve.errors import ConfigError, UnavailableError

MOST_BODY_BYTES = 1 << 20  # of an answer that is no stream


class WholeReply:
    """An answer that comes as one body."""

    def __init__(self) -> None:
        self.status = 0
        self.body = b""

    def head(self, status: int, headers: Mapping[bytes, bytes]) -> None:
        self.status = status

    def data(self, received: bytes, now: float) -> None:
        self.body += received
        if len(self.body) > MOST_BODY_BYTES:
            raise RequestFailed("bad answer", f"has more than {MOST_BODY_BYTES} bytes")

    def refused(self) -> RequestFailed:
        try:
            detail = error_text(json.loads(self.body))
        except (ValueError, RecursionError):
            detail = self.body[:300].decode("utf-8", "replace")
        return RequestFailed(f"http {self.status}", detail)


class StreamReply(WholeReply):
    """An answer that comes as events, or a refusal."""

    def __init__(self, record: AnswerRecord) -> None:
        super().__init__()
        self._events = SseReader()
        self._answer = StreamedAnswer(record)

    def head(self, status: int, headers: Mapping[bytes, bytes]) -> None:
        super().head(status, headers)
        kind = headers.get(b"content-type", b"")
        if status == 200 and not kind.lower().startswith(b"text/event-stream"):
            raise RequestFailed("bad answer", f"is no stream of events but {kind[:80]!r}")

    def data(self, received: bytes, now: float) -> None:
        if self.status != 200:
            super().data(received, now)
            return
        for event in self._events.feed(received):
            self._answer.event(event, now)

    def require_whole(self) -> None:
        if self.status != 200:
            raise self.refused()
        if not self._answer.done:
            raise RequestFailed("cut off", "the stream has ended without [DONE]")


class HttpConnection(asyncio.Protocol):
    """One exchange after another; ``usable`` while the next may begin."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._http = h11.Connection(h11.CLIENT)
        self._reply: WholeReply | None = None
        self._ended: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport | None = None

    @property
    def usable(self) -> bool:
        return (
            self._transport is not None
            and not self._transport.is_closing()
            and self._http.our_state is h11.IDLE
        )

    async def exchange(self, request: h11.Request, body: bytes, reply: WholeReply) -> None:
        """RequestFailed where no whole answer comes; ends the connection then, or if cancelled."""
        if self._transport is None or not self.usable:
            raise RequestFailed("reset", "the connection is closed")
        self._reply, self._ended = reply, self._loop.create_future()
        events = (request, h11.Data(data=body), h11.EndOfMessage())
        self._transport.write(b"".join(self._http.send(event) or b"" for event in events))
        try:
            await self._ended
        except BaseException:  # cancelled, too: what is half read serves nobody else
            self.close()
            raise
        finally:
            self._reply = self._ended = None
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
        else:
            self.close()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._receive(data)

    def eof_received(self) -> None:
        self._receive(b"")

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(RequestFailed("reset", str(error or "the server has closed the connection")))

    def _receive(self, data: bytes) -> None:
        if self._reply is None:  # nothing was asked: a server that closes, or that is wrong
            self.close()
            return
        now = self._loop.time()
        try:
            self._http.receive_data(data)
            while self._take(self._http.next_event(), self._reply, now):
                pass
        except h11.RemoteProtocolError as error:
            kind = "bad answer" if data else "reset"
            self._fail(RequestFailed(kind, str(error)))
        except RequestFailed as failed:
            self._fail(failed)

    def _take(self, event: Any, reply: WholeReply, now: float) -> bool:
        """Whether there may be another."""
        if isinstance(event, h11.Data):
            reply.data(bytes(event.data), now)
        elif isinstance(event, h11.Response):
            reply.head(event.status_code, dict(event.headers))
        elif isinstance(event, h11.EndOfMessage):
            if self._ended is not None and not self._ended.done():
                self._ended.set_result(None)
            return False
        return event not in (h11.NEED_DATA, h11.PAUSED) and not isinstance(
            event, h11.ConnectionClosed
        )

    def _fail(self, failed: RequestFailed) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(failed)


class HttpTarget:
    """A server of OpenAI's API."""

    def __init__(
        self,
        address: TargetAddress,
        asked: AskedOfAll,
        source: PromptSource,
        *,
        tls: ClientTls,
        key: str | None = None,
    ) -> None:
        self.resent = 0
        self._address = address
        self._asked = asked
        self._source = source
        self._context = tls.context() if address.tls else None
        self._headers = [("host", address.place), ("user-agent", "moeserve-bench")]
        if key is not None:
            self._headers.append(("authorization", f"Bearer {key}"))
        self._idle: list[HttpConnection] = []

    @property
    def model(self) -> str:
        return self._asked.model

    def ask_for(self, model: str) -> None:
        """In all requests to come."""
        self._asked = dataclasses.replace(self._asked, model=model)

    def prepare(self, request: PlannedRequest) -> bytes:
        return body_of(request, self._asked, self._source)

    async def send(self, prepared: bytes, record: AnswerRecord) -> None:
        reply = StreamReply(record)
        await self._ask("POST", APIS[self._asked.api], prepared, reply)
        reply.require_whole()

    async def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def models(self) -> list[str]:
        """Names of what is served. UnavailableError where the server does not say."""
        reply = WholeReply()
        try:
            async with asyncio.timeout(SETUP_S):
                await self._ask("GET", "/v1/models", b"", reply)
            if reply.status != 200:
                raise reply.refused()
            return [str(model["id"]) for model in json.loads(reply.body)["data"]]
        except TimeoutError as error:
            raise UnavailableError(
                f"{self._address.place} does not name its models within {SETUP_S:g} s"
            ) from error
        except (RequestFailed, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UnavailableError(
                f"{self._address.place} does not name its models ({error}): give --model"
            ) from error

    async def _ask(self, method: str, path: str, body: bytes, reply: WholeReply) -> None:
        headers = [*self._headers, ("content-length", str(len(body)))]
        if body:
            headers.append(("content-type", "application/json"))
        request = h11.Request(method=method, target=self._address.path + path, headers=headers)
        while True:
            connection, again = await self._connection()
            try:
                await connection.exchange(request, body, reply)
            except RequestFailed as failed:
                if again and failed.kind == "reset" and reply.status == 0:
                    self.resent += 1
                    continue
                raise
            if connection.usable:
                self._idle.append(connection)
            return

    async def _connection(self) -> tuple[HttpConnection, bool]:
        """One, and whether it was used before."""
        while self._idle:
            if (idle := self._idle.pop()).usable:
                return idle, True
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(
                HttpConnection, self._address.host, self._address.port, ssl=self._context
            )
        except OSError as error:  # of names, of sockets and of TLS
            raise RequestFailed("connect", str(error)) from error
        return connection, False


def require_model(names: list[str]) -> str:
    """The one that is asked where none was named."""
    if not names:
        raise ConfigError("the server names no model: give --model")
    return names[0]
