"""A listening socket, bound before anything is loaded, and the uvicorn that serves an app on it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from moeserve.errors import ConfigError


class HttpServer:
    """Owns a listening socket and the uvicorn that serves it on this loop. Connections get
    ``farewell_s`` to end by themselves when it closes."""

    def __init__(self, app: ASGIApp, host: str, port: int, farewell_s: float) -> None:
        where = address_of(host, port)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family, backlog=1024)
        except OSError as error:
            taken = error.errno in (errno.EADDRINUSE, errno.EACCES)
            raise ConfigError(
                f"http_port={port}: cannot listen on {where} ({error.strerror}): "
                "choose another --http-port, or 0 for any free one"
                if taken
                else f"host={host!r}: cannot listen on {where} ({error.strerror}): "
                "give an address of this machine"
            ) from error
        self.port = int(self._socket.getsockname()[1])
        self._server = _Uvicorn(
            uvicorn.Config(
                app,
                log_config=None,
                log_level="warning",
                access_log=False,
                lifespan="off",
                ws="none",
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=int(farewell_s),
            )
        )
        self._running: asyncio.Task[None] | None = None

    def open(self) -> None:
        self._running = asyncio.create_task(self._server.serve(sockets=[self._socket]))

    def release(self) -> None:
        self._socket.close()

    async def close(self) -> None:
        self._server.should_exit = True
        if self._running is not None:
            await self._running
        self.release()


class _Uvicorn(uvicorn.Server):
    """Leaves the signals to this process's own handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def address_of(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
