"""Memory in huge pages: what is read whole in every step is read at the memory's own pace.

With pages of 4 KiB a few megabytes of weights are more pages than a core knows the places of, and
of each that it does not know it has to look that up before it reads the first byte.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from moeserve.kernels.cpu import _cpu

HUGE_PAGE = 2 << 20
# Small pieces lie together in so many bytes, each on a cache line of its own.
SHARED, LINE = 4 * HUGE_PAGE, 64


def empty_bytes(nbytes: int) -> Tensor:
    """Untouched memory, in huge pages where it is large."""
    if nbytes < HUGE_PAGE:
        return torch.empty(nbytes, dtype=torch.uint8)
    whole = torch.empty(nbytes + HUGE_PAGE, dtype=torch.uint8)
    skip = -whole.data_ptr() % HUGE_PAGE
    data = whole[skip : skip + nbytes]
    _cpu.use_huge_pages(data.data_ptr(), nbytes)
    return data


class SharedPages:
    """Gives out pieces of memory that small ones share huge pages for. What they lie in is freed
    when the last of its pieces is; until then it is not given out again. Any thread may ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free = torch.empty(0, dtype=torch.uint8)

    def take(self, nbytes: int) -> Tensor:
        """Untouched memory, uint8 [nbytes]."""
        if nbytes >= HUGE_PAGE:
            return empty_bytes(nbytes)
        taken = -(-nbytes // LINE) * LINE
        with self._lock:
            if taken > len(self._free):
                self._free = empty_bytes(SHARED)
            piece, self._free = self._free[:nbytes], self._free[taken:]
        return piece
