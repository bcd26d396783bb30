"""Experts on their way to a device, whose kernels and copies run when they please: in each of their
two orders, and as marks say, but otherwise in any."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeserve.errors import DataLossError, DeadlineError
from moeserve.offload.arena import Arena, DeviceArena
from moeserve.offload.device_mover import DeviceMover, HostSlots
from moeserve.offload.disk_file import DiskFile, DiskRegion
from moeserve.offload.experts import ExpertStream
from moeserve.offload.mover import MoverCounts, PlainMover, Read, Ticket
from moeserve.offload.residency import Residency

COUNTS, NBYTES = (4, 0, 5, 3), 128
ALL = sum(COUNTS)


@dataclass
class Queues:
    """``DeviceCopies`` of a device that runs what was launched, and what was copied, when
    ``chance`` has it. A place in a queue is a mark to reach or to wait for, or work."""

    chance: random.Random
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    kernels: list[Any] = field(default_factory=list)
    copied: list[Any] = field(default_factory=list)
    reached: set[int] = field(default_factory=set)
    marks: int = 0
    pinned: int = 0

    def pin(self, memory: Tensor) -> None:
        self.pinned += memory.nbytes

    def unpin(self, memory: Tensor) -> None:
        self.pinned -= memory.nbytes

    def _mark(self, queue: list[Any]) -> int:
        self.marks += 1
        queue.append(("reach", self.marks))
        return self.marks

    def launched(self) -> int:
        return self._mark(self.kernels)

    def launch(self, work: Callable[[], None]) -> None:
        self.kernels.append(("do", work))

    def copy(self, source: Tensor, target: Tensor, after: int) -> int:
        self.copied += [("await", after), ("do", lambda: target.copy_(source))]
        return self._mark(self.copied)

    def need(self, mark: int) -> None:
        self.kernels.append(("await", mark))

    def done(self, mark: int) -> bool:
        self.run(self.chance.randrange(6))
        return mark in self.reached

    def finish(self, mark: int, deadline_s: float) -> None:
        while mark not in self.reached:
            assert self.run(1), "nothing can go on"

    def run(self, most: int) -> bool:
        """At most so many places; whether there was one."""
        ran = False
        for _ in range(most):
            open_ = [q for q in (self.kernels, self.copied) if q and self._may(q[0])]
            if not open_:
                break
            what, value = self.chance.choice(open_).pop(0)
            ran = True
            if what == "do":
                value()
            elif what == "reach":
                self.reached.add(value)
        return ran

    def _may(self, place: tuple[str, Any]) -> bool:
        return place[0] != "await" or place[1] in self.reached


class Slow(PlainMover):
    """Its reads are done when ``chance`` has it, or as they are waited for in earnest."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self._chance = chance
        self.waits = 0

    def wait(self, ticket: Ticket, deadline_s: float) -> None:
        if deadline_s == 0 and self._chance.random() < 0.6:
            raise DeadlineError("late")
        self.waits += deadline_s > 0
        super().wait(ticket, deadline_s)

    def counts(self) -> MoverCounts:
        return replace(super().counts(), waits=self.waits)

    def cancel(self, ticket: Ticket) -> bool:
        if self._chance.random() < 0.5:
            return False
        del self._open[ticket]
        return True


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiskFile]:
    path = tmp_path_factory.mktemp("records") / "experts.bin"
    path.write_bytes(np.random.default_rng(4).integers(0, 256, ALL * NBYTES, np.uint8).tobytes())
    os.utime(path, (1, 1))
    opened = DiskFile.open(path)
    yield opened
    opened.close()


def regions_of(file: DiskFile) -> dict[int, list[DiskRegion]]:
    starts = iter(range(0, ALL * NBYTES, NBYTES))
    return {
        l: [DiskRegion(file, next(starts), NBYTES) for _ in range(count)]
        for l, count in enumerate(COUNTS)
        if count
    }


@contextmanager
def stream_over(
    file: DiskFile, slots: int, host_slots: int, disk: PlainMover, copies: Any
) -> Iterator[tuple[ExpertStream, DeviceMover]]:
    regions = regions_of(file)
    host = HostSlots(regions, Arena(host_slots, NBYTES))
    arena = DeviceArena(slots, NBYTES, torch.device("cpu"))
    mover = DeviceMover(host, arena, disk, copies)
    below = (host.residency,)
    yield ExpertStream(regions, arena, Residency(COUNTS, slots), mover, below=below), mover
    mover.close()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 30), slots=st.integers(2, ALL), host_slots=st.integers(1, ALL))
