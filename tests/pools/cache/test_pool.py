"""Peers share what they have computed; what a member does costs them the page, never the answer."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

import pytest

from moeserve.core import CacheScope
from moeserve.pools.cache.cache_members import FIRST_REST_S, LONGEST_REST_S, CacheMembers
from moeserve.pools.cache.keys import GROUP
from moeserve.pools.cache.pages import StoredRun, seal
from moeserve.pools.cache.pool import PagePool, PoolTerms
from moeserve.pools.members import Member, Role

LAYERS, BLOCK, PAGE = 2, 4, 8
SCOPE = CacheScope("tenant")
# What is fast here may be slow where others work.
HURRIED = {"answer_s": 1.0, "progress_s": 1.0, "put_s": 1.0, "find_s": 2.0}
PATIENT = {"answer_s": 20.0, "progress_s": 20.0, "put_s": 20.0, "find_s": 40.0}
MakePool = Callable[..., PagePool]


def tokens(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(1000), k=count)


def computed(token_ids: Sequence[int], start: int = 0, nbytes: int = 40) -> list[StoredRun]:
    """The runs of full blocks: their bytes follow from all tokens before."""
    runs = []
    for at in range(start, len(token_ids) - BLOCK + 1, BLOCK):
        for layer in range(LAYERS):
            name = f"{layer} {list(token_ids[: at + BLOCK])}".encode()
            content = sha256(name).digest() * (nbytes // 32 + 1)
            runs.append(StoredRun(layer, at, BLOCK, content[:16], content[:nbytes]))
    return runs


def in_order(runs: Sequence[StoredRun]) -> list[StoredRun]:
    """As pages are fetched."""
    return sorted(runs, key=lambda run: (run.start // PAGE, run.layer, run.start))


async def fetched(pool: PagePool, token_ids: Sequence[int], have: int = 0) -> list[StoredRun]:
    return [run async for run in pool.fetch(token_ids, SCOPE, have, timeout_s=60.0)]


async def put(pool: PagePool, token_ids: Sequence[int]) -> None:
    pool.put(token_ids, SCOPE, computed(token_ids))
    assert await pool.puts.flush(60)


@pytest.fixture
async def make_pool(channels: Any) -> AsyncIterator[MakePool]:
    pools: list[PagePool] = []

    def make(
        members: Sequence[Member], times: dict[str, float] | None = None, **terms: Any
    ) -> PagePool:
        known = CacheMembers()
        known.set(members)
        pool = PagePool(
            known, channels, PoolTerms("m", LAYERS, PAGE, **terms), **(times or PATIENT)
        )
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        await pool.close()


async def test_what_one_peer_computed_another_fetches(
    make_keeper: Any, make_pool: MakePool
) -> None:
    members = [(await make_keeper(name)).member for name in "abc"]
    one, other = make_pool(members), make_pool(members)
    ids = tokens(2 * GROUP * PAGE + 3)
    await put(one, ids)
    assert one.puts.counts.stored == 2 * 2 * GROUP  # two owners of each page
    longer = ids + tokens(50, seed=1)
    whole = in_order(computed(ids[: 2 * GROUP * PAGE]))
    assert await fetched(other, longer) == whole
    assert other.counts.hit_tokens == other.counts.fetched_tokens == 2 * GROUP * PAGE
    have = 5 * BLOCK
    assert await fetched(other, longer, have) == [run for run in whole if run.end > have]
    assert await fetched(other, tokens(100, seed=2)) == []
    assert [run async for run in other.fetch(longer, CacheScope("another"))] == []
    assert other.policy.counts.fetched == 2


async def test_a_second_put_sends_nothing(make_keeper: Any, make_pool: MakePool) -> None:
    keepers = [await make_keeper(name) for name in "ab"]
    pool = make_pool([keeper.member for keeper in keepers])
    ids = tokens(5 * PAGE)
    await put(pool, ids)
    came = [keeper.server.counts.came_bytes for keeper in keepers]
    await put(pool, ids)
    assert [keeper.server.counts.came_bytes for keeper in keepers] == came
    assert pool.puts.counts.held == 2 * 5


async def test_a_request_asks_as_many_members_as_its_length_has_it(
    make_keeper: Any, make_pool: MakePool
) -> None:
    """However many there are: the others are addresses that nobody answers at."""
    keeper = await make_keeper("a")
    many = [
        replace(keeper.member, id=f"m{i}", instance=f"m{i}", address=f"127.0.0.1:{9000 + i}")
        for i in range(300)
    ]
    pool = make_pool(many, replication=2)
    asked = []

    async def have(member: Member, keys: Any, deadline: float) -> tuple[int, int]:
        asked.append(member)
        return len(keys), 1000

    pool._calls.have = have  # type: ignore[method-assign]
    hit = await pool.find(tokens(3 * GROUP * PAGE), SCOPE)
    assert hit.tokens == 3 * GROUP * PAGE
    assert len(asked) == 3


async def test_the_next_owner_has_it_when_one_is_gone(
    make_keeper: Any, make_pool: MakePool
) -> None:
    keepers = {k.member.id: k for k in [await make_keeper(name) for name in "abc"]}
    pool = make_pool([keeper.member for keeper in keepers.values()])
    ids = tokens(6 * PAGE)
    await put(pool, ids)
    first, second = pool.members.owners(pool.keys(ids, SCOPE)[0], 2)
    hit = await pool.find(ids, SCOPE)
    await keepers[first.id].grpc_server.stop(None)
    assert await fetched(pool, ids) == in_order(computed(ids))  # it is not found there
    assert pool.members.owners(pool.keys(ids, SCOPE)[0], 2) == (second,)
    assert pool.counts.lost == 1
    again = make_pool([keeper.member for keeper in keepers.values()])
    runs = [run async for run in again.fetch_hit(hit, deadline=float("inf"))]  # it was found there
    assert runs == in_order(computed(ids))
    assert (again.counts.lost, again.counts.moved) == (1, 1)


async def test_every_flip_is_found_and_the_other_owner_has_it(
    make_keeper: Any, make_pool: MakePool, until: Any
) -> None:
    keepers = {k.member.id: k for k in [await make_keeper(name) for name in "ab"]}
    pool = make_pool([keeper.member for keeper in keepers.values()])
    ids = tokens(4 * PAGE)
    await put(pool, ids)
    keys = pool.keys(ids, SCOPE)
    first = keepers[pool.members.owners(keys[0], 2)[0].id]
    draw = random.Random(5)
    whole = in_order(computed(ids))
    for flips in range(1, 101):
        page = first.store.memory.get(draw.choice(keys))
        body = bytearray(page.body)
        body[draw.randrange(len(body))] ^= 1 << draw.randrange(8)
        first.store.memory._pages[page.key] = replace(page, body=bytes(body))
        assert await fetched(pool, ids) == whole
        assert pool.counts.bad == flips
        await until(lambda: first.store.counts.doubted == flips)  # noqa: B023
        assert first.store.counts.bad == flips
        await put(pool, ids)  # it comes back
    assert pool.counts.lost == 0


async def test_a_flip_without_another_owner_ends_the_prefix(
    make_keeper: Any, make_pool: MakePool
) -> None:
    keeper = await make_keeper("a")
    pool = make_pool([keeper.member])
    ids = tokens(4 * PAGE)
    await put(pool, ids)
    page = keeper.store.memory.get(pool.keys(ids, SCOPE)[2])
    keeper.store.memory._pages[page.key] = replace(page, body=page.body[:-1] + b"?")
    assert await fetched(pool, ids) == in_order(computed(ids[: 2 * PAGE]))
    assert pool.counts.bad == 1


async def test_a_page_that_is_whole_but_wrong_is_rejected(
    make_keeper: Any, make_pool: MakePool, until: Any
) -> None:
    keeper = await make_keeper("a")
    pool = make_pool([keeper.member])
    ids = tokens(3 * PAGE)
    await put(pool, ids)
    pool.reject(ids, SCOPE, PAGE + 3)
    await until(lambda: len(keeper.store.memory.ledger) == 2)
    assert await fetched(pool, ids) == in_order(computed(ids[:PAGE]))
    page = keeper.store.memory.get(pool.keys(ids, SCOPE)[0])
    keeper.store.memory._pages[page.key] = seal(page.key, page.namespace, [])
    assert await fetched(pool, ids) == []  # no runs in it: they end before they begin


async def test_computing_is_chosen_where_it_is_cheaper(
    make_keeper: Any, make_pool: MakePool
) -> None:
    keeper = await make_keeper("a")
    pool = make_pool([keeper.member])
    ids = tokens(4 * PAGE)
    await put(pool, ids)
    assert await fetched(pool, ids)
    pool.policy.computed(10**9, 1.0)
    assert await fetched(pool, ids) == []
    assert pool.policy.counts.recomputed_tokens == 4 * PAGE


async def test_a_full_queue_drops_what_has_waited_longest(
    make_keeper: Any, make_pool: MakePool
) -> None:
    keeper = await make_keeper("a")
    pool = make_pool([keeper.member], put_bytes=1000)
    prompts = [tokens(2 * PAGE, seed=seed) for seed in range(6)]  # 8 runs of 40 bytes each
    for ids in prompts:
        pool.put(ids, SCOPE, computed(ids))
        assert pool.puts.waiting_bytes <= 1000
    assert await pool.puts.flush(60)
    assert pool.puts.counts.dropped == 3
    assert [bool(await fetched(pool, ids)) for ids in prompts] == [False] * 3 + [True] * 3
    huge = tokens(20 * PAGE)
    pool.put(huge, SCOPE, computed(huge))
    assert (pool.puts.counts.dropped, pool.puts.waiting_bytes) == (4, 0)


async def test_nobody_is_there(make_pool: MakePool) -> None:
    pool = make_pool([])
    ids = tokens(4 * PAGE)
    await put(pool, ids)
    assert await fetched(pool, ids) == []
    assert pool.puts.counts.unowned == 4


async def test_who_stops_reading_closes_the_call(
    make_keeper: Any, make_pool: MakePool, until: Any
) -> None:
    keeper = await make_keeper("a")
    pool = make_pool([keeper.member])
    ids = tokens(GROUP * PAGE)
    await put(pool, ids)
    runs = pool.fetch(ids, SCOPE)
    async for _ in runs:
        break
    await runs.aclose()
    await until(lambda: not keeper.store.memory.ledger.pinned_bytes)
    assert await fetched(pool, ids) == in_order(computed(ids))


def test_members_rest_after_failures_and_new_lives_keep_their_keys() -> None:
    now = 0.0
    members = CacheMembers(clock=lambda: now)
    one = Member("life-1", "a", Role.CACHE, "127.0.0.1:1")
    members.put(one)
    members.put(Member("p", "p", Role.PREFILL, "127.0.0.1:2"))
    assert len(members) == 1
    lengths = []
    for _ in range(8):
        assert members.owners(b"key", 2) == (one,)
        members.failed(one)
        members.failed(one)  # of a call that was under way
        began = now
        while not members.owners(b"key", 2):
            now += 0.5
        lengths.append(now - began)
    assert lengths[:3] == [FIRST_REST_S, 2 * FIRST_REST_S, 4 * FIRST_REST_S]
    assert lengths[-1] == LONGEST_REST_S
    members.failed(one)
    again = replace(one, id="life-2", address="127.0.0.1:3")
    members.put(again)
    assert members.owners(b"key", 2) == (again,)
    members.gone("life-1")
    assert members.owners(b"key", 2) == (again,)
    members.gone("life-2")
    assert members.owners(b"key", 2) == ()


def test_loads_make_no_new_ring() -> None:
    one = Member("1", "a", Role.CACHE, "127.0.0.1:1")
    other = Member("2", "b", Role.CACHE, "127.0.0.1:2")
    members = CacheMembers()
    for member in (one, other):
        members.put(member)
    assert set(members.owners(b"key", 2)) == {one, other}
    ring = members._ring
    members.put(one)
    members.owners(b"key", 2)
    assert members._ring is ring


class Flipping:
    """A way to a member on which one byte of every ``every`` that come back is changed."""

    def __init__(self, member: Member, every: int, seed: int) -> None:
        self._port = int(member.address.rpartition(":")[2])
        self._every = every
        self._random = random.Random(seed)
        self._writers: list[asyncio.StreamWriter] = []
        self.flips = 0

    async def open(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def close(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _serve(self, near: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        far, to_far = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += [out, to_far]
        await asyncio.gather(self._pass(near, to_far, False), self._pass(far, out, True))

    async def _pass(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, flips: bool
    ) -> None:
        left = self._random.randrange(2 * self._every)
        with contextlib.suppress(OSError):
            while data := bytearray(await source.read(65536)):
                at = left
                while flips and at < len(data):
                    data[at] ^= 1 << self._random.randrange(8)
                    self.flips += 1
                    at += self._random.randrange(2 * self._every)
                left = at - len(data)
                target.write(data)
                await target.drain()
            target.close()


async def test_bytes_flipped_on_the_wire_lead_to_no_wrong_run(
    make_keeper: Any, make_pool: MakePool
) -> None:
    """Wherever they fall: in a page, in a message's head, in HTTP/2 itself."""
    keeper = await make_keeper("a")
    ids = tokens(GROUP * PAGE)
    await put(make_pool([keeper.member]), ids)
    whole = in_order(computed(ids))
    flips = lost = bad = short = 0
    for seed in range(60):
        way = Flipping(keeper.member, 1500, seed)
        address = f"127.0.0.1:{await way.open()}"
        pool = make_pool([replace(keeper.member, address=address)], HURRIED)
        try:
            runs = [run async for run in pool.fetch(ids, SCOPE, timeout_s=5.0)]
        finally:
            await way.close()
        assert runs == whole[: len(runs)]
        assert len(runs) % (LAYERS * PAGE // BLOCK) == 0
        short += runs != whole
        flips, lost, bad = flips + way.flips, lost + pool.counts.lost, bad + pool.counts.bad
    assert flips > 60
    assert lost + bad >= short > 0
    assert bad > 0


async def test_a_hit_is_cut_to_what_is_lacking(make_keeper: Any, make_pool: MakePool) -> None:
    """As if only that had been asked for."""
    keeper = await make_keeper("a")
    pool = make_pool([keeper.member])
    ids = tokens((GROUP + 3) * PAGE)
    await put(pool, ids)
    whole = await pool.find(ids, SCOPE)
    for have in (0, BLOCK, PAGE, 3 * PAGE + BLOCK, GROUP * PAGE, (GROUP + 3) * PAGE):
        cut, asked = whole.beyond(have, PAGE), await pool.find(ids, SCOPE, have)
        assert (cut.have, cut.tokens, cut.pieces) == (have, asked.tokens, asked.pieces)
        assert cut.nbytes == asked.nbytes
        runs = [run async for run in pool.fetch_hit(cut, float("inf"))]
        assert runs == [run for run in in_order(computed(ids)) if run.end > have]
    assert whole.beyond(10**6, PAGE).pieces == ()
