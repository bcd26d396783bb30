"""A line in the log for each HTTP call that the service does not tell of: refused ones at level
info, within a bound, and the others at debug."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moeserve.observe.logs import FIELDS
from moeserve.observe.requests import left_out_field, refusal_bound

log = logging.getLogger("moeserve.access")

# Set in the scope by a response whose request the service makes a record of.
RECORDED = "moeserve.recorded"
# Set in the scope to the message of the error that a call failed with.
REASON = "moeserve.reason"
REFUSED = 400
MAX_PATH_CHARS = 200


class AccessLog:
    """An ASGI application around another. A call that ended without a status has 499: its client
    left."""

    def __init__(self, app: ASGIApp, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._clock = clock
        self._bound = refusal_bound(clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = self._clock(), 499

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            if not scope.get(RECORDED):
                self._tell(scope, status, self._clock() - began)

    def _tell(self, scope: Scope, status: int, took_s: float) -> None:
        refused = status >= REFUSED
        level = logging.INFO if refused else logging.DEBUG
        if not log.isEnabledFor(level):
            return
        fields: dict[str, object] = {
            "method": scope["method"],
            "path": scope["path"][:MAX_PATH_CHARS],
            "status": status,
            "total_s": round(took_s, 6),
        }
        if reason := scope.get(REASON):
            fields["error"] = reason
        if refused:
            if not self._bound.admits():
                return
            fields |= left_out_field(self._bound)
        log.log(level, "http", extra={FIELDS: fields})
