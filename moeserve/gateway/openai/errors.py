"""Failures as OpenAI writes them."""

from __future__ import annotations

from typing import Any

from moeserve.errors import ContextLengthError, MoeserveError

Json = dict[str, Any]

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def error_body(error: MoeserveError) -> Json:
    kind = _TYPES.get(error.http_status)
    if kind is None:
        kind = "invalid_request_error" if error.http_status < 500 else "server_error"
    too_long = isinstance(error, ContextLengthError)  # clients shorten the prompt by this code
    code = "context_length_exceeded" if too_long else error.code.lower()
    return error_object(error.message, kind, code, error.param)


def error_object(message: str, kind: str, code: str, param: str | None = None) -> Json:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
