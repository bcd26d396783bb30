"""A cache member answers what it can, and is not hurt by what callers do."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.errors import InvalidRequestError, UnavailableError
from moeserve.pb import cache_pb2 as pb
from moeserve.pools.cache.calls import CacheCalls, Offered
from moeserve.pools.cache.keys import Namespace, PageKey
from moeserve.pools.cache.messages import (
    MOST_KEYS,
    MOST_OFFERED,
    PART_BYTES,
    SERVICE,
    PageGathering,
    head_of,
    read_head,
    read_keys,
    read_message,
    read_part,
    write_keys,
    write_part,
)
from moeserve.pools.cache.pages import MOST_PAGE_BYTES, StoredPage
from moeserve.pools.cache.store import PutOutcome, StoreLimits
from moeserve.pools.members import Member

MakePage = Callable[..., StoredPage]


def soon() -> float:
    return time.monotonic() + 30.0


def offer(page: StoredPage) -> Offered:
    return Offered(page.key, page.namespace, page.nbytes, lambda: page)


@pytest.fixture
def calls(channels: Any) -> CacheCalls:
    return CacheCalls(channels, answer_s=30.0, progress_s=30.0, put_s=30.0)


async def got(calls: CacheCalls, member: Member, pages: list[StoredPage]) -> list[StoredPage]:
    return [page async for page in calls.get(member, [p.key for p in pages], soon())]


async def test_pages_go_there_and_back(
    calls: CacheCalls, make_keeper: Any, make_page: MakePage
) -> None:
    keeper = await make_keeper("a")
    pages = [make_page(1), make_page(2, nbytes=3 * PART_BYTES), make_page(3)]
    assert await calls.put(keeper.member, [offer(page) for page in pages]) == ["stored"] * 3
    keys = [page.key for page in pages]
    assert await calls.have(keeper.member, [*keys, make_page(9).key], soon()) == (
        3,
        sum(page.nbytes for page in pages),
    )
    assert await got(calls, keeper.member, pages) == pages
    assert keeper.server.counts.sent_bytes == sum(page.nbytes for page in pages)
    assert keeper.server.incoming_bytes == 0
    stats = await calls.stats(keeper.member)
    assert stats.counts["stored"] == 3
    assert stats.counts["memory_hits"] == 3
    assert stats.stored_bytes == keeper.store.stored_bytes


async def test_pages_end_at_the_first_that_is_missing(
    calls: CacheCalls, make_keeper: Any, make_page: MakePage
) -> None:
    keeper = await make_keeper("a")
    pages = [make_page(n) for n in range(3)]
    await calls.put(keeper.member, [offer(pages[0]), offer(pages[2])])
    assert await got(calls, keeper.member, pages) == pages[:1]
    assert (await calls.have(keeper.member, [p.key for p in pages], soon()))[0] == 1


async def test_what_is_held_is_not_sent_again_nor_made(
    calls: CacheCalls, make_keeper: Any, make_page: MakePage
) -> None:
    keeper = await make_keeper("a")
    page = make_page(1)
    await calls.put(keeper.member, [offer(page)])
    came = keeper.server.counts.came_bytes

    def never() -> StoredPage:
        raise AssertionError("nobody wants it")

    again = Offered(page.key, page.namespace, page.nbytes, never)
    assert await calls.put(keeper.member, [again]) == [PutOutcome.HELD]
    twice = make_page(2)
    assert await calls.put(keeper.member, [offer(twice), offer(twice)]) == ["stored", "held"]
    assert keeper.server.counts.came_bytes == came + twice.nbytes


async def test_a_full_store_says_so(
    calls: CacheCalls, make_keeper: Any, make_page: MakePage
) -> None:
    keeper = await make_keeper("a", StoreLimits(memory=40_000))
    assert await calls.put(keeper.member, [offer(make_page(1, 50_000))]) == [PutOutcome.FULL]
    # A quarter of the memory is for what is on its way in.
    small = [offer(make_page(n, 4000)) for n in range(2, 6)]
    assert await calls.put(keeper.member, small) == ["stored", "stored", "full", "full"]
    assert keeper.server.incoming_bytes == 0


async def test_a_memory_of_few_pages_takes_one_at_a_time(
    calls: CacheCalls, make_keeper: Any, make_page: MakePage
) -> None:
    keeper = await make_keeper("a", StoreLimits(memory=40_000))
    large = [offer(make_page(n, 15_000)) for n in range(2)]
    for _ in range(2):
        outcomes = await calls.put(keeper.member, large)
    assert outcomes == [PutOutcome.HELD, PutOutcome.STORED]
    assert keeper.server.incoming_bytes == 0
    assert keeper.store.counts.full == 1


async def test_a_member_says_once_that_a_page_can_never_fit(
    calls: CacheCalls, make_keeper: Any, make_page: MakePage, caplog: pytest.LogCaptureFixture
) -> None:
    keeper = await make_keeper("a", StoreLimits(memory=40_000))
    for number in range(3):
        await calls.put(keeper.member, [offer(make_page(number, 50_000))])
    assert keeper.store.counts.full == 3
    assert caplog.text.count("raise cache_memory") == 1


async def test_a_page_with_a_wrong_digest_is_not_kept(
    calls: CacheCalls, make_keeper: Any, make_page: MakePage
) -> None:
    keeper = await make_keeper("a")
    page = make_page(1)
    wrong = StoredPage(page.key, page.namespace, b"x" * 16, page.body)
    assert await calls.put(keeper.member, [offer(wrong), offer(make_page(2))]) == ["bad", "stored"]
    assert await calls.have(keeper.member, [page.key], soon()) == (0, 0)


async def test_doubt_drops_what_is_wrong_and_keeps_what_is_right(
    calls: CacheCalls, make_keeper: Any, make_page: MakePage
) -> None:
    keeper = await make_keeper("a")
    page = make_page(1)
    await calls.put(keeper.member, [offer(page)])
    await calls.doubt(keeper.member, [page.key], drop=False)
    assert (await calls.have(keeper.member, [page.key], soon()))[0] == 1
    await calls.doubt(keeper.member, [page.key], drop=True)
    assert (await calls.have(keeper.member, [page.key], soon()))[0] == 0


HEAD = head_of(PageKey(bytes(32)), Namespace(bytes(16)), 100)
BROKEN_PUTS = {
    "no message": [b"\xff\xff\xff"],
    "half a message": [write_part(pb.PutPart(offer=[HEAD]))[:20]],
    "a broken message": [b"\x03\0\0\0\xff\xff\xff"],
    "no offer": [write_part(pb.PutPart())],
    "too many": [write_part(pb.PutPart(offer=[HEAD] * (MOST_OFFERED + 1)))],
    "bytes with an offer": [write_part(pb.PutPart(offer=[HEAD]), b"x")],
    "no digest": [
        write_part(pb.PutPart(offer=[HEAD])),
        write_part(pb.PutPart(), b"x"),
    ],
    "too many bytes": [
        write_part(pb.PutPart(offer=[HEAD])),
        write_part(pb.PutPart(digest=bytes(16)), bytes(101)),
    ],
    "a second offer": [
        write_part(pb.PutPart(offer=[HEAD])),
        write_part(pb.PutPart(offer=[HEAD])),
    ],
    "an early end": [write_part(pb.PutPart(offer=[HEAD]))],
    "a huge page": [
        write_part(
            pb.PutPart(
                offer=[pb.PageHead(key=bytes(32), namespace=bytes(16), nbytes=MOST_PAGE_BYTES + 1)]
            )
        )
    ],
}


@pytest.mark.parametrize("what", BROKEN_PUTS)
async def test_broken_puts_end_their_call_and_leave_nothing(
    what: str, channels: Any, calls: CacheCalls, make_keeper: Any, make_page: MakePage
) -> None:
    keeper = await make_keeper("a")
    async with channels.use(keeper.member.address, "") as channel:
        asked = channel.stream_stream(f"/{SERVICE}/Put")
        call = asked(iter(BROKEN_PUTS[what]), metadata=channels.metadata, timeout=30)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async for _ in call:
                pass
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert keeper.server.counts.refused == 1
    assert (keeper.server.incoming_bytes, len(keeper.store.memory.ledger)) == (0, 0)
    assert await calls.put(keeper.member, [offer(make_page(1))]) == ["stored"]


@pytest.mark.parametrize("method", ["Have", "Get", "Doubt"])
@pytest.mark.parametrize("keys", [b"", b"x" * 33, bytes(32 * (MOST_KEYS + 1))])
async def test_broken_questions_are_refused(
    method: str, keys: bytes, channels: Any, make_keeper: Any
) -> None:
    keeper = await make_keeper("a")
    kind = pb.DoubtRequest if method == "Doubt" else pb.PageKeys
    async with channels.use(keeper.member.address, "") as channel:
        open_call = channel.unary_stream if method == "Get" else channel.unary_unary
        call = open_call(f"/{SERVICE}/{method}")(
            kind(keys=keys).SerializeToString(), metadata=channels.metadata, timeout=30
        )
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await (call.read() if method == "Get" else call)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_caller_that_stalls_loses_its_call_and_what_it_reserved(
    channels: Any, make_keeper: Any, make_page: MakePage, until: Any
) -> None:
    keeper = await make_keeper("a", progress_s=0.2)
    keeper.store.put(make_page(1, nbytes=1 << 23))
    async with channels.use(keeper.member.address, "") as channel:
        put = channel.stream_stream(f"/{SERVICE}/Put")(metadata=channels.metadata, timeout=60)
        await put.write(write_part(pb.PutPart(offer=[HEAD])))
        await put.read()
        assert keeper.server.incoming_bytes == 100
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await put.read()
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert keeper.server.incoming_bytes == 0
        get = channel.unary_stream(f"/{SERVICE}/Get")(
            pb.PageKeys(keys=make_page(1).key).SerializeToString(),
            metadata=channels.metadata,
            timeout=60,
        )
        await until(lambda: keeper.server.counts.late == 2)  # it reads nothing
        get.cancel()
    assert keeper.store.memory.ledger.pinned_bytes == 0


async def test_a_caller_that_leaves_midway_leaves_nothing(
    channels: Any, make_keeper: Any, until: Any
) -> None:
    keeper = await make_keeper("a")
    async with channels.use(keeper.member.address, "") as channel:
        put = channel.stream_stream(f"/{SERVICE}/Put")(metadata=channels.metadata)
        await put.write(write_part(pb.PutPart(offer=[HEAD])))
        await put.read()
        await put.write(write_part(pb.PutPart(digest=bytes(16)), b"abc"))
        put.cancel()
    await until(lambda: not keeper.server.incoming_bytes)
    assert len(keeper.store.memory.ledger) == 0


async def test_strangers_are_refused(channels: Any, make_keeper: Any) -> None:
    keeper = await make_keeper("a")
    async with channels.use(keeper.member.address, "") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await channel.unary_unary(f"/{SERVICE}/Stats")(b"", timeout=30)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_member_that_answers_nonsense_is_unavailable(
    calls: CacheCalls, make_keeper: Any, make_page: MakePage
) -> None:
    keeper = await make_keeper("a")
    one, other = make_page(1), make_page(2)
    keeper.store.memory.put(one)
    keeper.store.memory._pages[one.key] = StoredPage(one.key, one.namespace, b"short", one.body)
    with pytest.raises(UnavailableError, match="digest"):
        await got(calls, keeper.member, [one])
    await keeper.grpc_server.stop(None)
    with pytest.raises(UnavailableError, match="cache member"):
        await calls.have(keeper.member, [other.key], soon())


@given(st.binary(max_size=200))
@settings(max_examples=60)
def test_any_bytes_are_understood_or_refused(content: bytes) -> None:
    for kind in (pb.PageKeys, pb.PutPart, pb.PagePart, pb.HaveReply, pb.PutReply, pb.DoubtRequest):
        try:
            message, data = read_part(kind, content)
            if isinstance(message, pb.PageKeys):
                assert write_keys(read_keys(message.keys)) == message.keys
            if isinstance(message, pb.PagePart):
                key, namespace, nbytes = read_head(message.head)
                gathering = PageGathering(key, namespace, nbytes)
                gathering.add(message.digest, data)
        except InvalidRequestError:
            pass
        with contextlib.suppress(InvalidRequestError):
            read_message(kind, content)
