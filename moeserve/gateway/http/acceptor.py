"""Takes connections from a listening socket, as many as there may be.

asyncio's own acceptor (tried: 3.11) knows no bound, and where descriptors run out it writes a
traceback for each of the ``backlog`` attempts that it makes, every second. Here another connection
takes the place of one that nobody would miss, where there is such a one; else it waits in the
kernel's queue, and is looked for again a little later.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import Callable
from typing import Any, Protocol

from moeserve.gateway.http.phases import ConnectionPhase, Phases

log = logging.getLogger(__name__)

# Taken in one turn of the loop, so that streams get theirs.
BATCH = 64
RETRY_S = 0.1
HANDSHAKE_S = 10.0
GOODBYE_S = 3.0
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Connection(Protocol):
    """What ``Phases`` hold here."""

    def drop(self) -> None: ...


class _Opening:
    """A connection whose protocol has not heard of it yet."""

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        self.begun = False

    def drop(self) -> None:
        if self.task is not None:
            self.task.cancel()


class Acceptor:
    """Owns the reader of ``listening`` between ``open`` and ``close``. ``tls`` gives the context
    of each new connection, or None; ``most`` is how many there may be. ``protocol`` makes one for
    the key that stands for the connection until then, and takes its place in ``phases``."""

    def __init__(
        self,
        listening: socket.socket,
        protocol: Callable[[object], asyncio.Protocol],
        phases: Phases[Any],
        most: int,
        tls: Callable[[], ssl.SSLContext | None],
    ) -> None:
        self._listening = listening
        self._protocol = protocol
        self._phases = phases
        self._most = most
        self._tls = tls
        self._loop = asyncio.get_running_loop()
        self._retry: asyncio.TimerHandle | None = None
        self.evicted = 0
        listening.setblocking(False)

    def open(self) -> None:
        self._retry = None
        self._loop.add_reader(self._listening.fileno(), self._accept)

    def close(self) -> None:
        """Takes no more; those being opened go on."""
        if self._retry is not None:
            self._retry.cancel()
        elif self._listening.fileno() >= 0:
            self._loop.remove_reader(self._listening.fileno())

    def _accept(self) -> None:
        """For a connection that waits another has to go, and only then: one is taken first, and
        where nobody goes there is one above ``most`` until somebody does."""
        for _ in range(BATCH):
            if len(self._phases) > self._most and not self._evict():
                self._pause()
                return
            try:
                accepted, _ = self._listening.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in _NO_ROOM:
                    log.warning("cannot accept connections: %s", error.strerror)
                    self._evict()
                    self._pause()
                    return
                continue  # this one has gone by itself: others may wait
            if len(self._phases) >= self._most:
                self._evict()
            self._take(accepted)

    def _take(self, accepted: socket.socket) -> None:
        accepted.setblocking(False)
        opening = _Opening()
        self._phases.enter(opening, ConnectionPhase.OPENING, self._loop.time())
        opening.task = self._loop.create_task(self._connect(opening, accepted))
        opening.task.add_done_callback(lambda _: self._opened(opening, accepted))

    def _opened(self, opening: _Opening, accepted: socket.socket) -> None:
        self._phases.leave(opening)
        if not opening.begun:  # else the transport closes it
            accepted.close()

    async def _connect(self, opening: _Opening, accepted: socket.socket) -> None:
        opening.begun = True
        tls = self._tls()
        limits = {"ssl_handshake_timeout": HANDSHAKE_S, "ssl_shutdown_timeout": GOODBYE_S}
        try:
            # asyncio does so for sockets whose protocol is named, and accepted ones name none. Left
            # out, events of a stream wait for the client to acknowledge those before: 40 ms.
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._loop.connect_accepted_socket(
                lambda: self._protocol(opening),
                accepted,
                ssl=tls,
                **({} if tls is None else limits),
            )
        except (OSError, ssl.SSLError) as error:  # strangers that speak no TLS, or have left
            log.debug("a connection was not opened: %s", error)

    def _evict(self) -> bool:
        """Makes room for another; False where everybody is being served."""
        gone: Connection | None = self._phases.least_missed(self._loop.time())
        if gone is None:
            return False
        self.evicted += 1
        log.info("a connection gives way to another: there may be %d", self._most)
        self._phases.leave(gone)
        gone.drop()
        return True

    def _pause(self) -> None:
        self._loop.remove_reader(self._listening.fileno())
        self._retry = self._loop.call_later(RETRY_S, self.open)
