"""How much slower products are while the disk is read, and reading while they run.

The mover that serves reads records of a file into slots that are free again at once, while products
run one after the other with all threads; before and after that, each by itself. Several looks, of
products that read their weights and of such that compute with them; the median counts.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from statistics import median

import torch

from moeserve.errors import DeadlineError
from moeserve.forecast.kernels import random_matrix
from moeserve.kernels.ops import Ops
from moeserve.offload.arena import Arena
from moeserve.offload.disk_file import DiskFile
from moeserve.offload.model.overlap import Beside
from moeserve.offload.mover import DiskMover, Read, Ticket, open_mover

RECORD = 1 << 20
# Reads that are under way, and slots for them.
UNDER_WAY = 32
LOOKS, LOOK_SECONDS, DEADLINE_S = 6, 0.2, 30.0
# Products: of few and of many rows, with so many matrices in turn, of this size.
ROWS, MATRICES, SIZE = (1, 64), 16, 2048


class BackgroundReads:
    """Reads records of a file, as many at once as there are slots; counts their bytes."""

    def __init__(self, mover: DiskMover, file: DiskFile) -> None:
        self._mover, self._file, self._draw = mover, file, random.Random(1)
        self._arena = Arena(UNDER_WAY, RECORD)
        self._arena.memory.zero_()  # memory that the system has not given yet would count
        self._free = list(range(UNDER_WAY))
        self._open: list[tuple[Ticket, int]] = []
        self.bytes = 0

    def go_on(self, deadline_s: float) -> None:
        """Begins reads into free slots, and looks which have ended, or waits for one."""
        places = self._file.nbytes // RECORD
        reads = [
            Read(self._file, self._draw.randrange(places) * RECORD, RECORD, self._arena.address(s))
            for s in self._free
        ]
        if reads:
            tickets = self._mover.submit(reads, ahead=True)
            self._open += zip(tickets, self._free, strict=True)
            self._free = []
        with suppress(DeadlineError):
            while self._open:
                self._end(deadline_s)
                deadline_s = 0.0

    def end(self) -> None:
        while self._open:
            self._end(DEADLINE_S)

    def _end(self, deadline_s: float) -> None:
        ticket, slot = self._open[0]
        self._mover.wait(ticket, deadline_s)
        self._open.pop(0)
        self._free.append(slot)
        self.bytes += RECORD


def beside_reading(file: Path, ops: Ops) -> Beside:
    """Raises as ``DiskFile.open`` and ``DiskMover.wait``."""
    opened, mover = DiskFile.open(file), open_mover()
    try:
        reader, found = BackgroundReads(mover, opened), list[tuple[float, float]]()
        products = [product_of(ops, rows) for rows in ROWS]
        for _ in range(LOOKS):
            read = speeds(None, reader)[1]
            for product in products:
                alone = speeds(product, None)[0]
                both = speeds(product, reader)
                found.append((both[0] / alone, both[1] / read))
        return Beside.of(*(median(column) for column in zip(*found, strict=True)))
    finally:
        mover.close()
        opened.close()


def product_of(ops: Ops, rows: int) -> Callable[[], object]:
    one = random_matrix("int8", SIZE, SIZE)
    turn, x_TK = cycle([ops.pack_linear(one) for _ in range(MATRICES)]), torch.randn(rows, SIZE)
    return lambda: ops.linear(x_TK, next(turn))


def speeds(
    product: Callable[[], object] | None, reader: BackgroundReads | None
) -> tuple[float, float]:
    """Calls and bytes per second, while either or both go on."""
    calls, before = 0, 0 if reader is None else reader.bytes
    began = time.perf_counter()
    while (taken := time.perf_counter() - began) < LOOK_SECONDS:
        if reader is not None:
            reader.go_on(0.0 if product is not None else DEADLINE_S)
        if product is not None:
            product()
            calls += 1
    done = 0 if reader is None else reader.bytes - before
    if reader is not None:
        reader.end()
    return calls / taken, done / taken
