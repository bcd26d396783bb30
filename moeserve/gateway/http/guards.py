"""Who may call: without the api key only the probes of an orchestrator."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from moeserve.errors import UnauthenticatedError
from moeserve.gateway.http.failures import failed_response

_OPEN_PATHS = frozenset({"/health", "/ready"})


class KeyGuard:
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
                await failed_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)
