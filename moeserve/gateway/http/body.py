"""A request's body: read within bounds of type, size and time, and parsed as JSON.

``null`` is the same as absent, as OpenAI has it.
"""

from __future__ import annotations

import asyncio
import json
from typing import NoReturn

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request

from moeserve.errors import DeadlineError, InvalidRequestError
from moeserve.gateway.http.protocol import BODY_READ
from moeserve.gateway.limits import MAX_BODY_BYTES
from moeserve.gateway.openai.fields import Body

# A client that is slower than this with its body is hung up on.
BODY_S = 60.0


async def read_body(request: Request) -> Body:
    """The JSON object sent, within its bounds of type, size and time."""
    try:
        return await _read(request)
    finally:
        # Bodies of all requests are bounded together; a server of another kind does not count.
        if (tell := getattr(request.state, BODY_READ, None)) is not None:
            tell()


async def _read(request: Request) -> Body:
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
    return parse_json(bytes(raw))


def parse_json(raw: bytes) -> Body:
    """A JSON object; NaN and infinities are no JSON."""
    try:
        body = json.loads(raw.decode(), parse_constant=_no_constant)
        if b"\\u" in raw:  # an escape can spell half of a surrogate pair, which is no text
            json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError("the body is not Unicode: it has a lone surrogate") from error
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"the body is not UTF-8 (byte {error.start}): send JSON in UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"the body is not JSON: {error}"[:300]) from error
    if not isinstance(body, dict):
        raise InvalidRequestError(f"the body is a JSON {type(body).__name__}, expected an object")
    return {name: value for name, value in body.items() if value is not None}


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
