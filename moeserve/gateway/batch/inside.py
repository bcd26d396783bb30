"""One request of an ASGI application in this process: what a client would send over a socket."""

from __future__ import annotations

import asyncio
import json

from starlette.types import ASGIApp, Message, Scope

from moeserve.errors import InternalError
from moeserve.gateway.batch.answers import Answer

_JSON = b"application/json"


async def post(app: ASGIApp, path: str, body: bytes) -> Answer:
    """The answer to a JSON body, which is JSON itself. Who cancels this hangs up."""
    unsent: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    status, headers = 0, {}
    parts: list[bytes] = []

    async def receive() -> Message:
        if unsent:
            return unsent.pop()
        await asyncio.Event().wait()  # this client stays until it is cancelled
        raise AssertionError("nothing sets it")

    async def send(message: Message) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status, headers = message["status"], dict(message.get("headers", ()))
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))

    await app(_scope(path, len(body)), receive, send)
    content = b"".join(parts)
    if not headers.get(b"content-type", b"").startswith(_JSON):
        raise InternalError(f"{path} answered {status} without JSON")
    if b"\n" in content or b"\r" in content:  # between values: texts have them escaped
        content = json.dumps(json.loads(content)).encode()
    return Answer(status, headers.get(b"x-request-id", b"").decode("latin-1"), content)


def _scope(path: str, length: int) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", _JSON), (b"content-length", b"%d" % length)],
        "client": None,
        "server": None,
        "state": {},
    }
