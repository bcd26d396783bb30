"""The cache pool over real processes: killed, stopped, started anew, with several peers at once."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from moeserve.core import CacheScope
from moeserve.pools.cache.cache_members import CacheMembers
from moeserve.pools.cache.page_files import PageFolder
from moeserve.pools.cache.pages import StoredRun
from moeserve.pools.cache.pool import PagePool, PoolTerms
from moeserve.pools.members import Member, Role

pytestmark = pytest.mark.long

PROGRAM = Path(__file__).with_name("cache_process.py")
PAGE, LAYERS = 64, 2
SCOPE = CacheScope("tenant")
MB = 1 << 20


class CacheProcess:
    """A cache member in a process of its own, with its folder."""

    def __init__(self, name: str, folder: Path, memory: int = 64 * MB, disk: int = 64 * MB) -> None:
        self.folder = folder / name
        self.name = name
        self._command = [sys.executable, str(PROGRAM), str(self.folder), str(memory), str(disk)]
        self._lives = 0
        self.start()

    def start(self) -> None:
        self._lives += 1
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._port = int(self._process.stdout.readline())

    @property
    def member(self) -> Member:
        life = f"{self.name}-{self._lives}"
        return Member(life, self.name, Role.CACHE, f"127.0.0.1:{self._port}")

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def end(self) -> int:
        """Its status, after SIGTERM if it still runs."""
        if self._process.poll() is None:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)
        status = self._process.wait(30)
        assert self._process.stdout is not None
        self._process.stdout.close()
        return status

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.end()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[list[CacheProcess]]:
    running: list[CacheProcess] = [CacheProcess(name, tmp_path) for name in "ab"]
    yield running
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            process.end()


def tokens(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(1000), k=count)


def computed(token_ids: Sequence[int], nbytes: int = 2000) -> list[StoredRun]:
    """One run for each page and layer, in the order of a fetch."""
    runs = []
    for at in range(0, len(token_ids) - PAGE + 1, PAGE):
        for layer in range(LAYERS):
            name = f"{layer} {list(token_ids[: at + PAGE])}".encode()
            content = sha256(name).digest()
            data = (content * (nbytes // 32 + 1))[:nbytes]
            runs.append(StoredRun(layer, at, PAGE, content[:16], data))
    return runs


def pool_of(processes: Sequence[CacheProcess], channels: Any, **times: float) -> PagePool:
    members = CacheMembers()
    members.set([process.member for process in processes])
    patient = {"answer_s": 20.0, "progress_s": 20.0, "find_s": 40.0}
    return PagePool(members, channels, PoolTerms("m", LAYERS, PAGE), **{**patient, **times})


async def fetched(pool: PagePool, ids: Sequence[int], timeout_s: float = 60.0) -> list[StoredRun]:
    return [run async for run in pool.fetch(ids, SCOPE, timeout_s=timeout_s)]


async def put(pool: PagePool, ids: Sequence[int], nbytes: int = 2000) -> None:
    pool.put(ids, SCOPE, computed(ids, nbytes))
    assert await pool.puts.flush(60)


async def test_two_peers_share_and_members_that_end_find_their_pages_again(
    processes: list[CacheProcess], channels: Any
) -> None:
    one, other = pool_of(processes, channels), pool_of(processes, channels)
    prompts = [tokens(10 * PAGE, seed=seed) for seed in range(8)]
    for pool, own in ((one, prompts[:4]), (other, prompts[4:])):
        for ids in own:
            pool.put(ids, SCOPE, computed(ids))
    await asyncio.gather(one.puts.flush(60), other.puts.flush(60))
    assert one.puts.counts.stored == other.puts.counts.stored == 2 * 4 * 10
    for process in processes:
        assert process.end() == 0
        process.start()
    again = pool_of(processes, channels)
    for ids in prompts:
        assert await fetched(again, ids) == computed(ids)
    stats = [await again._calls.stats(process.member) for process in processes]
    assert [s.counts["disk_found"] for s in stats] == [80, 80]
    assert sum(s.counts["disk_read"] for s in stats) == 80
    for pool in (one, other, again):
        await pool.close()


async def test_members_killed_while_they_take_pages_have_them_whole_or_not(
    processes: list[CacheProcess], channels: Any
) -> None:
    draw = random.Random(7)
    victim = processes[0]
    for life in range(4):
        pool = pool_of([victim], channels)
        prompts = [tokens(8 * PAGE, seed=100 * life + i) for i in range(12)]
        for ids in prompts:
            pool.put(ids, SCOPE, computed(ids, 100_000))
        await asyncio.sleep(draw.uniform(0.02, 0.25))
        victim.kill()
        await pool.close(20)
        counts = pool.puts.counts
        assert counts.stored + counts.lost + counts.unowned == 12 * 8
        victim.start()
        again = pool_of([victim], channels)
        for ids in prompts:
            runs = await fetched(again, ids)
            assert runs == computed(ids, 100_000)[: len(runs)]
        assert again.counts.bad == again.counts.lost == 0
        stats = await again._calls.stats(victim.member)
        assert stats.counts["disk_bad"] == stats.counts["disk_failed"] == 0
        await again.close()


async def test_a_stopped_member_holds_nobody_beyond_the_deadline(
    processes: list[CacheProcess], channels: Any
) -> None:
    warm = pool_of(processes, channels)
    ids = tokens(20 * PAGE)
    await put(warm, ids)
    pool = pool_of(processes, channels, answer_s=2.0, progress_s=2.0, put_s=2.0)
    first = pool.members.owners(pool.keys(ids, SCOPE)[0], 1)[0]
    stopped = next(process for process in processes if process.member.id == first.id)
    hit = await pool.find(ids, SCOPE)
    stopped.signal(signal.SIGSTOP)
    began = time.monotonic()
    runs = [run async for run in pool.fetch_hit(hit, began + 60)]
    assert runs == computed(ids)
    assert pool.counts.lost >= 1
    assert await fetched(pool, ids) == computed(ids)  # nobody asks it any more
    for process in processes:
        process.signal(signal.SIGSTOP)
    hurried = pool_of(processes, channels)
    async with asyncio.timeout(15.0):  # of 20 that a member may have elsewhere
        assert await fetched(hurried, ids, timeout_s=0.3) == []
    hurried.put(ids, SCOPE, computed(ids))
    await hurried.close(0.2)
    assert hurried.puts.waiting_bytes == 0
    for process in processes:
        process.signal(signal.SIGCONT)
    patient = pool_of(processes, channels)
    assert await fetched(patient, ids) == computed(ids)
    for one in (warm, pool, patient):
        await one.close()


async def test_bytes_flipped_in_files_are_never_fetched(tmp_path: Path, channels: Any) -> None:
    keeper = CacheProcess("c", tmp_path)
    ids = [tokens(4 * PAGE, seed=seed) for seed in range(25)]
    pool = pool_of([keeper], channels)
    for prompt in ids:
        await put(pool, prompt)
    assert keeper.end() == 0
    draw = random.Random(9)
    files = sorted((keeper.folder / "pages").glob("*/*"))
    assert len(files) == 100
    for path in files:
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    keeper.start()
    again = pool_of([keeper], channels)
    hits = [await again.find(prompt, SCOPE) for prompt in ids]
    assert sum(hit.tokens for hit in hits) == 100 * PAGE
    for _ in range(4):  # a prefix ends at its first page that has changed
        for prompt in ids:
            hit = await again.find(prompt, SCOPE)
            assert [run async for run in again.fetch_hit(hit, time.monotonic() + 60)] == []
    keys = [key for prompt in ids for key in again.keys(prompt, SCOPE)]
    for key in keys:
        assert [page async for page in again._calls.get(keeper.member, [key], float("inf"))] == []
    stats = await again._calls.stats(keeper.member)
    assert stats.counts["disk_bad"] == 100
    assert stats.counts["disk_pages"] == 0
    assert keeper.end() == 0
    folder = PageFolder(keeper.folder)
    assert folder.scan() == []
    folder.close()
    for one in (pool, again):
        await one.close()


async def test_a_member_on_a_full_disk_keeps_serving(small_disk: Path, channels: Any) -> None:
    keeper = CacheProcess("d", small_disk)
    try:
        pool = pool_of([keeper], channels)
        prompts = [tokens(8 * PAGE, seed=seed) for seed in range(4)]
        for ids in prompts:
            await put(pool, ids, 40_000)
        for ids in prompts:
            assert await fetched(pool, ids) == computed(ids, 40_000)
        stats = await pool._calls.stats(keeper.member)
        assert stats.counts["disk_full"] > 0
        assert stats.counts["disk_full"] + stats.counts["disk_written"] == 32
        await pool.close()
    finally:
        assert keeper.end() == 0
