"""Memory that several processes of one host have: a file without a name, part after part.

The process that makes it gives the descriptor to those that it starts (``Popen(pass_fds=...)``);
each maps the parts in the same order, by their sizes. Once sealed it cannot be made shorter or
longer, so nobody's map can end. It is gone when the last process that has it is.
"""

from __future__ import annotations

import mmap
import os
import weakref

import torch
from torch import Tensor

from moeserve.errors import InternalError


class SharedMemory:
    """Owns the descriptor ``fd``, also where nobody closes it; tensors keep their maps. Bytes that
    were never written are 0."""

    def __init__(self, fd: int, *, grows: bool) -> None:
        self.fd = fd
        self._end = weakref.finalize(self, os.close, fd)
        self.nbytes = 0  # of the parts that were taken
        self._grows = grows

    @staticmethod
    def exists() -> bool:
        """Whether this system has such memory: Linux does."""
        return hasattr(os, "memfd_create")

    @classmethod
    def make(cls, name: str) -> SharedMemory:
        """``name`` is what /proc/PID/maps shows."""
        return cls(os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), grows=True)

    @classmethod
    def of(cls, fd: int) -> SharedMemory:
        """What another process has made and sealed."""
        return cls(fd, grows=False)

    def take(self, nbytes: int) -> Tensor:
        """The next part, uint8. InternalError where whoever made it has not so many bytes."""
        start, size = self.nbytes, max(1, nbytes)
        stop = start + -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        if self._grows:
            os.ftruncate(self.fd, stop)
        elif stop > os.fstat(self.fd).st_size:
            have = os.fstat(self.fd).st_size
            raise InternalError(f"{stop} bytes of shared memory are wanted, there are {have}")
        self.nbytes = stop
        return torch.frombuffer(mmap.mmap(self.fd, size, offset=start), dtype=torch.uint8)[:nbytes]

    def seal(self) -> None:
        """No part comes any more."""
        import fcntl  # not everywhere, as memory like this

        self._grows = False
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)

    def require_all_taken(self) -> None:
        """InternalError where parts are left, so that some were taken otherwise than made."""
        have = os.fstat(self.fd).st_size
        if self.nbytes != have:
            raise InternalError(f"{self.nbytes} bytes of shared memory are known, there are {have}")

    def close(self) -> None:
        """Tensors stay; may be called again."""
        self._end()
