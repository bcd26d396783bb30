"""A request's body: read within bounds of type, size and time, and parsed as JSON."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request

from moeserve.errors import DeadlineError
from moeserve.gateway.http.protocol import BODY_READ
from moeserve.gateway.json_body import Body
from moeserve.gateway.limits import MAX_BODY_BYTES
from moeserve.gateway.text_work import TextWork

# A client that is slower than this with its body is hung up on.
BODY_S = 60.0


async def read_body(request: Request, texts: TextWork) -> Body:
    """The JSON object sent, within its bounds of type, size and time."""
    try:
        raw = await _read(request)
    finally:
        # Bodies of all requests are bounded together; a server of another kind does not count.
        if (tell := getattr(request.state, BODY_READ, None)) is not None:
            tell()
    return await texts.parse_json(raw)


async def _read(request: Request) -> bytes:
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
    return bytes(raw)
