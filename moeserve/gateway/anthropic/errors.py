"""Failures as Anthropic writes them."""

from __future__ import annotations

from moeserve.errors import MoeserveError
from moeserve.gateway.openai.errors import Json

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def anthropic_error(message: str, status: int) -> Json:
    """The body of an answer with this status, and the event that ends a stream."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


def anthropic_failure(error: MoeserveError) -> Json:
    return anthropic_error(error.message, error.http_status)
