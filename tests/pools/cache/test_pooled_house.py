"""A rank with the pool behind it computes less, never anything else, and leaks nothing."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

import pytest
import torch
from torch import Tensor

from moeserve.core import (
    BlockId,
    CacheScope,
    Counters,
    Event,
    FinishReason,
    Request,
    RequestId,
    SamplingParams,
)
from moeserve.engine.blocks import BlockPool, child_key, root_key
from moeserve.engine.sequence import NEW, HeldKv, History
from moeserve.errors import ConfigError, ExhaustedError, InvalidRequestError
from moeserve.kernels.kv_layout import KvBlockLayout
from moeserve.pools.cache.cache_members import CacheMembers
from moeserve.pools.cache.page_kv import PageKv
from moeserve.pools.cache.pages import seal, unseal
from moeserve.pools.cache.pool import PagePool, PoolTerms
from moeserve.pools.cache.pooled_house import PooledHouse
from moeserve.pools.members import Member

PAGE, LAYERS = 16, 3
# What is fast here may be slow where others work.
PATIENT = {"answer_s": 20.0, "progress_s": 20.0, "put_s": 20.0, "find_s": 40.0}


def kv_of(tokens: Sequence[int], layer: int, position: int, scope: CacheScope) -> bytes:
    """32 bytes: 16 of the key, 16 of the value."""
    return sha256(f"{scope} {layer} {list(tokens[: position + 1])}".encode()).digest()


class Computing:
    """A ``KvHouse`` whose engine computes a prompt at once, on the thread of ``submit``: the KV of
    a position follows from its layer and all tokens up to it."""

    def __init__(self, block_size: int = 4, num_blocks: int = 64) -> None:
        layout = KvBlockLayout(torch.float32, block_size, 1, 4, 4, False)
        self.layouts = (layout,) * LAYERS
        self.block_size = block_size
        self.pool = BlockPool(num_blocks, block_size, Counters())
        self.memory = torch.zeros(LAYERS, num_blocks, layout.nbytes, dtype=torch.uint8)
        self.computed = 0
        self.submitted: list[Request] = []
        self.told = 0  # requests whose sinks have heard all
        self.aborted: list[RequestId] = []
        self.refuses = False

    def _keys(self, tokens: Sequence[int], scope: CacheScope) -> list[Any]:
        keys, key = [], root_key(scope)
        for at in range(0, len(tokens) - self.block_size + 1, self.block_size):
            key = child_key(key, tokens[at : at + self.block_size])
            keys.append(key)
        return keys

    def borrow(self, token_ids: Sequence[int], scope: CacheScope) -> HeldKv | None:
        usable = (len(token_ids) - 1) // self.block_size
        found = self.pool.find(self._keys(token_ids, scope)[:usable])
        fresh = self.pool.blocks_for(len(token_ids)) - len(found)
        free = sum(self.pool.is_free(block) for block in found)
        if fresh + free > self.pool.num_free:
            return None
        self.pool.share(found)
        return HeldKv((*found, *self.pool.allocate(fresh)), len(found) * self.block_size)

    def publish(self, held: HeldKv, token_ids: Sequence[int], scope: CacheScope) -> None:
        for block, key in zip(held.blocks, self._keys(token_ids, scope), strict=False):
            self.pool.publish(block, key)

    def give_back(self, held: HeldKv, *, forget: bool = False) -> None:
        self.pool.release(held.blocks, forget=forget)

    def export_kv(self, layer: int, blocks: Sequence[BlockId], out_NX: Tensor) -> None:
        out_NX.copy_(self.memory[layer, list(blocks)])

    def import_kv(self, layer: int, blocks: Sequence[BlockId], data_NX: Tensor) -> None:
        self.memory[layer, list(blocks)] = data_NX

    def submit(self, request: Request, sink: Any, history: History) -> None:
        if self.refuses:
            raise ExhaustedError("full")
        tokens = (*request.prompt_ids, *history.output_ids)
        held = history.kv or self.borrow(tokens, request.scope)
        assert held is not None
        assert len(held.blocks) <= self.pool.blocks_for(len(tokens))
        lacking = self.pool.blocks_for(len(tokens)) - len(held.blocks)
        blocks = (*held.blocks, *self.pool.allocate(lacking))
        self.check(tokens[: held.computed], blocks, request.scope)
        for position in range(held.computed, len(tokens)):
            self.write(tokens, position, blocks, request.scope)
        self.computed += len(tokens) - held.computed
        self.publish(HeldKv(blocks, len(tokens)), tokens, request.scope)
        self.submitted.append(request)
        self.pool.release(blocks)
        sink.deliver([Event(request.id, (7,))])
        sink.deliver([Event(request.id, (8,), finish=FinishReason.LENGTH)])
        self.told += 1

    def _place(self, position: int, blocks: Sequence[BlockId]) -> tuple[BlockId, int, int]:
        block, inside = divmod(position, self.block_size)
        return blocks[block], 16 * inside, 16 * (self.block_size + inside)

    def write(
        self, tokens: Sequence[int], position: int, blocks: Sequence[BlockId], scope: CacheScope
    ) -> None:
        block, key, value = self._place(position, blocks)
        for layer in range(LAYERS):
            content = torch.tensor(list(kv_of(tokens, layer, position, scope)), dtype=torch.uint8)
            self.memory[layer, block, key : key + 16] = content[:16]
            self.memory[layer, block, value : value + 16] = content[16:]

    def check(self, tokens: Sequence[int], blocks: Sequence[BlockId], scope: CacheScope) -> None:
        """What is said to be there is what would be computed."""
        for position in range(len(tokens)):
            block, key, value = self._place(position, blocks)
            for layer in range(LAYERS):
                row = self.memory[layer, block].numpy().tobytes()
                found = row[key : key + 16] + row[value : value + 16]
                assert found == kv_of(tokens, layer, position, scope), (layer, position)

    def abort(self, request_id: RequestId, reason: FinishReason = FinishReason.ABORT) -> None:
        self.aborted.append(request_id)

    def look(self, request_id: RequestId) -> HeldKv | None:
        return None

    def take_kept(self, request_id: RequestId) -> HeldKv | None:
        return None

    def detach(self, request_id: RequestId) -> tuple[HeldKv, tuple[int, ...]] | None:
        return None

    def on_step(self, tell: Callable[[], None]) -> Callable[[], None]:
        return lambda: None

    between_steps = on_step


class Listening:
    """What a request's sink is told."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.returned: list[RequestId] = []

    def deliver(self, events: Sequence[Event], /) -> None:
        self.events.extend(events)

    def give_back(self, request_id: RequestId, reached: int, /) -> None:
        self.returned.append(request_id)

    @property
    def ends(self) -> list[FinishReason]:
        return [event.finish for event in self.events if event.finish is not None]


