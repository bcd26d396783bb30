"""How fast a file is read past the page cache, by the size of a read.

The files of the model itself where there are some, else one of ours that is removed again. Reads
are O_DIRECT, in order, by two threads that take blocks in turn. Where the file system refuses that,
pages are dropped first and reads are usual ones. Time and bytes are bounded.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

from moeserve.errors import ConfigError
from moeserve.models.files import open_regular

BLOCKS = (256 << 10, 1 << 20, 4 << 20)
READERS = 2
SECONDS = 0.4
OWN_BYTES = 128 << 20
ALIGNED = 4096
# Less than this says nothing about a disk.
LEAST_BYTES = 8 << 20


def disk_rates(files: Sequence[Path], folder: Path) -> dict[int, float]:
    """Bytes per second by bytes of a read: of the largest of ``files``, else of a file made in
    ``folder``; nothing where it cannot be measured."""
    large = [file for file in files if file.is_file() and file.stat().st_size >= LEAST_BYTES]
    try:
        if large:
            return rates_of(max(large, key=lambda file: file.stat().st_size))
        with tempfile.NamedTemporaryFile(dir=folder) as own:
            piece = os.urandom(1 << 20)
            for _ in range(OWN_BYTES >> 20):
                own.write(piece)
            own.flush()
            os.fsync(own.fileno())
            return rates_of(Path(own.name))
    except OSError as error:
        raise ConfigError(
            f"the disk of {folder} cannot be measured: {error.strerror}; free "
            f"{OWN_BYTES >> 20} MiB there"
        ) from error


def rates_of(file: Path) -> dict[int, float]:
    with open_regular(file) as opened:
        direct = open_direct(file)
        descriptor = opened.fileno() if direct is None else direct
        try:
            size = os.fstat(descriptor).st_size
            return {
                block: read_rate(descriptor, size, block, n, direct=direct is not None)
                for n, block in enumerate(BLOCKS)
                if block * READERS <= size
            }
        finally:
            if direct is not None:
                os.close(direct)


def open_direct(file: Path) -> int | None:
    """None where the file system refuses."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return None
    descriptor = -1
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | flag)
        with mmap.mmap(-1, ALIGNED) as page:
            os.preadv(descriptor, [page], 0)
    except OSError:
        if descriptor >= 0:
            os.close(descriptor)
        return None
    return descriptor


def read_rate(descriptor: int, size: int, block: int, start: int, *, direct: bool) -> float:
    """Of all readers together. Each size of a block begins elsewhere in the file, so that it does
    not read what a device has just cached."""
    blocks = size // block
    if not direct and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    first = blocks * start // len(BLOCKS)
    turns, end = count(), time.perf_counter() + SECONDS

    def read(_: int) -> int:
        done = 0
        with mmap.mmap(-1, block) as buffer:
            while time.perf_counter() < end:
                turn = next(turns)
                if turn >= blocks:
                    break
                done += os.preadv(descriptor, [buffer], (first + turn) % blocks * block)
        return done

    begin = time.perf_counter()
    with ThreadPoolExecutor(READERS) as pool:
        done = sum(pool.map(read, range(READERS)))
    return max(1, done) / (time.perf_counter() - begin)
