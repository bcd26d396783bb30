"""KV by memory that two processes of one host share: slots that a source writes to and whoever
fetches reads from, without copies in between.

Whoever fetches makes the memory, which has no name: it is offered as a descriptor of this process,
which another one of the same user opens through ``/proc``. A random cookie at its beginning tells
whether what was opened there is it; on another host, or in another container, it is not, and the
bytes then come in messages. The memory cannot shrink, so what is mapped can be touched.

Neither side believes the other's numbers: slots and sizes are checked against what was mapped.
Memory whose call did not end well is not used again, for a source that was too late may still write
to it.

::

    cookie 32 B, 0; filled u64, 0; freed u64, 0, up to HEADER_BYTES; slot 0; slot 1; ...

The two words count frames of ``flow``, and begin at 64 and 128.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import mmap
import os
import secrets
import stat
import threading
from collections import OrderedDict, deque
from collections.abc import Callable

import numpy as np
import torch

from moeserve.errors import InvalidRequestError
from moeserve.pb import kv_pb2 as pb
from moeserve.pools.kv.outlet import FrameRoom

HEADER_BYTES = mmap.PAGESIZE
COOKIE_BYTES = 32
FILLED_AT, FREED_AT = 64, 128
MOST_SLOTS = 64
MOST_SLOT_BYTES = 64 << 20
# Between two looks for frames that are not read yet.
SETTLE_S = 0.0005
# Memory up to this is mapped whole when it is opened.
MOST_POPULATED = 64 << 20

_NAME = "moeserve-kv"
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class SlotViews:
    """``slots`` of ``slot_bytes`` in a map, from the byte ``first`` on."""

    def __init__(self, mapped: mmap.mmap, first: int, slots: int, slot_bytes: int) -> None:
        self.slots, self.slot_bytes = slots, slot_bytes
        self._map = mapped
        self._first = first

    def slot(self, number: int) -> memoryview:
        """To be read before the map is closed. InvalidRequestError where there is no such slot."""
        if not 0 <= number < self.slots:
            raise InvalidRequestError(f"slot {number}: there are {self.slots}")
        return memoryview(_place(self._map, number, self.slot_bytes, self._first)).cast("B")


class SlotMemory(SlotViews):
    """Of whoever fetches: ``slots`` of ``slot_bytes`` each. OSError where there is no memory."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self._cookie = secrets.token_bytes(COOKIE_BYTES)
        size = HEADER_BYTES + slots * slot_bytes
        self._fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, size)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
            mapped = mmap.mmap(self._fd, size)
        except BaseException:
            os.close(self._fd)
            raise
        super().__init__(mapped, HEADER_BYTES, slots, slot_bytes)
        self._map[:COOKIE_BYTES] = self._cookie
        self._filled, self._freed = _word(self._map, FILLED_AT), _word(self._map, FREED_AT)
        self.frames = 0  # of flows, that were read

    def filled_frames(self) -> int:
        """As the source says."""
        return int(self._filled.value)

    def free_frame(self) -> None:
        """The next is read."""
        self.frames += 1
        self._freed.value = self.frames

    def offer(self) -> pb.Memory:
        return pb.Memory(
            pid=os.getpid(),
            fd=self._fd,
            cookie=self._cookie,
            slots=self.slots,
            slot_bytes=self.slot_bytes,
        )

    def close(self) -> None:
        self._map.close()
        os.close(self._fd)


class SlotMemories:
    """Memories for the calls of one process, ``most`` at a time; those whose calls ended well are
    used again, but for more than ``spare``."""

    def __init__(self, slots: int, slot_bytes: int, most: int, spare: int = 2) -> None:
        self._shape = slots, slot_bytes
        self._most, self._most_spare = most, spare
        self._spare: list[SlotMemory] = []
        self._lent = 0

    def take(self) -> SlotMemory | None:
        """None where so many are in use, or there is no memory."""
        if self._lent >= self._most:
            return None
        try:
            found = self._spare.pop() if self._spare else SlotMemory(*self._shape)
        except OSError:
            return None
        self._lent += 1
        return found

    def give(self, memory: SlotMemory, *, again: bool) -> None:
        self._lent -= 1
        if again and len(self._spare) < self._most_spare:
            self._spare.append(memory)
        else:
            memory.close()

    def close(self) -> None:
        while self._spare:
            self._spare.pop().close()


