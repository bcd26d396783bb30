"""What it costs to keep account of experts that are read from disk, beside the reading itself.

The real ``ExpertStream`` over slots of a page each, with reads that are done at once: which experts
are there, which give way, and the waits are as they are where a model is streamed; what is left out
is the disk. Two sizes of steps tell what a layer costs from what a record does.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moeserve.forecast.timing import CallTimer
from moeserve.offload.arena import Arena
from moeserve.offload.disk_file import DiskFile, DiskRegion
from moeserve.offload.experts import ExpertStream
from moeserve.offload.mover import MoverCounts, Read, Ticket
from moeserve.offload.residency import Residency

PAGE = 4096
LAYERS = 8
# Of all experts, those that have a slot.
ROOM = 4


class DoneAtOnce:
    """A ``DiskMover`` whose reads take no time and bring nothing."""

    def submit(self, reads: Sequence[Read], *, ahead: bool = False) -> list[Ticket]:
        return [Ticket(n) for n in range(len(reads))]

    def wait(self, ticket: Ticket, deadline_s: float) -> None: ...

    def promote(self, ticket: Ticket) -> None: ...

    def cancel(self, ticket: Ticket) -> bool:
        return False

    def counts(self) -> MoverCounts:
        return MoverCounts()

    def close(self) -> None: ...


def streaming_seconds(
    experts: int, top_k: int, scratch: Path, timer: CallTimer
) -> tuple[float, float]:
    """Of a layer whose experts are streamed, and of each record that is read for it."""
    few, many = top_k, min(experts, 8 * top_k)
    with tempfile.NamedTemporaryFile(dir=scratch) as own:
        own.truncate(PAGE)
        file = DiskFile.open(Path(own.name))
        try:
            one, records = _of_layer(file, experts, few, timer)
            other, more = _of_layer(file, experts, many, timer)
        finally:
            file.close()
    each = max(0.0, other - one) / (more - records) if more > records else 0.0
    return max(0.0, one - each * records), each


def _of_layer(file: DiskFile, experts: int, chosen: int, timer: CallTimer) -> tuple[float, float]:
    """Seconds and records read of a layer that needs so many experts."""
    slots = max(2 * experts, LAYERS * experts // ROOM)
    regions = {layer: [DiskRegion(file, 0, PAGE)] * experts for layer in range(LAYERS)}
    stream = ExpertStream(
        regions, Arena(slots, PAGE), Residency([experts] * LAYERS, slots), DoneAtOnce()
    )
    draw = random.Random(chosen)

    def step() -> None:
        stream.begin_step()
        for layer in range(LAYERS):
            needed = np.array(sorted(draw.sample(range(experts), chosen)), np.int64)
            for _ in stream.waves(layer, needed, together=True):
                pass

    took = timer.typical(step) / LAYERS
    return took, stream.counts.misses / max(1, stream.counts.layers)
