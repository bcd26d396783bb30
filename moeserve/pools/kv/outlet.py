"""How the bytes of a frame leave a source: behind the head of a message, or in memory that whoever
fetches has opened to it.

A transport gives room for one frame after the other, and makes the message that goes with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moeserve.pools.kv.digests import Data


@dataclass(frozen=True, slots=True)
class FrameRoom:
    """uint8 [``bytes``] to be written, and the slot that it is, if it is one."""

    out_X: Tensor
    slot: int | None

    def data(self, size: int) -> Data:
        """What goes into the message."""
        return b"" if self.slot is not None else self.out_X[:size].numpy().data


class Outlet(Protocol):
    """Of one call. ``name`` is what bytes are counted by."""

    name: str
    frame_bytes: int

    def room(self) -> AbstractAsyncContextManager[FrameRoom]:
        """To be written and sent within. TimeoutError where whoever fetches frees none."""
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
        self._memory: Tensor | None = None

    @asynccontextmanager
    async def room(self) -> AsyncIterator[FrameRoom]:
        await asyncio.wait_for(self._frames.acquire(), self._wait_s)
        try:
            if self._memory is None:
                self._memory = torch.empty(self.frame_bytes, dtype=torch.uint8)
            yield FrameRoom(self._memory, None)
        finally:
            self._frames.release()

    def freed(self, slot: int) -> None:
        """There are none: passed over."""

    def close(self) -> None: ...
