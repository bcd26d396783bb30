"""What the headers of a request say of the exchange that it belongs to.

``x-request-id``: what a client or proxy calls its request comes back with the answer.

It names the exchange, not the sequences that are made for it: two requests may have the same. Where
there is none, or one that is no short printable text, the answer has a new one.

``traceparent``: the span that the client's own request is; see ``observe.spans``.
"""

from __future__ import annotations

import secrets

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moeserve.gateway.limits import MAX_ID_CHARS
from moeserve.observe.spans import serve_trace

NAME = b"x-request-id"
TRACE = b"traceparent"


class RequestIds:
    """Around an application: every answer has the header, also those that refuse."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = b""
        for name, value in scope["headers"]:
            if name == NAME:
                given = given or value
            elif name == TRACE:
                serve_trace(value.decode("latin-1"))
        own = given if _is_short_text(given) else f"req-{secrets.token_hex(12)}".encode()

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (NAME, own)]}
            await send(message)

        await self._app(scope, receive, send_named)


def _is_short_text(value: bytes) -> bool:
    return 1 <= len(value) <= MAX_ID_CHARS and all(0x21 <= byte <= 0x7E for byte in value)