def test_no_kernel_reads_a_slot_before_or_after_its_expert_is_there(
    file: DiskFile, seed: int, slots: int, host_slots: int
) -> None:
    """For any room on device and host, any choices, read ahead or not, and any order of work."""
    chance, read, wrong = random.Random(seed), [0], list[tuple[int, int]]()
    queues, content = Queues(chance), np.fromfile(file.path, np.uint8)
    starts = np.concatenate(([0], np.cumsum(COUNTS))) * NBYTES
    disk = Slow(chance)
    with stream_over(file, slots, host_slots, disk, queues) as (stream, mover):
        memory = stream.arena.memory.numpy()

        def kernel(layer: int, places: list[tuple[int, int]]) -> None:
            for expert, slot in places:
                start = starts[layer] + expert * NBYTES
                held = memory[slot * NBYTES : (slot + 1) * NBYTES]
                if not np.array_equal(held, content[start : start + NBYTES]):
                    wrong.append((layer, expert))
                read[0] += 1

        wanted = asked = 0
        for _ in range(4):
            stream.begin_step()
            for layer, count in enumerate(COUNTS):
                if not count:
                    continue
                needed = np.array(sorted(chance.sample(range(count), chance.randint(1, count))))
                wanted += len(needed)
                with closing(stream.waves(layer, needed, together=chance.random() < 0.7)) as waves:
                    for n, wave in enumerate(waves):
                        following = (layer + 1) % len(COUNTS)
                        if n == 0 and COUNTS[following] and chance.random() < 0.7:
                            few = chance.sample(range(COUNTS[following]), 2)
                            stream.read_ahead(following, np.array(sorted(few)), layer)
                            asked += len(few)
                        at = stream.residency.slot_LE[layer, wave].tolist()
                        places = list(zip(wave.tolist(), at, strict=True))
                        queues.launch(lambda l=layer, p=places: kernel(l, p))  # type: ignore[misc]
                        queues.run(chance.randrange(4))
        copied, moved = mover.copied, mover.counts()
        assert mover.host.residency.slots == host_slots
        assert copied.copied_bytes == copied.copies * NBYTES
        assert copied.from_host <= copied.copies <= copied.from_host + moved.reads
        assert copied.copies <= stream.counts.misses + asked
        assert moved.waits == disk.waits
    while queues.run(1):
        pass
    assert not queues.kernels and not queues.copied and not queues.pinned
    assert read[0] == wanted and not wrong


def test_a_host_with_room_for_all_reads_each_expert_once(file: DiskFile) -> None:
    """And one with less reads some of them again."""
    reads = []
    for host_slots in (ALL, 3):
        queues = Queues(random.Random(3))
        with stream_over(file, 5, host_slots, PlainMover(), queues) as (stream, mover):
            for _ in range(3):
                stream.begin_step()
                for layer in (0, 2, 3):
                    for _wave in stream.waves(layer, np.arange(COUNTS[layer]), together=True):
                        queues.run(100)
            assert mover.copied.copies > ALL
            assert (mover.copied.host_evictions > 0) == (host_slots < ALL)
            reads.append(mover.counts().reads)
            assert stream.counts.evictions > 0
    assert reads[0] == ALL < reads[1]


def test_what_cannot_be_read_fails_once_and_is_read_again(file: DiskFile) -> None:
    """Also where a digest is not that of what was read; its host slot is free again."""

    class Failing(PlainMover):
        left = 2

        def _fault(self, read: Read) -> DataLossError | None:
            self.left -= 1
            return DataLossError("a bad sector") if self.left >= 0 else super()._fault(read)

    queues = Queues(random.Random(1))
    with stream_over(file, 4, 2, Failing(), queues) as (stream, mover):
        for _ in range(2):
            with pytest.raises(DataLossError, match="bad sector"):
                list(stream.waves(0, np.array([1]), together=True))
            assert mover.host.residency.free == 2 and stream.residency.free == 4
        list(stream.waves(0, np.array([1]), together=True))
        regions = regions_of(file)
        wrong = {**regions, 3: [replace(r, digest=b"0" * 16) for r in regions[3]]}
        mover.host.regions = wrong
        with pytest.raises(DataLossError, match="the digest"):
            list(stream.waves(3, np.array([0]), together=True))
        assert (stream.residency.slot_LE[3] == -1).all()
