"""Pages on a disk are whole or absent: kills, changed bytes, full disks, files of strangers."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moeserve.errors import ConfigError, DataLossError
from moeserve.pools.cache.disk import OVERHEAD, DiskTier
from moeserve.pools.cache.page_files import FORMAT, HEADER_BYTES, PageFolder
from moeserve.pools.cache.pages import StoredPage

MakePage = Callable[..., StoredPage]
WRITER = Path(__file__).with_name("cache_writer.py")
MB = 1 << 20


@contextmanager
def opened(path: Path) -> Iterator[PageFolder]:
    folder = PageFolder(path)
    try:
        yield folder
    finally:
        folder.close()


def only_file(path: Path) -> Path:
    (found,) = (path / "pages").glob("*/*")
    return found


@pytest.fixture
async def disk(tmp_path: Path) -> AsyncIterator[DiskTier]:
    tier = DiskTier(PageFolder(tmp_path / "cache"), MB, MB)
    yield tier
    await tier.close()


def test_a_page_comes_back_after_a_restart(tmp_path: Path, make_page: MakePage) -> None:
    page = make_page(1)
    with opened(tmp_path) as folder:
        folder.write(page)
    with opened(tmp_path) as folder:
        (found,) = folder.scan()
        assert (found.key, found.namespace) == (page.key, page.namespace)
        assert found.nbytes == page.nbytes + HEADER_BYTES
        assert folder.read(page.key, page.namespace, MB) == page
        folder.delete(page.key, page.namespace)
        assert folder.scan() == []
        folder.delete(page.key, page.namespace)


def test_every_changed_byte_and_every_length_is_found(tmp_path: Path, make_page: MakePage) -> None:
    page = make_page(1, nbytes=300)
    with opened(tmp_path) as folder:
        folder.write(page)
        path = only_file(tmp_path)
        whole = path.read_bytes()
        draw = random.Random(2)
        changed = [whole[:at] for at in range(0, len(whole), 7)]
        changed += [whole + b"x", b""]
        for at in range(len(whole)):
            flipped = bytearray(whole)
            flipped[at] ^= 1 << draw.randrange(8)
            changed.append(bytes(flipped))
        for content in changed:
            path.write_bytes(content)
            with pytest.raises(DataLossError, match=path.name):
                folder.read(page.key, page.namespace, MB)
        path.write_bytes(whole)
        assert folder.read(page.key, page.namespace, MB) == page


def test_a_whole_page_under_another_name_is_refused(tmp_path: Path, make_page: MakePage) -> None:
    one, other = make_page(1), make_page(2)
    with opened(tmp_path) as folder:
        folder.write(one)
        path = only_file(tmp_path)
        folder.write(other)
        names = sorted((tmp_path / "pages").glob("*/*"))
        names.remove(path)
        path.replace(names[0])
        with pytest.raises(DataLossError):
            folder.read(other.key, other.namespace, MB)


@pytest.mark.long
def test_a_writer_killed_at_any_point_leaves_whole_pages(tmp_path: Path) -> None:
    draw = random.Random(3)
    said: set[str] = set()
    for life in range(6):
        command = [sys.executable, str(WRITER), str(tmp_path), str(1000 * life)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(draw.randrange(1, 40)):
                said.add(writer.stdout.readline().strip())
            os.kill(writer.pid, signal.SIGKILL)
            said.update(line.strip() for line in writer.stdout if len(line) == 65)
    with opened(tmp_path) as folder:
        found = folder.scan()
        assert said <= {page.key.hex() for page in found}
        for page in found:
            assert folder.read(page.key, page.namespace, MB).is_whole()
        assert not list((tmp_path / "incoming").iterdir())


@pytest.mark.parametrize(
    "stranger",
    ["thesis.txt", "pages/aa/holiday.jpg", "pages/notes", "incoming/letter", "pages/zz/x"],
)
def test_files_of_strangers_are_refused_and_stay(tmp_path: Path, stranger: str) -> None:
    with opened(tmp_path):
        pass
    theirs = tmp_path / stranger
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_text("mine")
    with pytest.raises(ConfigError, match=r"no file of a cache"), opened(tmp_path) as folder:
        folder.scan()
    assert theirs.read_text() == "mine"
    theirs.unlink()


def test_a_folder_that_only_looks_like_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "1.html").write_text("mine")
    with pytest.raises(ConfigError, match=r"no file of a cache"):
        PageFolder(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "FORMAT").write_text("something else")
    with pytest.raises(ConfigError, match="another version"):
        PageFolder(other)
    (other / "FORMAT").write_text(FORMAT[:5])  # killed while it was written
    PageFolder(other).close()
    assert (other / "FORMAT").read_text() == FORMAT


def test_links_are_not_followed(tmp_path: Path, make_page: MakePage) -> None:
    page = make_page(1)
    with opened(tmp_path / "cache") as folder:
        folder.write(page)
        path = only_file(tmp_path / "cache")
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(OSError, match="symbolic links"):
            folder.read(page.key, page.namespace, MB)
        with pytest.raises(ConfigError, match="no file of a cache"):
            folder.scan()


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(ConfigError, match="used by another process"):
        PageFolder(tmp_path)
    with opened(tmp_path):
        pass


async def test_the_disk_holds_what_it_may_and_drops_the_oldest(
    disk: DiskTier, make_page: MakePage
) -> None:
    pages = [make_page(n, nbytes=100_000) for n in range(20)]
    for page in pages:
        assert await disk.write(page)
        assert disk.ledger.nbytes <= MB
    kept = [page for page in pages if disk.has(page.key)]
    assert kept == pages[-len(kept) :]
    assert disk.counts.evicted == 20 - len(kept) > 0
    assert [await disk.read(page.key) for page in kept] == kept
    assert await disk.read(pages[0].key) is None
    assert not await disk.write(make_page(99, nbytes=2 * MB))


async def test_a_restart_finds_the_newest_that_still_fit(
    tmp_path: Path, make_page: MakePage
) -> None:
    pages = [make_page(n, nbytes=100_000) for n in range(5)]
    with opened(tmp_path) as folder:
        for age, page in enumerate(pages):
            folder.write(page)
            os.utime(folder._path(page.key, page.namespace), (age, age))
    tier = DiskTier(PageFolder(tmp_path), 350_000, 350_000)
    tier.load()
    assert tier.counts.found == 3
    assert tier.ledger.oldest_first() == tuple(page.key for page in pages[2:])
    tier.ledger.check()
    await tier.close()
    with opened(tmp_path) as folder:
        assert {found.key for found in folder.scan()} == {page.key for page in pages[2:]}


async def test_a_page_that_has_changed_is_dropped_and_counted(
    disk: DiskTier, tmp_path: Path, make_page: MakePage
) -> None:
    page = make_page(1)
    await disk.write(page)
    path = only_file(tmp_path / "cache")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert await disk.read(page.key) is None
    assert (disk.counts.bad, len(disk.ledger)) == (1, 0)
    assert await disk.write(page)
    assert await disk.read(page.key) == page


async def test_a_page_whose_file_has_gone_is_absent(
    disk: DiskTier, tmp_path: Path, make_page: MakePage
) -> None:
    await disk.write(make_page(1))
    only_file(tmp_path / "cache").unlink()
    assert await disk.read(make_page(1).key) is None
    assert len(disk.ledger) == 0


async def test_a_failing_disk_costs_the_page_alone(
    disk: DiskTier, tmp_path: Path, make_page: MakePage
) -> None:
    """No file may be larger than so much: the kernel's own refusal, in the midst of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        assert not await disk.write(make_page(1, nbytes=100_000))
        assert await disk.write(make_page(2, nbytes=1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert (disk.counts.failed, disk.counts.written, len(disk.ledger)) == (1, 1, 1)
    assert not list((tmp_path / "cache" / "incoming").iterdir())
    assert await disk.write(make_page(1, nbytes=100_000))


async def test_a_full_disk_costs_the_page_alone(small_disk: Path, make_page: MakePage) -> None:
    tier = DiskTier(PageFolder(small_disk), 100 * MB, 100 * MB)
    pages = [make_page(n, nbytes=200_000) for n in range(8)]
    written = [page for page in pages if await tier.write(page)]
    assert 0 < len(written) < 8
    assert (tier.counts.full, tier.counts.failed) == (8 - len(written), 0)
    assert tier.ledger.nbytes < len(written) * (200_000 + 2 * OVERHEAD)
    assert [await tier.read(page.key) for page in written] == written
    assert not list((small_disk / "incoming").iterdir())
    tier.drop(written[0].key)
    assert await tier.write(pages[-1]) or pages[-1] in written
    await tier.close()
