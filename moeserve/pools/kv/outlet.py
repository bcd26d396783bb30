"""How the bytes of a frame leave a source: behind the head of a message, or in memory that whoever
fetches has opened to it.

A transport gives room for one frame after the other, and makes the message that goes with it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from moeserve.pools.kv.frames import FramePlace


@dataclass(frozen=True, slots=True)
class FrameRoom:
    """``data_X``, uint8 [size], is to be written: in the slot of that number, or in the message
    ``place``."""

    data_X: Tensor
    slot: int | None = None
    place: FramePlace | None = None


class Outlet(Protocol):
    """Of one call. ``name`` is what bytes are counted by."""

    name: str
    frame_bytes: int

    @property
    def full(self) -> bool:
        """Whether there is no room now."""
        ...

    async def take(self, head_size: int, size: int) -> FrameRoom:
        """To be written, sent, and given back. TimeoutError where whoever fetches frees none. A
        head of ``head_size`` bytes is sent with it."""
        ...

    async def deliver(self, room: FrameRoom) -> None:
        """It is written, and its message will be sent. TimeoutError, UnavailableError."""
        ...

    def give(self, room: FrameRoom) -> None:
        """It is sent, or will never be."""
        ...

    def freed(self, slot: int) -> None:
        """Whoever fetches has read it. InvalidRequestError where it had nothing to read there."""
        ...

    def close(self) -> None: ...


class MessageOutlet:
    """Bytes in messages; ``frames`` bounds how many are made at a time, of all calls."""

    name = "grpc"

    def __init__(self, frames: asyncio.Semaphore, frame_bytes: int, wait_s: float) -> None:
        self.frame_bytes = frame_bytes
        self._frames = frames
        self._wait_s = wait_s

    @property
    def full(self) -> bool:
        return self._frames.locked()

    async def take(self, head_size: int, size: int) -> FrameRoom:
        async with asyncio.timeout(self._wait_s):
            await self._frames.acquire()
        place = FramePlace(head_size, size)
        return FrameRoom(place.data_X, place=place)

    async def deliver(self, room: FrameRoom) -> None:
        """With the message."""

    def give(self, room: FrameRoom) -> None:
        self._frames.release()

    def freed(self, slot: int) -> None:
        """There are none: passed over."""

    def close(self) -> None: ...
