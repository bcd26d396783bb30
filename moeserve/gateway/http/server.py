"""A listening socket, bound before anything is loaded, and uvicorn's protocol that serves an app on
it, within bounds of time, number and bytes.

uvicorn parses HTTP and runs the app; connections are accepted here (``acceptor``), and end here
where they keep the server waiting (``phases``).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import socket
import ssl
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.server import ServerState

from moeserve.errors import ConfigError, DeadlineError
from moeserve.gateway.http.acceptor import HANDSHAKE_S, Acceptor
from moeserve.gateway.http.body import BODY_S
from moeserve.gateway.http.log_rate import LogRate
from moeserve.gateway.http.phases import ConnectionPhase, Phases
from moeserve.gateway.http.protocol import GuardedProtocol

IDLE_S = 75.0
HEAD_S = 10.0
# Beyond what the application itself gives a body, for it answers better.
BODY_LIMIT_S = BODY_S + 5.0
STALLED_S = 60.0
LEAVING_S = 5.0
SWEEP_S = 0.5
MAX_CONNECTIONS = 8192
_LOGGERS = ("uvicorn.error", "asyncio", "moeserve.gateway.http.acceptor")


def no_tls() -> ssl.SSLContext | None:
    return None


class HttpServer:
    """Owns a listening socket and all connections that came in by it. They get ``farewell_s`` to
    end by themselves when it closes. ``tls`` gives what new connections are encrypted with."""

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        port: int,
        farewell_s: float,
        *,
        max_connections: int = MAX_CONNECTIONS,
        idle_s: float = IDLE_S,
        tls: Callable[[], ssl.SSLContext | None] = no_tls,
    ) -> None:
        self._socket = _listen(host, port)
        self.port = int(self._socket.getsockname()[1])
        self._loop = asyncio.get_running_loop()
        self.phases: Phases[Any] = Phases(
            {
                ConnectionPhase.OPENING: HANDSHAKE_S,
                ConnectionPhase.IDLE: idle_s,
                ConnectionPhase.HEAD: HEAD_S,
                ConnectionPhase.BODY: BODY_LIMIT_S,
                ConnectionPhase.STALLED: STALLED_S,
                ConnectionPhase.LEAVING: LEAVING_S,
            }
        )
        config = uvicorn.Config(
            app,
            http=GuardedProtocol,
            log_config=None,
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=int(idle_s) + 1,  # ours comes before
            timeout_graceful_shutdown=int(farewell_s),
        )
        self._server = _Uvicorn(config)
        protocol = functools.partial(
            _connection, config, self._server.server_state, self.phases, self._loop
        )
        self._acceptor = Acceptor(self._socket, protocol, self.phases, max_connections, tls)
        self._log_rate = LogRate(_LOGGERS)
        self._running: asyncio.Task[None] | None = None
        self._sweeping: asyncio.Task[None] | None = None

    @property
    def evicted(self) -> int:
        """Connections that gave way to others."""
        return self._acceptor.evicted

    def open(self) -> None:
        self._log_rate.open()
        self._running = asyncio.create_task(self._server.serve(sockets=[]))
        self._sweeping = asyncio.create_task(self._sweep())
        self._acceptor.open()

    def release(self) -> None:
        self._socket.close()

    async def close(self) -> None:
        if self._running is not None and self._sweeping is not None:
            self._acceptor.close()
            self._server.should_exit = True
            await self._running
            self._sweeping.cancel()
            await asyncio.wait({self._sweeping})
            for connection in list(self._server.server_state.connections):
                connection.transport.abort()
            self._log_rate.close()
        self.release()

    async def _sweep(self) -> None:
        """Ends connections whose phase has lasted too long."""
        while True:
            await asyncio.sleep(SWEEP_S)
            for connection, phase in list(self.phases.late(self._loop.time())):
                if phase is ConnectionPhase.BODY:
                    connection.end(DeadlineError(f"the body did not arrive in {BODY_LIMIT_S:g} s"))
                else:
                    connection.drop()


def _connection(
    config: uvicorn.Config,
    state: ServerState,
    phases: Phases[Any],
    loop: asyncio.AbstractEventLoop,
    opening: object,
) -> GuardedProtocol:
    return GuardedProtocol(
        opening, phases, loop.time, config=config, server_state=state, app_state={}, _loop=loop
    )


def _listen(host: str, port: int) -> socket.socket:
    where = address_of(host, port)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        taken = error.errno in (errno.EADDRINUSE, errno.EACCES)
        raise ConfigError(
            f"http_port={port}: cannot listen on {where} ({error.strerror}): "
            "choose another --http-port, or 0 for any free one"
            if taken
            else f"host={host!r}: cannot listen on {where} ({error.strerror}): "
            "give an address of this machine"
        ) from error


class _Uvicorn(uvicorn.Server):
    """Leaves the signals to this process's own handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def address_of(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
