"""How fast a folder's weights are read here: from the kernel's memory, where they lie in it, else
from the disk. ``SAMPLES`` pieces over all of its weight files are read, as they lie, for
``SAMPLE_S`` at most; so a file that is in memory in part counts in part.
"""

from __future__ import annotations

import time
from pathlib import Path

from moeserve.errors import CheckpointError
from moeserve.models.files import open_regular
from moeserve.models.fingerprint import served_files

SAMPLES = 16
SAMPLE_BYTES = 2 << 20
SAMPLE_S = 0.5
# So fast that asking elsewhere gains nothing: bytes per second.
IN_MEMORY = 2.5e9


def reading_rate(folder: Path) -> float:
    """Bytes per second. CheckpointError where they cannot be read."""
    try:
        files = [(file, file.stat().st_size) for file in served_files(folder)]
        step = max(1, sum(nbytes for _, nbytes in files) // SAMPLES)
        came, began = 0, time.perf_counter()
        for file, nbytes in files:
            with open_regular(file) as opened:
                for start in range(0, nbytes, step):
                    opened.seek(start)
                    came += len(opened.read(SAMPLE_BYTES))
                    if time.perf_counter() - began > SAMPLE_S:
                        break
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error}") from error
    return came / max(time.perf_counter() - began, 1e-9)
