"""How long a call's message may take to arrive, and how many are on their way at once.

gRPC buffers a message of any call until it is whole, and knows no limit of time: a few thousand
calls that never end theirs would hold as much memory as they like. So no more than ``slots`` are
read at a time; where others wait, one that has taken longer than ``CONTENDED_S`` has to go.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from moeserve.errors import DeadlineError, InvalidRequestError

SLOTS = 32
READ_S = 60.0
CONTENDED_S = 2.0


class MessageReads:
    """Owns the slots; on one loop."""

    def __init__(self, slots: int = SLOTS) -> None:
        self._free = asyncio.Semaphore(slots)
        self._reading: dict[asyncio.Timeout, float] = {}  # and since when
        self._waiting = 0

    async def first(self, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        """The only message of a unary request. DeadlineError where it did not come in time."""
        if self._free.locked():
            await self._wait()
        else:
            await self._free.acquire()
        try:
            return await self._read(context)
        finally:
            self._free.release()

    async def _wait(self) -> None:
        self._waiting += 1
        if self._waiting == 1:
            for limit, began in self._reading.items():
                limit.reschedule(began + CONTENDED_S)
        try:
            await self._free.acquire()
        finally:
            self._waiting -= 1

    async def _read(self, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        limit_s = CONTENDED_S if self._waiting else READ_S
        try:
            async with asyncio.timeout(limit_s) as limit:
                self._reading[limit] = asyncio.get_running_loop().time()
                try:
                    message = await context.read()
                finally:
                    del self._reading[limit]
        except TimeoutError as late:
            raise DeadlineError("the message did not arrive in time: send it at once") from late
        if message is grpc.aio.EOF:
            raise InvalidRequestError("the call has no message: send one")
        return message
