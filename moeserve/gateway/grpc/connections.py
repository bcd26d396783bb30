"""Connections of gRPC that nobody uses give way to others.

gRPC bounds how many there may be (``grpc.max_allowed_incoming_connections``), and then refuses new
ones: whoever comes first and stays silent keeps everybody out. It does not let go of idle ones, nor
tell of them; but the kernel does. So before the bound is reached those sockets of this process that
belong to the port, have no running call, and over which nothing has gone for longest are shut down,
which to gRPC is a client that has left.

Needs Linux (``/proc/self/fd``, ``TCP_INFO``); elsewhere the bound and the limits of time remain.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)

LOOK_S = 0.25
# Where more of the allowed ones are taken, the idle ones above go.
FULL = 0.75
_DESCRIPTORS = "/proc/self/fd"
# struct tcp_info: milliseconds since data was last sent and received.
_LAST_SENT, _LAST_RECEIVED, _INFO_BYTES = 44, 52, 104


class IdleConnections:
    """Keeps the connections to ``port`` below ``most``. ``busy`` says of a remote port whether a
    call runs from there."""

    def __init__(self, port: int, most: int, busy: Callable[[int], bool]) -> None:
        self._port = port
        self._room = max(1, int(most * FULL))
        self._busy = busy
        self.evicted = 0

    async def watch(self) -> None:
        """Looks until it is cancelled."""
        if not sys.platform.startswith("linux"):
            return
        while True:
            await asyncio.sleep(LOOK_S)
            # All descriptors together are counted first, which is cheap.
            if len(os.listdir(_DESCRIPTORS)) > self._room:
                await asyncio.to_thread(self.evict)

    def evict(self) -> None:
        """Shuts down as many as there are too many, those that have been silent longest first."""
        with contextlib.ExitStack() as stack:
            found = [stack.enter_context(s) for s in _connections(self._port)]
            surplus = len(found) - self._room
            if surplus <= 0:
                return
            idle = [s for s in found if not self._busy(_remote_port(s))]
            idle.sort(key=_silent_ms, reverse=True)
            for connection in idle[:surplus]:
                with contextlib.suppress(OSError):  # it has just left by itself
                    connection.shutdown(socket.SHUT_RDWR)
                    self.evicted += 1
        log.info("idle connections gave way at the gRPC door: %d so far", self.evicted)


def _connections(port: int) -> Iterator[socket.socket]:
    """Copies of this process's connected sockets of that local port."""
    for name in os.listdir(_DESCRIPTORS):
        try:
            if not os.readlink(f"{_DESCRIPTORS}/{name}").startswith("socket:"):
                continue
            copy = os.dup(int(name))
        except OSError:
            continue  # closed meanwhile
        try:
            found = socket.socket(fileno=copy)
        except OSError:
            os.close(copy)
            continue
        if found.family in (socket.AF_INET, socket.AF_INET6) and found.type & socket.SOCK_STREAM:
            with contextlib.suppress(OSError):
                if found.getsockname()[1] == port and found.getpeername():
                    yield found
                    continue
        found.close()


def _remote_port(connection: socket.socket) -> int:
    try:
        return int(connection.getpeername()[1])
    except OSError:
        return -1


def _silent_ms(connection: socket.socket) -> int:
    """Since the last byte of data in either direction; all the time where there was none."""
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
    except OSError:
        return 0
    if len(info) < _LAST_RECEIVED + 4:
        return 0
    (sent,) = struct.unpack_from("=I", info, _LAST_SENT)
    (received,) = struct.unpack_from("=I", info, _LAST_RECEIVED)
    return int(min(sent, received))
