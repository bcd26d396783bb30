"""How fast experts would be read, by the bytes of one: with the mover that serves.

The files of the model itself where there are some, else one of ours that is removed again. Every
size in turn, several times, and the median of its turns counts. A turn submits batches as a layer
does: ``BATCH`` of the records in a stretch of ``STRETCH``, in their order, so that neighbours are
one read. Reads are O_DIRECT; where the file system refuses that, pages are dropped first. Time and
bytes are bounded.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from moeserve.errors import ConfigError
from moeserve.offload.arena import Arena
from moeserve.offload.disk_file import DiskFile
from moeserve.offload.mover import DiskMover, Read, open_mover

BLOCKS = (256 << 10, 1 << 20, 4 << 20)
BATCH, STRETCH = 12, 24
TURNS, TURN_SECONDS = 5, 0.1
DEADLINE_S = 30.0
OWN_BYTES = 128 << 20
# Less than this says nothing about a disk.
LEAST_BYTES = 8 << 20


@contextmanager
def file_to_read(files: Sequence[Path], folder: Path) -> Iterator[Path]:
    """The largest of ``files``, else one that is made in ``folder`` and removed again. Raises
    ConfigError where none can be made or read."""
    large = [file for file in files if file.is_file() and file.stat().st_size >= LEAST_BYTES]
    try:
        if large:
            yield max(large, key=lambda file: file.stat().st_size)
            return
        with tempfile.NamedTemporaryFile(dir=folder) as own:
            piece = os.urandom(1 << 20)
            for _ in range(OWN_BYTES >> 20):
                own.write(piece)
            own.flush()
            os.fsync(own.fileno())
            yield Path(own.name)
    except OSError as error:
        raise ConfigError(
            f"the disk of {folder} cannot be measured: {error.strerror}; free "
            f"{OWN_BYTES >> 20} MiB there"
        ) from error


def disk_rates(file: Path) -> dict[int, float]:
    """Bytes per second by bytes of a record, of which there are two in the file at least. Raises as
    ``DiskFile.open`` and ``DiskMover.wait``."""
    opened, mover, draw = DiskFile.open(file), open_mover(), random.Random(1)
    try:
        counts = {block: opened.nbytes // block for block in BLOCKS}
        arenas = {b: Arena(min(BATCH, count), b) for b, count in counts.items() if count >= 2}
        for arena in arenas.values():  # memory that the system has not given yet would count
            arena.memory.zero_()
        rates = {block: list[float]() for block in arenas}
        for _ in range(TURNS):
            for block, arena in arenas.items():
                rates[block].append(read_rate(mover, opened, arena, draw))
        return {block: median(found) for block, found in rates.items()}
    finally:
        mover.close()
        opened.close()


def read_rate(mover: DiskMover, file: DiskFile, arena: Arena, draw: random.Random) -> float:
    """Of one turn, with records of the arena's size."""
    block = arena.nbytes
    count = file.nbytes // block
    stretch = min(STRETCH, count)
    if file.direct < 0 and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.buffered, 0, 0, os.POSIX_FADV_DONTNEED)
    done, begin = 0, time.perf_counter()
    while (taken := time.perf_counter() - begin) < TURN_SECONDS or not done:
        first = draw.randrange(count - stretch + 1)
        places = sorted(draw.sample(range(first, first + stretch), arena.slots))
        reads = [
            Read(file, place * block, block, arena.address(slot))
            for slot, place in enumerate(places)
        ]
        for ticket in mover.submit(reads):
            mover.wait(ticket, DEADLINE_S)
        done += len(reads) * block
    return done / taken
