"""KV by Mooncake's transfer engine (package ``mooncake-transfer-engine``, or its build without
CUDA), over TCP between hosts: the source writes into memory that whoever fetches has registered.

The engine moves bytes and nothing else: which runs lie in a slot, and that it is free again, is
said in messages of the call as with shared memory, and the bytes have their digests. Members
negotiate it: both must have been started with it, otherwise KV comes in messages.

Its port asks nobody who they are, and whoever reaches it can write to registered memory: it is for
networks of one's own. A write that is late cannot be called back, so memory of a call that did not
end well is never used again, and never unmapped; there are ``MOST_REGIONS`` on each side.

ConfigError where the package is not there, or its engine does not start.
"""

from __future__ import annotations

import asyncio
import importlib
import mmap
import threading
from collections import deque
from typing import Any, Protocol

import numpy as np
import torch

from moeserve.errors import ConfigError, InvalidRequestError, UnavailableError
from moeserve.pb import kv_pb2 as pb
from moeserve.pools.kv.memory import MOST_SLOT_BYTES, MOST_SLOTS, SlotViews
from moeserve.pools.kv.mover import Mover
from moeserve.pools.kv.outlet import FrameRoom

MOST_REGIONS = 16
_PACKAGE = "mooncake.engine"
_SESSION_CHARS = 256


class _Engine(Protocol):
    """What is used of ``mooncake.engine.TransferEngine``; 0 is good."""

    def register_memory(self, address: int, size: int, /) -> int: ...

    def unregister_memory(self, address: int, /) -> int: ...

    def transfer_sync_write(
        self, session: str, address: int, peer_address: int, size: int, /
    ) -> int: ...


class RegisteredSlots(SlotViews):
    """Memory that the engine may read and write; a source's, or that of whoever fetches."""

    def __init__(self, engine: _Engine, session: str, slots: int, slot_bytes: int) -> None:
        size = slots * slot_bytes
        self._session = session
        super().__init__(mmap.mmap(-1, size), 0, slots, slot_bytes)
        self.address: int = np.frombuffer(self._map, np.uint8).ctypes.data
        if engine.register_memory(self.address, size):
            self._map.close()
            raise OSError(f"{size} bytes were not registered with Mooncake's engine")
        self._engine = engine

    def offer(self) -> pb.Registered:
        return pb.Registered(
            session=self._session,
            address=self.address,
            slots=self.slots,
            slot_bytes=self.slot_bytes,
        )

    def close(self) -> None:
        self._engine.unregister_memory(self.address)
        self._map.close()


class Mooncake:
    """The engine of this process, which others reach as ``host``. For one event loop."""

    def __init__(self, host: str) -> None:
        try:
            made: Any = importlib.import_module(_PACKAGE).TransferEngine()
        except ImportError as error:
            raise ConfigError(
                f"kv_transport='mooncake': {error}: pip install 'moeserve[mooncake]', and the "
                "system's libibverbs1, libnl-3-200 and libnl-route-3-200"
            ) from error
        if made.initialize(host, "P2PHANDSHAKE", "tcp", ""):
            raise ConfigError(f"kv_transport='mooncake': its engine does not start on {host!r}")
        self._engine: _Engine = made
        self._session = f"{host}:{made.get_rpc_port()}"
        self._writer = Mover("kv-mooncake")
        self._lock = threading.Lock()
        self._spare: dict[tuple[int, int], list[RegisteredSlots]] = {}
        self._lost: list[RegisteredSlots] = []  # which a late write may still reach
        self._made = 0

    def take(self, slots: int, slot_bytes: int) -> RegisteredSlots | None:
        """None where there are as many as may be, or there is no memory. For any thread."""
        with self._lock:
            if spare := self._spare.get((slots, slot_bytes)):
                return spare.pop()
            if self._made >= MOST_REGIONS:
                return None
            self._made += 1
        try:
            return RegisteredSlots(self._engine, self._session, slots, slot_bytes)
        except OSError:
            with self._lock:
                self._made -= 1
            return None

    def give(self, slots: RegisteredSlots, *, again: bool) -> None:
        key = slots.slots, slots.slot_bytes
        with self._lock:
            (self._spare.setdefault(key, []) if again else self._lost).append(slots)

    def outlet(self, offered: pb.Registered, least: int, wait_s: float) -> MooncakeOutlet | None:
        """None where what is offered makes no sense, or there is no memory here."""
        slots, slot_bytes = offered.slots, offered.slot_bytes
        sound = 0 < slots <= MOST_SLOTS and least <= slot_bytes <= MOST_SLOT_BYTES
        if not sound or not 0 < len(offered.session) <= _SESSION_CHARS:
            return None
        own = self.take(slots, slot_bytes)
        return None if own is None else MooncakeOutlet(self, own, offered, wait_s)

    async def write(self, session: str, address: int, peer_address: int, size: int) -> int:
        """What the engine says of it; on a thread of its own, one write after the other."""
        return await self._writer.run(
            self._engine.transfer_sync_write, session, address, peer_address, size
        )

    def later(self, slots: RegisteredSlots) -> None:
        """Behind all writes, they are as new."""
        self._writer.later(self.give, slots, again=True)

    def close(self) -> None:
        """When no call is under way."""
        self._writer.close()
        for spare in self._spare.values():
            for slots in spare:
                slots.close()
        self._spare.clear()


class MooncakeOutlet:
    """Of a source: an ``Outlet`` into what whoever fetches has registered, slot by slot."""

    name = "mooncake"

    def __init__(
        self, engine: Mooncake, own: RegisteredSlots, offered: pb.Registered, wait_s: float
    ) -> None:
        self.frame_bytes = own.slot_bytes
        self._engine = engine
        self._own = own
        self._session, self._address = offered.session, offered.address
        self._free = deque(range(own.slots))
        self._taken: set[int] = set()
        self._wait_s = wait_s
        self._some = asyncio.Event()

    @property
    def full(self) -> bool:
        return not self._free

    async def take(self, head_size: int, size: int) -> FrameRoom:
        async with asyncio.timeout(self._wait_s):
            while not self._free:
                self._some.clear()
                await self._some.wait()
        slot = self._free.popleft()
        self._taken.add(slot)
        view = self._own.slot(slot)
        return FrameRoom(torch.frombuffer(view, dtype=torch.uint8)[:size], slot)

    async def deliver(self, room: FrameRoom) -> None:
        assert room.slot is not None, "room of another outlet"
        at = room.slot * self._own.slot_bytes
        async with asyncio.timeout(self._wait_s):
            failed = await self._engine.write(
                self._session, self._own.address + at, self._address + at, len(room.data_X)
            )
        if failed:
            raise UnavailableError(f"Mooncake's engine did not reach {self._session}: {failed}")

    def give(self, room: FrameRoom) -> None:
        """It is free when whoever fetches says so."""

    def freed(self, slot: int) -> None:
        if slot not in self._taken:
            raise InvalidRequestError(f"slot {slot} is freed, which was not in use")
        self._taken.remove(slot)
        self._free.append(slot)
        self._some.set()

    def close(self) -> None:
        """Behind all that writes to it."""
        self._engine.later(self._own)
