"""A file of weights that is read while a model is served, and must stay as it was when opened.

Size, times and inode of the open file are those of ``open``, or reading on is an error: they are
asked for after every batch of reads, before its bytes are used. A change that keeps the size and
sets the time back is found by the digests of regions, which ``check`` compares.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import xxhash

from moeserve.errors import CheckpointError, DataLossError

# Linux has it; elsewhere files are read through the page cache.
_DIRECT = getattr(os, "O_DIRECT", 0)


@dataclass(frozen=True, slots=True)
class DiskFile:
    """``direct`` is a descriptor that reads past the page cache, or -1; ``buffered`` one that does
    not. Both belong to the object until ``close``."""

    path: Path
    direct: int
    buffered: int
    nbytes: int
    _known: tuple[int, int, int] = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> Self:
        """CheckpointError for what is no readable regular file."""
        try:
            buffered = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from error
        known = _identity(buffered)
        if not stat.S_ISREG(os.fstat(buffered).st_mode):
            os.close(buffered)
            raise CheckpointError(f"{path}: is no regular file")
        try:
            direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC | _DIRECT) if _DIRECT else -1
        except OSError:  # this file system has none
            direct = -1
        if direct >= 0 and _identity(direct) != known:
            os.close(buffered)
            os.close(direct)
            raise CheckpointError(f"{path}: is being replaced while it is opened; start again")
        return cls(path, direct, buffered, known[0], known)

    def require_unchanged(self) -> None:
        """DataLossError where it is not the file that was opened, or not as it was."""
        now = _identity(self.buffered)
        if now != self._known:
            raise DataLossError(
                f"{self.path}: changed while it was served (size {self._known[0]} and now "
                f"{now[0]}, time {self._known[1]} and now {now[1]} ns): what is in memory and what "
                "is read again are of two files; start again"
            )

    def require_digest(self, data: memoryview, offset: int, digest: bytes) -> None:
        """DataLossError unless ``data``, which was read at ``offset``, has this XXH3-128."""
        found = xxhash.xxh3_128(data).digest()
        if found != digest:
            raise DataLossError(
                f"{self.path}: {len(data)} bytes at {offset} have the digest {found.hex()}, and "
                f"were written with {digest.hex()}: the file is damaged; make it again"
            )

    def close(self) -> None:
        os.close(self.buffered)
        if self.direct >= 0:
            os.close(self.direct)


@dataclass(frozen=True, slots=True)
class DiskRegion:
    """Where bytes lie; ``digest`` is their XXH3-128, or empty where none was written."""

    file: DiskFile
    offset: int
    nbytes: int
    digest: bytes = b""


def _identity(descriptor: int) -> tuple[int, int, int]:
    """Size, time of the last change, inode."""
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns, found.st_ino