class MemoryOutlet:
    """Of a source: an ``Outlet`` into the memory of whoever fetches."""

    name = "memory"

    def __init__(
        self,
        mapped: mmap.mmap,
        slots: int,
        slot_bytes: int,
        wait_s: float,
        give: Callable[[], None] | None = None,
    ) -> None:
        self.frame_bytes = self.slot_bytes = slot_bytes
        self.slots = slots
        self._filled, self._freed = _word(mapped, FILLED_AT), _word(mapped, FREED_AT)
        self._flowed = self._freed.value  # frames of flows, those before this call among them
        self._give = give
        self._map = mapped
        self._free = deque(range(slots))
        self._taken: set[int] = set()
        self._wait_s = wait_s
        self._some = asyncio.Event()

    @property
    def full(self) -> bool:
        return not self._free

    def freed_frames(self) -> int:
        """As whoever fetches says."""
        return int(self._freed.value)

    def fill(self, frames: int) -> None:
        """So many are filled in all."""
        self._filled.value = frames

    def slot_of(self, frame: int) -> torch.Tensor:
        """uint8 [``slot_bytes``]: where a frame of a flow belongs."""
        place = _place(self._map, frame % self.slots, self.slot_bytes)
        return torch.frombuffer(place, dtype=torch.uint8)

    async def begin_flow(self, frames: int) -> int:
        """The number of its first frame, when nothing else is in a slot."""
        async with asyncio.timeout(self._wait_s):
            while self._taken:
                self._some.clear()
                await self._some.wait()
            await self._settle()
        first, self._flowed = self._flowed, self._flowed + frames
        return first

    async def _settle(self) -> None:
        """Until all frames of flows are read."""
        while self.freed_frames() < self._flowed:  # noqa: ASYNC110 - a word of another process
            await asyncio.sleep(SETTLE_S)

    async def take(self, head_size: int, size: int) -> FrameRoom:
        async with asyncio.timeout(self._wait_s):
            await self._settle()
            while not self._free:
                self._some.clear()
                await self._some.wait()
        slot = self._free.popleft()
        self._taken.add(slot)
        place = _place(self._map, slot, self.slot_bytes)
        return FrameRoom(torch.frombuffer(place, dtype=torch.uint8)[:size], slot)

    async def deliver(self, room: FrameRoom) -> None:
        """It is there already."""

    def give(self, room: FrameRoom) -> None:
        """It is free when whoever fetches says so."""

    def freed(self, slot: int) -> None:
        if slot not in self._taken:
            raise InvalidRequestError(f"slot {slot} is freed, which was not in use")
        self._taken.remove(slot)
        self._free.append(slot)
        self._some.set()

    def close(self) -> None:
        """Behind all that writes: what was given as room is memory no more, or ``give`` has it."""
        if self._give is not None:
            self._give()
        else:
            self._map.close()


class OpenedMemories:
    """Of a source: memories of others that it has mapped. Whoever fetches offers the same one call
    after the other, and mapping costs as much as copying: those of calls that are over are kept,
    ``most`` of them, the last that were used. For any thread."""

    def __init__(self, most: int = 2) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[bytes, int, int], mmap.mmap] = OrderedDict()
        self._closed = False

    def __len__(self) -> int:
        return len(self._kept)

    def open(self, offered: pb.Memory, least: int, wait_s: float) -> MemoryOutlet | None:
        """As ``open_memory``."""
        key = offered.cookie, offered.slots, offered.slot_bytes
        with self._lock:
            mapped = self._kept.pop(key, None)
        if mapped is None:
            mapped = map_memory(offered, least)
        if mapped is None:
            return None
        found = mapped
        return MemoryOutlet(
            found, offered.slots, offered.slot_bytes, wait_s, lambda: self._keep(key, found)
        )

    def _keep(self, key: tuple[bytes, int, int], mapped: mmap.mmap) -> None:
        with self._lock:
            old = self._kept.pop(key, None)
            self._kept[key] = mapped
            gone = [] if old is None else [old]
            while len(self._kept) > (0 if self._closed else self._most):
                gone.append(self._kept.popitem(last=False)[1])
        for one in gone:
            one.close()

    def close(self) -> None:
        """What calls still have is unmapped when they are over."""
        with self._lock:
            self._closed = True
            kept, self._kept = list(self._kept.values()), OrderedDict()
        for one in kept:
            one.close()


def _word(mapped: mmap.mmap, at: int) -> ctypes.c_uint64:
    """As ``_place``, a word of the header."""
    return ctypes.c_uint64.from_address(np.frombuffer(mapped, np.uint8).ctypes.data + at)


def _place(
    mapped: mmap.mmap, slot: int, slot_bytes: int, first: int = HEADER_BYTES
) -> ctypes.Array[ctypes.c_ubyte]:
    """Not bound to the map, which could not be closed as long as somebody refers to it: the mover
    closes it behind all that uses it."""
    start = np.frombuffer(mapped, np.uint8).ctypes.data + first
    return (ctypes.c_ubyte * slot_bytes).from_address(start + slot * slot_bytes)


def open_memory(offered: pb.Memory, least: int, wait_s: float) -> MemoryOutlet | None:
    """Of a process of this host; None where it cannot be had, or has slots of fewer than ``least``
    bytes."""
    mapped = map_memory(offered, least)
    if mapped is None:
        return None
    return MemoryOutlet(mapped, offered.slots, offered.slot_bytes, wait_s)


def map_memory(offered: pb.Memory, least: int) -> mmap.mmap | None:
    slots, slot_bytes = offered.slots, offered.slot_bytes
    sound = 0 < slots <= MOST_SLOTS and least <= slot_bytes <= MOST_SLOT_BYTES
    if not sound or len(offered.cookie) != COOKIE_BYTES:
        return None
    path, size = f"/proc/{offered.pid}/fd/{offered.fd}", HEADER_BYTES + slots * slot_bytes
    try:
        if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
            return None
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        found = os.fstat(fd)
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        if not (stat.S_ISREG(found.st_mode) and sealed and found.st_size >= size):
            return None
        # Pages at once, which cost as much as the copies where each is asked for by a fault.
        populate = mmap.MAP_POPULATE if size <= MOST_POPULATED else 0
        mapped = mmap.mmap(fd, size, flags=mmap.MAP_SHARED | populate)
    except (OSError, ValueError):
        return None
    finally:
        os.close(fd)
    if not secrets.compare_digest(mapped[:COOKIE_BYTES], offered.cookie):
        mapped.close()
        return None
    return mapped