def request_of(prompt: Sequence[int], name: str = "r", salt: str = "", **params: Any) -> Request:
    return Request(RequestId(name), tuple(prompt), SamplingParams(**params), scope=CacheScope(salt))


def tokens(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(1000), k=count)


MakeRank = Callable[..., PooledHouse]


@pytest.fixture
async def make_rank(channels: Any) -> AsyncIterator[MakeRank]:
    ranks: list[PooledHouse] = []

    def make(members: Sequence[Member], house: Computing, **options: Any) -> PooledHouse:
        known = CacheMembers()
        known.set(members)
        pool = PagePool(known, channels, PoolTerms("m", LAYERS, PAGE), **PATIENT)
        ranks.append(PooledHouse(house, pool, fetch_s=40.0, **options))
        return ranks[-1]

    yield make
    for rank in ranks:
        await rank.close()
        await rank._pool.close()
        house: Any = rank._house
        house.pool.check()
        assert house.pool.num_free == house.pool.num_blocks  # no reference is left
        assert rank._watched == {}


async def serve(rank: PooledHouse, request: Request, until: Any) -> Listening:
    """All events of it, and what it leaves put."""
    sink, house = Listening(), rank._house
    assert isinstance(house, Computing)
    told = house.told
    rank.submit(request, sink, NEW)
    await until(lambda: house.told > told)
    await asyncio.sleep(0)  # what its thread has left to this loop begins
    await until(lambda: not rank._leaving and not rank.arriving)
    assert await rank._pool.puts.flush(60)
    assert [event.token_ids for event in sink.events] == [(7,), (8,)]
    return sink


