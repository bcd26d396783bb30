"""Connections to other members, by address: shared by all calls to one, closed when unused.

On the event loop's thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc

from moeserve.comm.control.rpc import Trust, open_channel, proof_metadata
from moeserve.errors import InvalidRequestError

# How long a connection stays that nobody uses.
UNUSED_S = 60.0
# Unused ones beyond these are closed at once.
MOST_UNUSED = 64


@dataclass(slots=True)
class _Shared:
    channel: grpc.aio.Channel
    users: int
    since: float


class ChannelPool:
    """To members of the run named ``run``; ``metadata`` goes with every call."""

    def __init__(
        self, trust: Trust, run: bytes, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.metadata = proof_metadata(trust, run)
        self._trust = trust
        self._clock = clock
        self._channels: dict[tuple[str, str], _Shared] = {}

    def __len__(self) -> int:
        return len(self._channels)

    @asynccontextmanager
    async def use(self, address: str, server_name: str) -> AsyncIterator[grpc.aio.Channel]:
        """A connection to ``host:port``. InvalidRequestError where that is no address."""
        host, port = split_address(address)
        shared = self._channels.get((address, server_name))
        if shared is None:
            channel = open_channel(host, port, self._trust, server_name)
            shared = self._channels[address, server_name] = _Shared(channel, 0, 0.0)
        shared.users += 1
        try:
            yield shared.channel
        finally:
            shared.users -= 1
            shared.since = self._clock()
            await asyncio.shield(self._close_unused())

    async def close(self) -> None:
        """All of them, used or not."""
        channels, self._channels = [s.channel for s in self._channels.values()], {}
        await asyncio.gather(*(channel.close() for channel in channels))

    async def _close_unused(self) -> None:
        unused = sorted(
            (shared.since, key) for key, shared in self._channels.items() if not shared.users
        )
        before = self._clock() - UNUSED_S
        most = len(unused) - MOST_UNUSED
        old = [key for i, (since, key) in enumerate(unused) if since < before or i < most]
        channels = [self._channels.pop(key).channel for key in old]
        await asyncio.gather(*(channel.close() for channel in channels))


def split_address(address: str) -> tuple[str, int]:
    """Of ``host:port``, where an IPv6 host may stand in brackets."""
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise InvalidRequestError(f"{address[:80]!r} is no address: expected host:port")
    return host.strip("[]"), int(port)
