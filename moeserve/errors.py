"""Every error a user can meet.

::

    MoeserveError                 code (gRPC)          HTTP
    |-- InvalidRequestError       INVALID_ARGUMENT     400
    |   `-- ContextLengthError    INVALID_ARGUMENT     400
    |-- NotFoundError             NOT_FOUND            404
    |-- UnauthenticatedError      UNAUTHENTICATED      401
    |-- ForbiddenError            PERMISSION_DENIED    403
    |-- ExhaustedError            RESOURCE_EXHAUSTED   429
    |-- CancelledError            CANCELLED            499
    |-- DeadlineError             DEADLINE_EXCEEDED    504
    |-- UnavailableError          UNAVAILABLE          503
    |   `-- LateRankError         UNAVAILABLE          503
    |-- DataLossError             DATA_LOSS            500
    |-- InternalError             INTERNAL             500
    |-- ConfigError               (start-up)
    |-- CheckpointError           (start-up)
    |-- PlacementError            (`moeserve place`; start-up with a plan)
    `-- TokenizerError            (start-up; INVALID_ARGUMENT where text needs one)

A message names the value and the remedy. ``param`` names the request field where there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

# HTTP's statuses of what may succeed a little later, and what clients are told to wait.
RETRIED = (429, 503)
RETRY_AFTER_S = 1


class MoeserveError(Exception):
    """Root of the tree; ``code`` is the gRPC status name, ``http_status`` its HTTP twin."""

    code: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequestError(MoeserveError):
    code = "INVALID_ARGUMENT"
    http_status = 400


class ContextLengthError(InvalidRequestError):
    """Prompt and answer are longer than the model allows."""


class NotFoundError(MoeserveError):
    code = "NOT_FOUND"
    http_status = 404


class UnauthenticatedError(MoeserveError):
    code = "UNAUTHENTICATED"
    http_status = 401


class ForbiddenError(MoeserveError):
    """Meant for another host, or sent by a page that may not call."""

    code = "PERMISSION_DENIED"
    http_status = 403


class ExhaustedError(MoeserveError):
    """Queue full, or a request that can never fit in the KV pool."""

    code = "RESOURCE_EXHAUSTED"
    http_status = 429


class CancelledError(MoeserveError):
    code = "CANCELLED"
    http_status = 499


class DeadlineError(MoeserveError):
    code = "DEADLINE_EXCEEDED"
    http_status = 504


class UnavailableError(MoeserveError):
    """Draining or stopped: safe to retry elsewhere."""

    code = "UNAVAILABLE"
    http_status = 503


class LateRankError(UnavailableError):
    """Ranks that did not come within the deadline, or are gone; ``ranks`` names them."""

    def __init__(self, message: str, ranks: Sequence[int]) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class DataLossError(MoeserveError):
    code = "DATA_LOSS"


class InternalError(MoeserveError):
    """A bug of ours, reported without detail to the client and in full to the log."""


class ConfigError(MoeserveError):
    """A setting is wrong; the message names it and what would be right."""

    code = "INVALID_ARGUMENT"
    http_status = 400


class CheckpointError(MoeserveError):
    """A model folder cannot be read; the message names file, tensor or key."""

    code = "FAILED_PRECONDITION"


class PlacementError(MoeserveError):
    """Routing, a plan or a placement problem is wrong; the message names the constraint."""

    code = "INVALID_ARGUMENT"
    http_status = 400


class TokenizerError(MoeserveError):
    """The model folder has no usable tokenizer, and text was asked for."""

    code = "INVALID_ARGUMENT"
    http_status = 400


def first_line(error: Exception) -> str:
    """What a library's error says, for a message of one line; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
