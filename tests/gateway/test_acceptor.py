"""What the HTTP door does with a socket that it has accepted."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from moeserve.gateway.http.acceptor import Acceptor
from moeserve.gateway.http.phases import Phases


class Told(asyncio.Protocol):
    def __init__(self, made: asyncio.Future[asyncio.BaseTransport]) -> None:
        self._made = made

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._made.set_result(transport)


async def test_what_is_written_is_sent_at_once() -> None:
    """Or each event of a stream would wait for the client to acknowledge the one before."""
    made: asyncio.Future[asyncio.BaseTransport] = asyncio.get_running_loop().create_future()
    phases: Phases[Any] = Phases({})
    with socket.create_server(("127.0.0.1", 0)) as listening:
        acceptor = Acceptor(listening, lambda key: Told(made), phases, 8, lambda: None)
        acceptor.open()
        with socket.create_connection(listening.getsockname()):
            transport = await asyncio.wait_for(made, 30)
            accepted = transport.get_extra_info("socket")
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
            transport.close()
            await asyncio.sleep(0)
        acceptor.close()