@pytest.mark.parametrize(("theirs", "ours"), [(4, 4), (4, 8), (16, 4), (8, 16)])
async def test_a_prefix_is_computed_once_by_all_ranks(
    theirs: int, ours: int, make_keeper: Any, make_rank: MakeRank, until: Any
) -> None:
    members = [(await make_keeper(name)).member for name in "ab"]
    first, second = Computing(theirs), Computing(ours)
    one, other = make_rank(members, first), make_rank(members, second)
    prompt = tokens(5 * PAGE + 3)
    await serve(one, request_of(prompt), until)
    assert (first.computed, one.counts.put_pages) == (len(prompt), 5)
    await serve(other, request_of(prompt + tokens(9, seed=1)), until)
    assert second.computed == 3 + 9
    assert other.counts.fetched_tokens == 5 * PAGE
    await serve(other, request_of(prompt[: 3 * PAGE], "again"), until)  # nothing more is fetched
    assert other.counts.fetched_tokens == 5 * PAGE
    await serve(other, request_of(prompt, "theirs", salt="another tenant"), until)
    assert second.computed >= len(prompt) + 3 + 9


async def test_a_prompt_that_is_all_there_computes_its_last_token(
    make_keeper: Any, make_rank: MakeRank, until: Any
) -> None:
    members = [(await make_keeper("a")).member]
    house = Computing()
    one, other = make_rank(members, Computing()), make_rank(members, house)
    prompt = tokens(3 * PAGE)
    await serve(one, request_of(prompt), until)
    await serve(other, request_of(prompt), until)
    assert house.computed == 1


