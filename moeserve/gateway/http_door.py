"""The HTTP door: OpenAI's routes, and small ones around them.

Every failure, also of unknown routes and unreadable bodies, has OpenAI's error form. A client
that hangs up cancels its request, streaming or not. Only ``/health`` and ``/ready`` are open when
there is an api key.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

import moeserve
from moeserve.errors import (
    DeadlineError,
    InternalError,
    MoeserveError,
    UnauthenticatedError,
    UnavailableError,
)
from moeserve.gateway import http_bodies as bodies
from moeserve.gateway.http_answers import AnswerWriter, Json, error_body, error_object
from moeserve.gateway.json_body import Body
from moeserve.gateway.limits import MAX_BODY_BYTES, prompt_text
from moeserve.gateway.service import (
    ClientRequest,
    InferenceService,
    ServedModel,
    ServiceState,
)
from moeserve.gateway.stream import ResponseStream

log = logging.getLogger(__name__)

# A client that is slower than this with its body is hung up on.
BODY_S = 60.0
_OPEN_PATHS = frozenset({"/health", "/ready"})

Endpoint = Callable[[Request], Awaitable[Response]]


# A page and its content type.
MetricsPage = Callable[[], Awaitable[tuple[bytes, str]]]


def http_app(service: InferenceService, api_key: str | None, metrics: MetricsPage) -> ASGIApp:
    """The ASGI application; ``metrics`` gives a page and its content type."""
    routes = _Routes(service, metrics)
    table: list[tuple[str, str, Endpoint]] = [
        ("GET", "/v1/models", routes.models),
        ("GET", "/v1/models/{name:path}", routes.model),
        ("POST", "/v1/completions", routes.completions),
        ("POST", "/v1/chat/completions", routes.chat),
        ("POST", "/tokenize", routes.tokenize),
        ("POST", "/detokenize", routes.detokenize),
        ("GET", "/health", routes.health),
        ("GET", "/ready", routes.ready),
        ("GET", "/version", routes.version),
        ("GET", "/metrics", routes.metrics),
    ]
    app = Starlette(
        routes=[Route(path, _framed(call), methods=[method]) for method, path, call in table],
        exception_handlers={HTTPException: _plain},
    )
    app.router.redirect_slashes = False
    return app if api_key is None else _KeyGuard(app, api_key)


class _Routes:
    def __init__(self, service: InferenceService, metrics: MetricsPage) -> None:
        self._service = service
        self._metrics = metrics

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model_card(self._service.served)]})

    async def model(self, request: Request) -> Response:
        return JSONResponse(_model_card(self._service.model(request.path_params["name"])))

    async def completions(self, request: Request) -> Response:
        wanted, form = bodies.parse_completion(await _body(request, self._service))
        return _Generation(self._service, _named(wanted, "cmpl"), form)

    async def chat(self, request: Request) -> Response:
        wanted, form, conversation = bodies.parse_chat(await _body(request, self._service))
        prompt = await self._render(wanted.model, conversation)
        wanted = replace(_named(wanted, "chatcmpl"), prompts=(prompt,))
        return _Generation(self._service, wanted, form)

    async def tokenize(self, request: Request) -> Response:
        model, what, special = bodies.parse_tokenize(await _body(request, self._service))
        served = self._service.model(model)
        text = what if isinstance(what, str) else await self._render(model, what)
        ids = await self._service.tokenize(model, text, special)
        return JSONResponse(
            {"count": len(ids), "max_model_len": served.limits.max_len, "tokens": ids}
        )

    async def detokenize(self, request: Request) -> Response:
        model, ids, skip = bodies.parse_detokenize(await _body(request, self._service))
        return JSONResponse({"prompt": await self._service.detokenize(model, ids, skip)})

    async def health(self, _: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def ready(self, _: Request) -> Response:
        ready = self._service.state is ServiceState.READY
        return JSONResponse({"status": self._service.state.value}, 200 if ready else 503)

    async def version(self, _: Request) -> Response:
        return JSONResponse({"version": moeserve.__version__})

    async def metrics(self, _: Request) -> Response:
        page, kind = await self._metrics()
        return Response(page, headers={"content-type": kind})

    async def _render(self, model: str, conversation: bodies.Conversation) -> str:
        self._service.model(model)
        text = await self._service.texts.render(
            conversation.messages,
            add_generation_prompt=conversation.add_generation_prompt,
            **conversation.template_args,
        )
        return prompt_text(text, "messages")


class _Generation(Response):
    """Runs one client request for as long as the client listens."""

    def __init__(
        self, service: InferenceService, wanted: ClientRequest, form: bodies.AnswerFormat
    ) -> None:
        super().__init__()
        self._service = service
        self._wanted = wanted
        self._form = form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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
        events = _Events(send)
        try:
            async with await self._service.open(self._wanted) as stream:
                writer = self._writer(stream)
                if self._form.stream:
                    await self._stream(stream, writer, events)
                    return
                async for delta in stream:
                    writer.add(delta)
            answer = JSONResponse(writer.whole())
        except MoeserveError as error:
            failed = error
        except Exception:  # a bug of ours: the log has it, the client gets 500, serving goes on
            log.exception("a bug while answering")
            failed = InternalError("internal error; the server's log tells more")
        else:
            await answer(scope, receive, send)
            return
        if events.started:
            await events.send(error_body(failed))
            await events.end()
        else:
            await _failed(failed)(scope, receive, send)

    async def _stream(self, stream: ResponseStream, writer: AnswerWriter, events: _Events) -> None:
        async for delta in stream:
            for chunk in writer.chunks(delta):
                await events.send(chunk)
        if self._form.include_usage:
            await events.send(writer.usage_chunk())
        await events.send_raw("[DONE]")
        await events.end()

    def _writer(self, stream: ResponseStream) -> AnswerWriter:
        served = self._service.served
        return AnswerWriter(
            self._form,
            stream.request_id,
            served.name,
            int(time.time()),
            self._wanted.n,
            served.tokenizer,
        )


class _Events:
    """Server-sent events. The status is sent with the first, so that a request which fails before
    its first token fails with the right one."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    async def send(self, event: Json) -> None:
        await self.send_raw(json.dumps(event, ensure_ascii=False, allow_nan=False))

    async def send_raw(self, data: str) -> None:
        if not self.started:
            self.started = True
            kind = (b"content-type", b"text/event-stream; charset=utf-8")
            headers = [kind, (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        body = f"data: {data}\n\n".encode(errors="replace")
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


class _KeyGuard:
    """Lets only health checks through without ``authorization: Bearer KEY``."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._expected = f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in _OPEN_PATHS:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                error = UnauthenticatedError(
                    "send the api key as header 'Authorization: Bearer KEY'"
                )
                await _failed(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _framed(endpoint: Endpoint) -> Endpoint:
    """The frame around every route: our errors out in OpenAI's form."""

    async def framed(request: Request) -> Response:
        try:
            return await endpoint(request)
        except MoeserveError as error:
            return _failed(error)
        except HTTPException as error:
            return await _plain(request, error)
        except ClientDisconnect:
            return Response(status_code=499)
        except asyncio.CancelledError:  # uvicorn closes, and a body is still on its way
            return _failed(UnavailableError("the server stopped: send the request elsewhere"))
        except Exception:  # as in _Generation: one request fails, not the server
            log.exception("a bug in %s", request.url.path)
            return _failed(InternalError("internal error; the server's log tells more"))

    return framed


def _failed(error: MoeserveError) -> Response:
    headers = {"retry-after": "1"} if error.http_status in (429, 503) else {}
    if error.http_status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(error), error.http_status, headers)


async def _plain(request: Request, error: Exception) -> Response:
    """Failures that are HTTP's own: no such route, wrong method, body too long, wrong type."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    place = f"{request.method} {request.url.path!a:.100}"
    message, code = {
        404: (f"{place}: no such route", "not_found"),
        405: (f"{place}: this route takes {headers.get('Allow', 'another method')}", "bad_method"),
    }.get(status, (str(getattr(error, "detail", "failed")), f"http_{status}"))
    body = error_object(message, "invalid_request_error", code)
    return JSONResponse(body, status, headers)


async def _body(request: Request, service: InferenceService) -> Body:
    """The JSON object sent, within its bounds of type, size and time."""
    kind = Headers(scope=request.scope).get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, f"content-type {kind!a:.60}: send application/json")
    raw = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                raw += part
                if len(raw) > MAX_BODY_BYTES:
                    raise HTTPException(
                        413, f"the body is longer than {MAX_BODY_BYTES} bytes: send less"
                    )
    except TimeoutError as late:
        raise DeadlineError(f"the body did not arrive within {BODY_S:g} s") from late
    return await service.texts.parse_json(bytes(raw))


def _named(wanted: ClientRequest, prefix: str) -> ClientRequest:
    return (
        wanted
        if wanted.request_id
        else replace(wanted, request_id=f"{prefix}-{secrets.token_hex(12)}")
    )


def _model_card(served: ServedModel) -> Json:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "moeserve",
        "max_model_len": served.limits.max_len,
    }
