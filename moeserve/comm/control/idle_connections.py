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
import threading
from collections.abc import Callable
from typing import NamedTuple

log = logging.getLogger(__name__)

LOOK_S = 0.25
# Where more of the allowed ones are taken, the idle ones above go.
FULL = 0.75
_DESCRIPTORS = "/proc/self/fd"
# struct tcp_info: milliseconds since data was last sent and received.
_LAST_SENT, _LAST_RECEIVED, _INFO_BYTES = 44, 52, 104


class IdleConnections:
    """Keeps the connections to ``port`` below ``most``. ``busy`` says of a remote port whether it
    is to be left alone, for a call runs from there; ``name`` is of the server, for the log."""

    def __init__(
        self, port: int, most: int, busy: Callable[[int], bool], name: str = "the gRPC door"
    ) -> None:
        self._name = name
        self._port = port
        self._room = max(1, int(most * FULL))
        self._busy = busy
        self.evicted = 0

    async def watch(self) -> None:
        """Looks until it is cancelled."""
        while sys.platform.startswith("linux"):
            await asyncio.sleep(LOOK_S)
            if self._crowded():
                await asyncio.to_thread(self._evict_some)

    def watch_until(self, over: threading.Event) -> None:
        """The same on a thread of its own."""
        while sys.platform.startswith("linux") and not over.wait(LOOK_S):
            if self._crowded():
                self._evict_some()

    def _crowded(self) -> bool:
        """Whether all descriptors together, which are cheap to count, are as many."""
        try:
            return len(os.listdir(_DESCRIPTORS)) > self._room
        except OSError as error:  # none left to look with: there may be some the next time
            log.debug("cannot look at connections: %s", error)
            return False

    def _evict_some(self) -> None:
        try:
            self.evict()
        except OSError as error:
            log.debug("cannot look at connections: %s", error)

    def evict(self) -> None:
        """Shuts down as many as there are too many, those that have been silent longest first."""
        found = [seen for name in os.listdir(_DESCRIPTORS) if (seen := self._look(int(name)))]
        surplus = len(found) - self._room
        if surplus <= 0:
            return
        idle = sorted(seen for seen in found if not self._busy(seen.remote_port))
        for seen in idle[-surplus:]:
            self._shut(seen)
        log.info("idle connections gave way at %s: %d so far", self._name, self.evicted)

    def _look(self, descriptor: int) -> _Seen | None:
        """What one is, where it is a connection to the port. One copy is held at a time."""
        try:
            if not os.readlink(f"{_DESCRIPTORS}/{descriptor}").startswith("socket:"):
                return None
            with _copy_of(descriptor) as copy:
                if copy.family not in (socket.AF_INET, socket.AF_INET6):
                    return None
                if copy.type != socket.SOCK_STREAM or copy.getsockname()[1] != self._port:
                    return None
                return _Seen(_silent_ms(copy), descriptor, int(copy.getpeername()[1]))
        except OSError:  # closed meanwhile, or one that listens
            return None

    def _shut(self, seen: _Seen) -> None:
        with contextlib.suppress(OSError), _copy_of(seen.descriptor) as copy:
            # The number may be another's by now, and the connection may have got a call.
            if (
                copy.getsockname()[1] == self._port
                and copy.getpeername()[1] == seen.remote_port
                and not self._busy(seen.remote_port)
            ):
                copy.shutdown(socket.SHUT_RDWR)
                self.evicted += 1


class _Seen(NamedTuple):
    silent_ms: int
    descriptor: int
    remote_port: int


def _copy_of(descriptor: int) -> socket.socket:
    copy = os.dup(descriptor)
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise


def _silent_ms(connection: socket.socket) -> int:
    """Since the last byte of data in either direction; all the time where there was none."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
    if len(info) < _LAST_RECEIVED + 4:
        return 0
    (sent,) = struct.unpack_from("=I", info, _LAST_SENT)
    (received,) = struct.unpack_from("=I", info, _LAST_RECEIVED)
    return int(min(sent, received))