async def test_blocks_that_are_here_are_not_written_to(
    make_keeper: Any, make_rank: MakeRank, until: Any
) -> None:
    """The first page is here but for its end; what is here is shared, so it stays as it is."""
    members = [(await make_keeper("a")).member]
    house = Computing()
    one, other = make_rank(members, Computing()), make_rank(members, house)
    prompt = tokens(2 * PAGE + 1)
    await serve(one, request_of(prompt), until)
    await serve(other, request_of(prompt[:13], "short"), until)
    written: list[BlockId] = []
    plain = house.import_kv

    def import_kv(layer: int, blocks: Sequence[BlockId], data_NX: Tensor) -> None:
        written.extend(blocks)
        plain(layer, blocks, data_NX)

    house.import_kv = import_kv  # type: ignore[method-assign]
    await serve(other, request_of(prompt), until)
    assert house.computed == 13 + 1
    assert len(written) == LAYERS * (2 * PAGE // 4 - 3)


async def test_wrong_pages_are_computed_instead(
    make_keeper: Any, make_rank: MakeRank, until: Any
) -> None:
    """The page is whole, but what is in it was not: its digest was made of wrong bytes."""
    keeper = await make_keeper("a")
    prompt = tokens(4 * PAGE + 1)
    one = make_rank([keeper.member], Computing())
    await serve(one, request_of(prompt), until)
    key = one._pool.keys(prompt, CacheScope())[2]
    page = keeper.store.memory.get(key)
    runs = unseal(page)
    changed = replace(runs[1], data=bytes([1, *bytes(runs[1].data)[1:]]))
    keeper.store.memory._pages[key] = seal(key, page.namespace, [runs[0], changed, runs[2]])
    house = Computing()
    other = make_rank([keeper.member], house)
    await serve(other, request_of(prompt), until)
    assert house.computed == 2 * PAGE + 1
    assert other.counts.wrong == 1
    await until(lambda: other.counts.put_pages == 2)
    await serve(make_rank([keeper.member], last := Computing()), request_of(prompt), until)
    assert last.computed == 1  # the right one is there now


async def test_scored_prompts_and_short_ones_do_not_look(
    make_keeper: Any, make_rank: MakeRank, until: Any
) -> None:
    members = [(await make_keeper("a")).member]
    house = Computing()
    rank = make_rank(members, house)
    prompt = tokens(3 * PAGE)
    await serve(rank, request_of(prompt, prompt_logprobs=1), until)
    await serve(rank, request_of(prompt[:PAGE], "short"), until)
    assert rank.counts.looked == 0
    await until(lambda: rank.counts.put_pages == 3)


async def test_no_room_is_no_loss(make_keeper: Any, make_rank: MakeRank, until: Any) -> None:
    members = [(await make_keeper("a")).member]
    house = Computing()
    one, rank = make_rank(members, Computing()), make_rank(members, house)
    prompt = tokens(2 * PAGE)
    await serve(one, request_of(prompt), until)
    plain, refused = house.borrow, []

    def borrow(token_ids: Sequence[int], scope: CacheScope) -> HeldKv | None:
        if not refused:
            refused.append(token_ids)
            return None
        return plain(token_ids, scope)

    house.borrow = borrow  # type: ignore[method-assign]
    await serve(rank, request_of(prompt), until)
    assert (house.computed, rank.counts.crowded) == (2 * PAGE, 1)


async def test_where_nobody_keeps_kv_requests_go_on_at_once(make_rank: MakeRank) -> None:
    house = Computing()
    rank = make_rank([], house)
    sink = Listening()
    rank.submit(request_of(tokens(40)), sink, NEW)
    assert sink.ends == [FinishReason.LENGTH]
    assert (rank.counts.looked, rank.counts.crowded) == (0, 0)


async def test_a_miss_borrows_nothing(make_keeper: Any, make_rank: MakeRank, until: Any) -> None:
    house = Computing()
    rank = make_rank([(await make_keeper("a")).member], house)
    plain, borrowed = house.borrow, []

    def borrow(token_ids: Sequence[int], scope: CacheScope) -> HeldKv | None:
        borrowed.append(len(token_ids))
        return plain(token_ids, scope)

    house.borrow = borrow  # type: ignore[method-assign]
    await serve(rank, request_of(tokens(2 * PAGE + 5)), until)
    assert borrowed == [2 * PAGE + 5, 2 * PAGE + 1]  # by the engine; to export


async def test_what_the_engine_refuses_ends_with_its_reason(
    make_keeper: Any, make_rank: MakeRank, until: Any
) -> None:
    house = Computing()
    rank = make_rank([(await make_keeper("a")).member], house)
    house.refuses = True
    sink = Listening()
    rank.submit(request_of(tokens(40)), sink, NEW)
    await until(lambda: sink.ends)
    assert [(event.finish, event.error) for event in sink.events] == [
        (FinishReason.UNAVAILABLE, "full")
    ]
    with pytest.raises(ExhaustedError):
        rank.submit(request_of(tokens(3)), sink, NEW)
    await until(lambda: not rank.arriving)


async def test_a_request_that_waits_can_be_ended(
    make_keeper: Any, make_rank: MakeRank, until: Any
) -> None:
    keeper = await make_keeper("a")
    silent = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{silent.getsockname()[1]}"
    house = Computing()
    rank = make_rank([replace(keeper.member, address=address)], house)
    sinks = [Listening() for _ in range(3)]
    for number, sink in enumerate(sinks):
        rank.submit(request_of(tokens(40), f"r{number}"), sink, NEW)
    with pytest.raises(InvalidRequestError, match="in use"):
        rank.submit(request_of(tokens(40), "r0"), Listening(), NEW)
    rank.abort(RequestId("r0"))  # before it has begun
    await until(lambda: sinks[0].ends)
    rank.abort(RequestId("r1"), FinishReason.STOP)
    await until(lambda: sinks[1].ends)
    await rank.close()
    assert [sink.ends for sink in sinks] == [
        [FinishReason.ABORT],
        [FinishReason.STOP],
        [FinishReason.UNAVAILABLE],
    ]
    assert house.submitted == []
    late = Listening()
    rank.submit(request_of(tokens(40), "late"), late, NEW)  # the pool is closed, the rank is not
    assert late.ends == [FinishReason.LENGTH]
    rank.abort(RequestId("r9"))
    assert house.aborted == ["r9"]
    silent.close()


async def test_blocks_that_do_not_fill_pages_use_no_pool(
    make_keeper: Any, make_rank: MakeRank, caplog: pytest.LogCaptureFixture
) -> None:
    house = Computing(5)
    with pytest.raises(ConfigError, match="no multiple of blocks of 5"):
        PageKv(house, PAGE)
    rank = make_rank([(await make_keeper("a")).member], house)
    assert "no multiple of blocks of 5" in caplog.text
    sink = Listening()
    rank.submit(request_of(tokens(40)), sink, NEW)
    assert sink.ends == [FinishReason.LENGTH]
    assert (rank.counts.looked, rank.counts.put_pages) == (0, 0)


async def test_returned_requests_are_watched_no_more(make_rank: MakeRank) -> None:
    house = Computing()
    rank = make_rank([], house)
    kept: list[Any] = []
    house.submit = lambda request, sink, history: kept.append(sink)  # type: ignore[method-assign]
    sink = Listening()
    for name in ("one", "two"):
        rank.submit(request_of(tokens(20), name, prompt_logprobs=0), sink, NEW)
    assert kept[0] is kept[1]  # one delivery a step for all of a sink
    kept[0].give_back(RequestId("one"), 0)
    kept[0].deliver([Event(RequestId("two"), finish=FinishReason.ABORT)])
    assert sink.returned == ["one"]
    assert sink.ends == [FinishReason.ABORT]
