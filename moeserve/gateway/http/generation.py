"""One generation over HTTP: whole as JSON, or as server-sent events, while the client listens."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Mapping

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from moeserve.errors import InternalError, MoeserveError
from moeserve.gateway.http.access import RECORDED
from moeserve.gateway.http.failures import failed_response
from moeserve.gateway.openai.answers import AnsweredPrompt, AnswerHead, AnswerWriter
from moeserve.gateway.openai.chat_answers import ChatWriter
from moeserve.gateway.openai.completion_answers import CompletionWriter
from moeserve.gateway.openai.errors import Json, error_body
from moeserve.gateway.openai.fields import AnswerFormat, warning_header
from moeserve.gateway.openai.reading import Reading
from moeserve.gateway.openai.rendering import render
from moeserve.gateway.service import ClientRequest, InferenceService
from moeserve.gateway.stream import ResponseStream

log = logging.getLogger(__name__)


class Generation(Response):
    """Runs one client request for as long as the client listens; ``reading`` is a chat's."""

    def __init__(
        self,
        service: InferenceService,
        wanted: ClientRequest,
        form: AnswerFormat,
        reading: Reading | None = None,
    ) -> None:
        super().__init__()
        self._service = service
        self._wanted = wanted
        self._form = form
        self._reading = reading
        self._warning = warning_header(wanted.ignored)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[RECORDED] = True  # the service tells of it
        work = asyncio.create_task(self._answer(scope, receive, send))
        hang_up = asyncio.create_task(_hung_up(receive))
        try:
            await asyncio.wait({work, hang_up}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            work.cancel()
            hang_up.cancel()
            await asyncio.wait({work, hang_up})
        if not work.cancelled():
            work.result()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        events = Events(send, self._warning)
        try:
            async with await self._service.open(self._wanted) as stream:
                if self._form.stream:
                    await self._stream(stream, events)
                    return
                answer = await self._whole(stream)
        except MoeserveError as error:
            failed = error
        except Exception:  # a bug of ours: the log has it, the client gets 500, serving goes on
            log.exception("a bug while answering")
            failed = InternalError("internal error; the server's log tells more")
        else:
            await answer(scope, receive, send)
            return
        if events.started:
            await self._break_off(events, failed)
            await events.end()
        else:
            await self._refusal(failed)(scope, receive, send)

    async def _whole(self, stream: ResponseStream) -> Response:
        writer = self._writer(stream)
        async for delta in stream:
            writer.add(delta)
        if self._form.prompt_logprobs or self._form.echo:
            # So many numbers that others would wait for them.
            body = await asyncio.to_thread(lambda: render(writer.whole()))
        else:
            body = render(writer.whole())
        return Response(body, headers=self._warning, media_type="application/json")

    async def _stream(self, stream: ResponseStream, events: Events) -> None:
        writer = self._writer(stream)
        async for delta in stream:
            for chunk in writer.chunks(delta):
                await events.send(chunk)
        if self._form.include_usage:
            await events.send(writer.usage_chunk())
        await events.send_raw("[DONE]")
        await events.end()

    def _refusal(self, failed: MoeserveError) -> Response:
        return failed_response(failed)

    async def _break_off(self, events: Events, failed: MoeserveError) -> None:
        """Of a stream that has begun."""
        await events.send(error_body(failed))

    def _writer(self, stream: ResponseStream) -> AnswerWriter:
        served, n = self._service.served, self._wanted.n
        prompts = tuple(
            AnsweredPrompt(ids, self._echoed(p, ids)) for p, ids in enumerate(stream.prompts[::n])
        )
        head = AnswerHead(stream.request_id, served.name, int(time.time()), n, prompts)
        if self._form.chat:
            return ChatWriter(self._form, head, served.tokenizer, self._reading)
        return CompletionWriter(self._form, head, served.tokenizer)

    def _echoed(self, p: int, ids: tuple[int, ...]) -> str:
        """The prompt's text where it is shown: the client's own, unless that was cut."""
        given, tokenizer = self._wanted.prompts[p], self._service.served.tokenizer
        if self._form.echo is None or tokenizer is None:
            return ""
        if isinstance(given, str) and self._wanted.truncate is None:
            return given
        return tokenizer.decode(ids, bool(self._wanted.params.get("skip_special_tokens", True)))


class Events:
    """Server-sent events. The status is sent with the first, so that a request which fails before
    its first token fails with the right one."""

    def __init__(self, send: Send, headers: Mapping[str, str]) -> None:
        self._send = send
        self._headers = [(name.encode(), value.encode()) for name, value in headers.items()]
        self.started = False
        self.sent = 0

    async def send(self, event: Json, name: str = "") -> None:
        """``name`` is the event's type, where the API's events have one."""
        await self.send_raw(json.dumps(event, ensure_ascii=False, allow_nan=False), name)

    async def send_raw(self, data: str, name: str = "") -> None:
        self.sent += 1
        if not self.started:
            self.started = True
            kind = (b"content-type", b"text/event-stream; charset=utf-8")
            headers = [kind, (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
            headers += self._headers
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        head = f"event: {name}\n" if name else ""
        body = f"{head}data: {data}\n\n".encode(errors="replace")
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
