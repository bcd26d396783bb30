"""One HTTP connection: uvicorn's, which tells what it waits for, and ends where it is told to.

uvicorn limits neither how long a head or a body may take, nor what a client may leave unread, nor
how many connect. ``GuardedProtocol`` adds no parsing: after whatever happens it looks at uvicorn's
state, and says in which phase (``phases``) the connection is now.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from moeserve.errors import RETRY_AFTER_S, MoeserveError, UnavailableError
from moeserve.gateway.http.phases import ConnectionPhase, Phases
from moeserve.gateway.openai.errors import error_body

# Bytes of bodies on their way in, and of answers that nobody reads, on all connections together.
MAX_HELD_BYTES = 256 * 2**20
# The key in a request's state of what is called when its body is no longer held.
BODY_READ = "body_read"


class GuardedProtocol(H11Protocol):
    """``phases`` and ``clock`` are shared by all connections of a server; ``opening`` stands for
    this one in ``phases`` until it is made."""

    def __init__(
        self, opening: object, phases: Phases[Any], clock: Callable[[], float], /, **uvicorns: Any
    ) -> None:
        super().__init__(**uvicorns)
        self._opening = opening
        self._phases = phases
        self._clock = clock
        self._counted: object = None  # the request of which so many bytes came
        self._body_bytes = 0
        self.app_state = {**self.app_state, BODY_READ: self._body_read}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._phases.leave(self._opening)
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        self._phases.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not self._counted:
            self._counted, self._body_bytes = self.cycle, 0
        self._body_bytes += len(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._look()

    def drop(self) -> None:
        """Ends the connection now; what has not been sent is lost."""
        self.transport.abort()

    def end(self, error: MoeserveError) -> None:
        """Answers with ``error`` where the request has had no answer yet, and ends."""
        cycle = self.cycle
        if cycle is None or cycle.response_started or self.conn.our_state is not h11.SEND_RESPONSE:
            self.drop()
            return
        body = json.dumps(error_body(error)).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"retry-after", str(RETRY_AFTER_S).encode()),
            (b"connection", b"close"),
        ]
        response = h11.Response(status_code=error.http_status, headers=headers)
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        # Whoever reads the body hears that the client has gone.
        cycle.disconnected = cycle.response_started = cycle.response_complete = True
        cycle.message_event.set()
        cycle.body = bytearray()
        self.flow.resume_reading()
        self._look()

    def _body_read(self) -> None:
        """The application has made something else of the body."""
        self._body_bytes = 0
        self._look()

    def _look(self) -> None:
        """Says what the connection is at now, and how many bytes are held for it; where those of
        all are too many, somebody has to go."""
        if self.transport.is_closing() and self not in self._phases:
            return
        self._phases.enter(self, self._phase(), self._clock())
        self._phases.hold(self, self._held())
        while self._phases.held_bytes > MAX_HELD_BYTES and self._make_room() is not self:
            pass

    def _phase(self) -> ConnectionPhase:
        cycle = self.cycle
        if self.transport.is_closing():
            return ConnectionPhase.LEAVING
        receiving = self.conn.their_state is h11.SEND_BODY
        if cycle is not None and not cycle.response_complete:
            if receiving:
                return ConnectionPhase.BODY
            return ConnectionPhase.STALLED if self.flow.write_paused else ConnectionPhase.ANSWERING
        if receiving or self.conn.our_state in (h11.MUST_CLOSE, h11.CLOSED, h11.ERROR):
            return ConnectionPhase.LEAVING
        if self.flow.write_paused:
            return ConnectionPhase.STALLED
        return ConnectionPhase.HEAD if self.conn.trailing_data[0] else ConnectionPhase.IDLE

    def _held(self) -> int:
        unread = self.transport.get_write_buffer_size() if self.flow.write_paused else 0
        if self.cycle is None or self.cycle.response_complete:
            return unread
        return unread + self._body_bytes

    def _make_room(self) -> GuardedProtocol:
        """Ends whoever has kept us waiting longest with what is held for it, or this one."""
        victim: GuardedProtocol = self._phases.most_waited_for(self._clock()) or self
        full = UnavailableError("too many bytes are on their way to this server: try again shortly")
        victim.end(full)
        self._phases.hold(victim, 0)
        return victim
