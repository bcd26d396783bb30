"""Bytes come from disk as they are there, or with an error that says what is wrong; the native
mover does what its twin does."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.errors import CheckpointError, DataLossError, DeadlineError, ExhaustedError
from moeserve.offload.disk_file import DiskFile, DiskRegion
from moeserve.offload.mover import PAGE, DiskMover, NativeMover, Read
from moeserve.offload.native import native_half

Noise = Callable[[int], tuple[Path, bytes]]
WAIT_S = 30.0


class Memory:
    """On a page, to read into."""

    def __init__(self, nbytes: int) -> None:
        self._mapping = mmap.mmap(-1, nbytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))

    def data(self, start: int, nbytes: int) -> bytes:
        return self._mapping[start : start + nbytes]


@contextmanager
def opened(path: Path) -> Iterator[DiskFile]:
    file = DiskFile.open(path)
    yield file
    file.close()


def read_all(mover: DiskMover, file: DiskFile, places: Sequence[tuple[int, int]]) -> list[bytes]:
    """What lies at each (offset, nbytes), into memory that begins on a page for each."""
    starts = [0]
    for _, nbytes in places:
        starts.append(starts[-1] + -(-nbytes // PAGE) * PAGE)
    memory = Memory(starts[-1] + PAGE)
    reads = [
        Read(file, offset, nbytes, memory.address + start)
        for (offset, nbytes), start in zip(places, starts, strict=False)
    ]
    half = len(reads) // 2
    tickets = mover.submit(reads[half:], ahead=True)
    tickets = mover.submit(reads[:half]) + tickets
    for ticket in tickets[::2]:
        mover.promote(ticket)
    for ticket in reversed(tickets):
        mover.wait(ticket, WAIT_S)
    return [memory.data(start, nbytes) for (_, nbytes), start in zip(places, starts, strict=False)]


def test_what_is_read_is_what_is_there(mover: DiskMover, noise: Noise) -> None:
    path, data = noise((9 << 20) + 5000)
    places = [
        (0, PAGE),
        (PAGE, 3 * PAGE),  # follows the one before
        (4 * PAGE, 9 << 20),  # more than a call takes, and ends where no page does
        (1, 77),
        (len(data) - 10, 10),
        (2 * PAGE, 2 * PAGE),
    ]
    places = [(offset, min(nbytes, len(data) - offset)) for offset, nbytes in places]
    with opened(path) as file:
        found = read_all(mover, file, places)
        assert found == [data[offset : offset + nbytes] for offset, nbytes in places]
    counts = mover.counts()
    assert counts.bytes == sum(nbytes for _, nbytes in places)
    assert counts.reads == len(places)


@settings(max_examples=25)
@given(data=st.data())
def test_random_reads_of_both_movers_are_those_of_the_file(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    module, reason = native_half()
    if module is None:
        pytest.skip(reason)
    size = data.draw(st.integers(1, 40 * PAGE))
    path = tmp_path_factory.getbasetemp() / "random-reads.bin"
    path.write_bytes(content := os.urandom(size))
    offsets = st.one_of(
        st.integers(0, size - 1), st.integers(0, (size - 1) // PAGE).map(lambda p: p * PAGE)
    )
    places = []
    for _ in range(data.draw(st.integers(1, 12))):
        offset = data.draw(offsets)
        left = size - offset
        whole = st.integers(1, max(1, left // PAGE)).map(lambda p, left=left: min(p * PAGE, left))
        places.append((offset, data.draw(st.one_of(st.integers(1, left), whole))))
    native = NativeMover(module)
    with opened(path) as file:
        found = read_all(native, file, places)
    native.close()
    assert found == [content[offset : offset + nbytes] for offset, nbytes in places]


def test_reads_that_follow_each_other_are_one_call(noise: Noise) -> None:
    module, reason = native_half()
    if module is None:
        pytest.skip(reason)
    path, data = noise(32 * PAGE)
    mover = NativeMover(module, threads=1)
    with opened(path) as file:
        found = read_all(mover, file, [(2 * i * PAGE, 2 * PAGE) for i in range(16)])
    counts = mover.counts()
    mover.close()
    assert b"".join(found) == data
    assert counts.reads == 16
    assert counts.calls < 16, "at most the thread took one before the others came"


def test_whole_pages_are_read_past_the_page_cache(noise: Noise) -> None:
    module, reason = native_half()
    if module is None:
        pytest.skip(reason)
    path, data = noise(64 * PAGE)
    mover = NativeMover(module)
    with opened(path) as file:
        if file.direct < 0:
            pytest.skip("this file system has no O_DIRECT")
        assert read_all(mover, file, [(0, 64 * PAGE)]) == [data]
        assert mover.counts().buffered == 0
        assert read_all(mover, file, [(1, PAGE)]) == [data[1 : 1 + PAGE]]
        assert mover.counts().buffered == 1
    mover.close()


def test_a_truncated_file_is_said_to_be_one(mover: DiskMover, noise: Noise) -> None:
    path, data = noise(16 * PAGE)
    with opened(path) as file:
        os.truncate(path, 7 * PAGE + 100)
        memory = Memory(8 * PAGE)
        first, second = mover.submit(
            [
                Read(file, 2 * PAGE, 4 * PAGE, memory.address),
                Read(file, 6 * PAGE, 4 * PAGE, memory.address + 4 * PAGE),
            ]
        )
        mover.wait(first, WAIT_S)
        assert memory.data(0, 4 * PAGE) == data[2 * PAGE : 6 * PAGE]
        with pytest.raises(DataLossError, match=f"{path.name}: ends at byte {7 * PAGE + 100}"):
            mover.wait(second, WAIT_S)
        with pytest.raises(DataLossError, match="changed while it was served"):
            file.require_unchanged()


def test_a_disk_that_fails_is_an_error_that_names_the_place(mover: DiskMover, noise: Noise) -> None:
    """A descriptor that is gone fails as a broken disk does: by an errno."""
    path, _ = noise(4 * PAGE)
    file = DiskFile.open(path)
    file.close()
    memory = Memory(PAGE)
    (ticket,) = mover.submit([Read(file, PAGE, PAGE, memory.address)])
    with pytest.raises(
        DataLossError, match=f"{path.name}: cannot be read at byte {PAGE} .*Bad file descriptor"
    ):
        mover.wait(ticket, WAIT_S)


def test_more_reads_than_may_be_open_are_refused(
    make_mover: Callable[..., DiskMover], noise: Noise
) -> None:
    path, _ = noise(4 * PAGE)
    mover, memory = make_mover(most=2), Memory(PAGE)
    with opened(path) as file:
        read = Read(file, 0, PAGE, memory.address)
        tickets = mover.submit([read, read])
        with pytest.raises(ExhaustedError, match="2 reads are open, and 1 more"):
            mover.submit([read])
        for ticket in tickets:
            mover.wait(ticket, WAIT_S)
        mover.wait(*mover.submit([read]), WAIT_S)


def test_what_has_not_begun_can_be_cancelled_and_is_late_until_then(noise: Noise) -> None:
    """A mover without threads is a disk that never answers."""
    module, reason = native_half()
    if module is None:
        pytest.skip(reason)
    path, _ = noise(4 * PAGE)
    mover, memory = NativeMover(module, threads=0), Memory(PAGE)
    with opened(path) as file:
        (ticket,) = mover.submit([Read(file, PAGE, PAGE, memory.address)], ahead=True)
        with pytest.raises(DeadlineError, match=f"{PAGE} bytes at {PAGE} are not read after 0.01"):
            mover.wait(ticket, 0.01)
        with pytest.raises(DeadlineError):
            mover.wait(ticket, 0)
        assert mover.counts().waits == 1  # to look is not to wait
        assert mover.cancel(ticket)
        assert not mover._open
        assert mover.counts().cancelled == 1
        mover.close()


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(PAGE))
    os.utime(path, (1, 1))  # written long before it is served
    with opened(path) as file:
        file.require_unchanged()
        path.rename(tmp_path / "elsewhere.bin")
        path.write_bytes(bytes(PAGE))
        file.require_unchanged()  # another file of its name is not the one that is open
        with (tmp_path / "elsewhere.bin").open("r+b") as changed:
            changed.write(b"x")
        with pytest.raises(DataLossError, match="changed while it was served"):
            file.require_unchanged()


def test_a_change_that_hides_is_found_by_its_digest(tmp_path: Path) -> None:
    path, data = tmp_path / "weights.bin", bytes(range(256)) * 16
    path.write_bytes(data)
    with opened(path) as file:
        region = DiskRegion(file, 0, PAGE, xxhash.xxh3_128(data).digest())
        file.require_digest(memoryview(data), region.offset, region.digest)
        with pytest.raises(DataLossError, match=r"weights.bin: 4096 bytes at 0 have the digest"):
            file.require_digest(memoryview(b"x" + data[1:]), 0, region.digest)


def test_what_is_no_file_of_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be opened: No such file"):
        DiskFile.open(tmp_path / "absent.bin")
    with pytest.raises(CheckpointError, match="is no regular file"):
        DiskFile.open(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="is no regular file"):
        DiskFile.open(tmp_path / "pipe")
