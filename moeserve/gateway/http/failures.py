"""The frame around every route: failures go out in OpenAI's form, also HTTP's own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from moeserve.errors import (
    RETRIED,
    RETRY_AFTER_S,
    InternalError,
    MoeserveError,
    UnavailableError,
)
from moeserve.gateway.http.access import REASON
from moeserve.gateway.openai.errors import error_body, error_object

log = logging.getLogger(__name__)

Endpoint = Callable[[Request], Awaitable[Response]]


def framed(endpoint: Endpoint) -> Endpoint:
    """The frame around every route: our errors out in OpenAI's form."""

    async def inner(request: Request) -> Response:
        try:
            return await endpoint(request)
        except MoeserveError as error:
            request.scope[REASON] = error.message
            return failed_response(error)
        except HTTPException as error:
            return await plain_response(request, error)
        except ClientDisconnect:
            return Response(status_code=499)
        except asyncio.CancelledError:  # uvicorn closes, and a body is still on its way
            return failed_response(
                UnavailableError("the server stopped: send the request elsewhere")
            )
        except Exception:  # as in Generation: one request fails, not the server
            log.exception("a bug in %s", request.url.path)
            return failed_response(InternalError("internal error; the server's log tells more"))

    return inner


def failed_response(error: MoeserveError) -> Response:
    headers = {"retry-after": str(RETRY_AFTER_S)} if error.http_status in RETRIED else {}
    if error.http_status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(error), error.http_status, headers)


async def plain_response(request: Request, error: Exception) -> Response:
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
