"""The HTTP door: OpenAI's routes, and small ones around them.

Every failure, also of unknown routes and unreadable bodies, has OpenAI's error form. A client
that hangs up cancels its request, streaming or not. Only ``/health`` and ``/ready`` are open when
there is an api key.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from dataclasses import replace

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

import moeserve
from moeserve.gateway.http.body import read_body
from moeserve.gateway.http.failures import Endpoint, framed, plain_response
from moeserve.gateway.http.generation import Generation
from moeserve.gateway.http.guards import KeyGuard
from moeserve.gateway.http.request_ids import RequestIds
from moeserve.gateway.limits import prompt_text
from moeserve.gateway.openai.chat import Conversation, parse_chat
from moeserve.gateway.openai.completions import parse_completion
from moeserve.gateway.openai.errors import Json
from moeserve.gateway.openai.fields import warning_header
from moeserve.gateway.openai.tokens import parse_detokenize, parse_tokenize, tokenizer_info
from moeserve.gateway.service import (
    ClientRequest,
    InferenceService,
    ServedModel,
    ServiceState,
    tokenizer_of,
)

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
        ("GET", "/tokenizer_info", routes.tokenizer_info),
        ("GET", "/health", routes.health),
        ("GET", "/ready", routes.ready),
        ("GET", "/version", routes.version),
        ("GET", "/metrics", routes.metrics),
    ]
    app = Starlette(
        routes=[Route(path, framed(call), methods=[method]) for method, path, call in table],
        exception_handlers={HTTPException: plain_response},
    )
    app.router.redirect_slashes = False
    return RequestIds(app if api_key is None else KeyGuard(app, api_key))


class _Routes:
    def __init__(self, service: InferenceService, metrics: MetricsPage) -> None:
        self._service = service
        self._metrics = metrics

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model_card(self._service.served)]})

    async def model(self, request: Request) -> Response:
        return JSONResponse(_model_card(self._service.model(request.path_params["name"])))

    async def completions(self, request: Request) -> Response:
        wanted, form = parse_completion(await read_body(request))
        return Generation(self._service, _named(wanted, "cmpl"), form)

    async def chat(self, request: Request) -> Response:
        wanted, form, conversation = parse_chat(await read_body(request))
        prompt = _render(self._service.model(wanted.model), conversation)
        wanted = replace(_named(wanted, "chatcmpl"), prompts=(prompt,))
        return Generation(self._service, wanted, form)

    async def tokenize(self, request: Request) -> Response:
        wanted = parse_tokenize(await read_body(request))
        self._service.allow(wanted.ignored)
        served, what = self._service.model(wanted.model), wanted.prompt
        text = what if isinstance(what, str) else _render(served, what)
        ids = await self._service.tokenize(wanted.model, text, wanted.special_tokens)
        return JSONResponse(
            {"count": len(ids), "max_model_len": served.limits.max_len, "tokens": ids},
            headers=warning_header(wanted.ignored),
        )

    async def detokenize(self, request: Request) -> Response:
        wanted = parse_detokenize(await read_body(request))
        self._service.allow(wanted.ignored)
        text = self._service.detokenize(wanted.model, wanted.tokens, wanted.skip_special_tokens)
        return JSONResponse({"prompt": text}, headers=warning_header(wanted.ignored))

    async def tokenizer_info(self, _: Request) -> Response:
        return JSONResponse(tokenizer_info(self._service.served))

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


def _named(wanted: ClientRequest, prefix: str) -> ClientRequest:
    return (
        wanted
        if wanted.request_id
        else replace(wanted, request_id=f"{prefix}-{secrets.token_hex(12)}")
    )


def _render(served: ServedModel, conversation: Conversation) -> str:
    text = tokenizer_of(served).render_chat(
        conversation.messages, conversation.add_generation_prompt, **conversation.template_args
    )
    return prompt_text(text, "messages")


def _model_card(served: ServedModel) -> Json:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "moeserve",
        "max_model_len": served.limits.max_len,
    }
