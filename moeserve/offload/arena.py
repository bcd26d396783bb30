"""Memory that is read into: whole pages of its own, in huge ones where the system has them.

It is taken from the system as it is first written to, and given back with the last reference.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

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
