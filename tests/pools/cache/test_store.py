"""Memory and disk as one store: what is put is found, within its bounds, or is not there."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.errors import ConfigError
from moeserve.pools.cache.memory import OVERHEAD, MemoryTier
from moeserve.pools.cache.pages import StoredPage
from moeserve.pools.cache.store import PageStore, PutOutcome, StoreLimits

MakePage = Callable[..., StoredPage]
SMALL = StoreLimits(memory=50_000, disk=400_000)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[PageStore]:
    found = await PageStore.open(SMALL, tmp_path)
    yield found
    await found.close()


async def written(store: PageStore) -> None:
    while store._writing is not None and not store._writing.done():
        await asyncio.wait([store._writing], timeout=10)


async def test_a_page_is_kept_once_and_found(store: PageStore, make_page: MakePage) -> None:
    page = make_page(1)
    assert store.size_of(page.key) is None
    assert store.put(page) is PutOutcome.STORED
    assert store.put(page) is PutOutcome.HELD
    assert await store.get(page.key) is page
    assert await store.get(make_page(2).key) is None
    counts = store.counts
    assert (counts.stored, counts.held, counts.memory_hits, counts.misses) == (1, 1, 1, 1)


async def test_what_memory_lets_go_comes_from_the_disk(
    store: PageStore, make_page: MakePage
) -> None:
    pages = [make_page(n, nbytes=8000) for n in range(12)]
    for page in pages:
        assert store.put(page) is PutOutcome.STORED
        await written(store)
    assert store.memory.evicted > 0
    assert [await store.get(page.key) for page in pages] == pages
    assert store.counts.disk_hits > 0
    assert await store.get(pages[-1].key) is store.memory.get(pages[-1].key)  # it is back
    store.memory.ledger.check()


async def test_many_who_want_one_page_read_it_once(store: PageStore, make_page: MakePage) -> None:
    page = make_page(1)
    store.put(page)
    await written(store)
    store.memory.drop(page.key)
    found = await asyncio.gather(*(store.get(page.key) for _ in range(8)))
    assert found == [page] * 8
    assert store.disk is not None
    assert store.disk.counts.read == 1


async def test_a_restart_finds_its_pages(tmp_path: Path, make_page: MakePage) -> None:
    pages = [make_page(n) for n in range(5)]
    first = await PageStore.open(SMALL, tmp_path)
    for page in pages:
        first.put(page)
    await first.close()
    second = await PageStore.open(SMALL, tmp_path)
    assert [await second.get(page.key) for page in pages] == pages
    assert second.counts.disk_hits == 5
    await second.close()


async def test_a_page_whose_digest_is_wrong_is_not_taken(
    store: PageStore, make_page: MakePage
) -> None:
    page = make_page(1)
    wrong = StoredPage(page.key, page.namespace, bytes(16), page.body)
    assert store.put(wrong) is PutOutcome.BAD
    assert store.size_of(page.key) is None
    assert store.put(page) is PutOutcome.STORED


async def test_a_flip_in_memory_is_found_by_a_doubt_and_the_disk_has_it_still(
    store: PageStore, make_page: MakePage
) -> None:
    made = make_page(1)
    page = StoredPage(made.key, made.namespace, made.digest, bytearray(made.body))
    store.put(page)
    await written(store)
    assert isinstance(page.body, bytearray)
    page.body[50] ^= 4
    assert await store.doubt(page.key)
    assert not await store.doubt(page.key)
    assert (store.counts.doubted, store.counts.bad) == (2, 1)
    assert await store.get(page.key) == made


async def test_a_flip_on_the_disk_is_found_by_a_read(
    store: PageStore, tmp_path: Path, make_page: MakePage
) -> None:
    page = make_page(1)
    store.put(page)
    await written(store)
    store.memory.drop(page.key)
    (path,) = (tmp_path / "pages").glob("*/*")
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    assert await store.get(page.key) is None
    assert store.size_of(page.key) is None
    assert store.put(page) is PutOutcome.STORED


async def test_a_tenant_at_its_share_displaces_itself_alone(make_page: MakePage) -> None:
    store = await PageStore.open(StoreLimits(memory=100_000, share=0.5))
    quiet = make_page(0, 10_000, b"quiet")
    store.put(quiet)
    for number in range(1, 20):
        assert store.put(make_page(number, 10_000, b"loud")) is PutOutcome.STORED
    assert await store.get(quiet.key) is quiet
    assert store.put(make_page(50, 60_000, b"huge")) is PutOutcome.FULL
    assert store.counts.full == 1
    await store.close()


async def test_pages_in_use_stay_and_others_are_refused(make_page: MakePage) -> None:
    memory = MemoryTier(2 * (10_000 + OVERHEAD + 200), 2 * (10_000 + OVERHEAD + 200))
    first, second, third = (make_page(n, 10_000) for n in range(3))
    assert memory.put(first)
    assert memory.put(second)
    with memory.in_use(first), memory.in_use(second), memory.in_use(third):
        assert not memory.put(third)
        memory.drop(second.key)
        assert memory.put(third)
        assert memory.put(second)  # it was not used again
    assert memory.ledger.pinned_bytes == 0
    assert memory.put(third)


async def test_too_many_that_wait_for_the_disk_are_kept_in_memory_alone(
    store: PageStore, make_page: MakePage
) -> None:
    for number in range(5):
        assert store.put(make_page(number, 5000)) is PutOutcome.STORED
    assert store.counts.unwritten == 3
    await written(store)
    assert store.disk is not None
    assert store.disk.counts.written == 2
    assert store._waiting_bytes == 0


async def test_of_a_memory_of_few_pages_one_at_a_time_is_written(
    tmp_path: Path, make_page: MakePage
) -> None:
    store = await PageStore.open(StoreLimits(memory=40_000, disk=400_000), tmp_path)
    for number in range(4):
        assert store.put(make_page(number, 15_000)) is PutOutcome.STORED
        await written(store)
    assert store.disk is not None
    assert (store.disk.counts.written, store.counts.unwritten) == (4, 0)
    await store.close()


def test_impossible_limits_are_refused() -> None:
    for limits in ((0, 0, 1.0), (1, -1, 1.0), (1, 0, 0.0), (1, 0, 1.5)):
        with pytest.raises(ConfigError):
            StoreLimits(*limits)


actions = st.lists(
    st.tuples(st.sampled_from(["put", "get", "drop", "forget", "touch"]), st.integers(0, 12)),
    max_size=40,
)


@given(steps=actions)
@settings(max_examples=25, deadline=None)
def test_whatever_is_done_bounds_hold_and_nothing_wrong_comes_out(
    make_page: MakePage, steps: list[tuple[str, int]]
) -> None:
    async def run(folder: Path) -> None:
        store = await PageStore.open(StoreLimits(20_000, 80_000), folder)
        for what, number in steps:
            page = make_page(number, 3000 + 100 * number)
            if what == "put":
                store.put(page)
            elif what == "get":
                assert await store.get(page.key) in (page, None)
            elif what == "drop":
                store.drop(page.key)
                assert store.size_of(page.key) is None
            elif what == "forget":
                store.memory.drop(page.key)
            else:
                store.touch([page.key])
            store.memory.ledger.check()
            assert store.disk is not None
            store.disk.ledger.check()
        await store.close()

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(Path(folder)))
