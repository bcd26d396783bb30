"""Memory that is read into: whole pages of its own, in huge ones where the system has them.

It is taken from the system as it is first written to, and given back with the last reference.
``DeviceArena`` has the same slots in the memory of a device.
"""

from __future__ import annotations

import mmap
from typing import Any, Protocol

import torch
from torch import Tensor

from moeserve.kernels.host_copy import to_host
from moeserve.kernels.wire import MOST_SLOTS


class Pages:
    """``nbytes`` from a page on."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._mapping.madvise(mmap.MADV_HUGEPAGE)
        self.memory: Tensor = torch.frombuffer(self._mapping, dtype=torch.uint8)
        self.address = self.memory.data_ptr()
        self.data = memoryview(self._mapping)


class ExpertSlots(Protocol):
    """``slots`` places of ``nbytes`` each, in ``memory``."""

    slots: int
    nbytes: int
    memory: Tensor

    def address(self, slot: int) -> int: ...

    def data(self, slot: int, nbytes: int) -> memoryview:
        """The first bytes of a slot, as they are now."""
        ...


class Arena:
    """``slots`` places of ``nbytes`` each."""

    def __init__(self, slots: int, nbytes: int) -> None:
        assert 0 < slots <= MOST_SLOTS, slots
        self.slots, self.nbytes = slots, nbytes
        self._pages = Pages(slots * nbytes)
        self.memory = self._pages.memory

    def address(self, slot: int) -> int:
        return self._pages.address + slot * self.nbytes

    def data(self, slot: int, nbytes: int) -> memoryview:
        """The first bytes of a slot."""
        return self._pages.data[slot * self.nbytes : slot * self.nbytes + nbytes]


class DeviceArena:
    """``slots`` places of ``nbytes`` each on a device. Nothing is written to it but by copies."""

    def __init__(self, slots: int, nbytes: int, device: torch.device) -> None:
        assert 0 < slots <= MOST_SLOTS, slots
        self.slots, self.nbytes = slots, nbytes
        self.memory = torch.empty(slots * nbytes, dtype=torch.uint8, device=device)

    def address(self, slot: int) -> int:
        return self.memory.data_ptr() + slot * self.nbytes

    def data(self, slot: int, nbytes: int) -> memoryview:
        """A copy of the first bytes of a slot, for which the host waits."""
        array: Any = to_host(self.place(self.address(slot), nbytes))
        return memoryview(array)

    def place(self, address: int, nbytes: int) -> Tensor:
        """The bytes from an address on, which is that of a slot."""
        start = address - self.memory.data_ptr()
        assert start % self.nbytes == 0 and 0 <= start < self.memory.nbytes, address
        return self.memory[start : start + nbytes]
