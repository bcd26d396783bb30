"""The HTTP door: OpenAI's and Anthropic's routes, and small ones around them.

Every failure, also of unknown routes and unreadable bodies, has OpenAI's error form. A client
that hangs up cancels its request, streaming or not. Only ``/health``, ``/ready`` and the
dashboard's empty page are open when there are api keys.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

import moeserve
from moeserve.gateway.dashboard.feed import SnapshotFeed
from moeserve.gateway.dashboard.routes import dashboard_routes
from moeserve.gateway.http.agents import AgentRoutes
from moeserve.gateway.http.body import read_body
from moeserve.gateway.http.failures import Endpoint, framed, plain_response
from moeserve.gateway.http.generation import Generation
from moeserve.gateway.http.guards import HostRules, guarded
from moeserve.gateway.http.request_ids import RequestIds
from moeserve.gateway.openai.chat import parse_chat
from moeserve.gateway.openai.completions import parse_completion
from moeserve.gateway.openai.errors import Json
from moeserve.gateway.openai.fields import warning_header
from moeserve.gateway.openai.prepare import named, prepare, render
from moeserve.gateway.openai.tokens import parse_detokenize, parse_tokenize, tokenizer_info
from moeserve.gateway.service import (
    InferenceService,
    ServedModel,
    ServiceState,
)
from moeserve.gateway.trust.identity import Tenants

# A page and its content type.
MetricsPage = Callable[[], Awaitable[tuple[bytes, str]]]


def http_app(
    service: InferenceService,
    tenants: Tenants | None,
    metrics: MetricsPage,
    rules: HostRules | None = None,
    dashboard: SnapshotFeed | None = None,
) -> ASGIApp:
    """The ASGI application; ``metrics`` gives a page and its content type. Without ``tenants``
    everybody may call; without ``rules`` by whatever name; without ``dashboard`` there is none."""
    routes = _Routes(service, metrics)
    table: list[tuple[str, str, Endpoint]] = [
        ("GET", "/v1/models", routes.models),
        ("GET", "/v1/models/{name:path}", routes.model),
        ("POST", "/v1/completions", routes.completions),
        ("POST", "/v1/chat/completions", routes.chat),
        *AgentRoutes(service).table,
        ("POST", "/tokenize", routes.tokenize),
        ("POST", "/detokenize", routes.detokenize),
        ("GET", "/tokenizer_info", routes.tokenizer_info),
        ("GET", "/health", routes.health),
        ("GET", "/ready", routes.ready),
        ("GET", "/version", routes.version),
        ("GET", "/metrics", routes.metrics),
        *([] if dashboard is None else dashboard_routes(dashboard)),
    ]
    app = Starlette(
        routes=[Route(path, framed(call), methods=[method]) for method, path, call in table],
        exception_handlers={HTTPException: plain_response},
    )
    app.router.redirect_slashes = False
    return RequestIds(guarded(app, tenants, rules or HostRules()))


class _Routes:
    def __init__(self, service: InferenceService, metrics: MetricsPage) -> None:
        self._service = service
        self._metrics = metrics

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model_card(self._service.served)]})

    async def model(self, request: Request) -> Response:
        return JSONResponse(_model_card(self._service.model(request.path_params["name"])))

    async def completions(self, request: Request) -> Response:
        wanted, form = parse_completion(await read_body(request, self._service.texts))
        return Generation(self._service, named(wanted, "cmpl"), form)

    async def chat(self, request: Request) -> Response:
        wanted, form, conversation = parse_chat(await read_body(request, self._service.texts))
        wanted = named(wanted, "chatcmpl")
        wanted, reading = await prepare(self._service, wanted, conversation)
        return Generation(self._service, wanted, form, reading)

    async def tokenize(self, request: Request) -> Response:
        wanted = parse_tokenize(await read_body(request, self._service.texts))
        self._service.allow(wanted.ignored)
        served, what = self._service.model(wanted.model), wanted.prompt
        text = what if isinstance(what, str) else await render(self._service.texts, served, what)
        ids = await self._service.tokenize(wanted.model, text, wanted.special_tokens)
        return JSONResponse(
            {"count": len(ids), "max_model_len": served.limits.max_len, "tokens": ids},
            headers=warning_header(wanted.ignored),
        )

    async def detokenize(self, request: Request) -> Response:
        wanted = parse_detokenize(await read_body(request, self._service.texts))
        self._service.allow(wanted.ignored)
        text = await self._service.detokenize(
            wanted.model, wanted.tokens, wanted.skip_special_tokens
        )
        return JSONResponse({"prompt": text}, headers=warning_header(wanted.ignored))

    async def tokenizer_info(self, _: Request) -> Response:
        served = self._service.served
        return JSONResponse(tokenizer_info(self._service.texts.tokenizer, served.limits.max_len))

    async def health(self, _: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def ready(self, _: Request) -> Response:
        ready = self._service.ready
        state = self._service.state
        status = "lost" if state is ServiceState.READY and not ready else state.value
        return JSONResponse({"status": status}, 200 if ready else 503)

    async def version(self, _: Request) -> Response:
        return JSONResponse({"version": moeserve.__version__})

    async def metrics(self, _: Request) -> Response:
        page, kind = await self._metrics()
        return Response(page, headers={"content-type": kind})


def _model_card(served: ServedModel) -> Json:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "moeserve",
        "max_model_len": served.limits.max_len,
    }
