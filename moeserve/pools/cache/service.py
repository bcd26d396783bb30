"""A member of the cache pool as others reach it (``cache.proto``), over one store.

What callers send is not believed: sizes are claims until the bytes have come, a digest is checked
before a page is kept, and everything has a bound: keys of a call, calls at once, bytes on their way
in. A store that is full, or a budget that is used up, is an answer like others; a call that breaks
the protocol ends with INVALID_ARGUMENT, and one whose caller neither reads nor sends for
``PROGRESS_S`` with DEADLINE_EXCEEDED. Other calls notice nothing of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import grpc

from moeserve.errors import DeadlineError, ExhaustedError, InvalidRequestError, MoeserveError
from moeserve.pb import cache_pb2 as pb
from moeserve.pools.cache.keys import Namespace, PageKey
from moeserve.pools.cache.memory import OVERHEAD
from moeserve.pools.cache.messages import (
    MOST_OFFERED,
    SERVICE,
    WANTED,
    PageGathering,
    head_of,
    leading,
    parts_of,
    read_head,
    read_keys,
    read_message,
    read_part,
    write_part,
)
from moeserve.pools.cache.store import PageStore, PutOutcome
from moeserve.pools.members import MemberLoad

log = logging.getLogger(__name__)

# A caller that reads or sends nothing for so long has lost its call.
PROGRESS_S = 10.0
# Calls that read pages, and calls that bring some, at once.
MOST_GETS = 256
MOST_PUTS = 256
# Of the memory's bytes, how many may be on their way in; one page may in any case.
INCOMING = 0.25

Context = grpc.aio.ServicerContext[Any, Any]
Offer = tuple[PageKey, Namespace, int]
T = TypeVar("T")


@dataclass(slots=True)
class ServiceCounts:
    """Calls since the start; ``busy`` were refused for there were too many, ``late`` ended for
    their caller was, ``refused`` broke the protocol."""

    gets: int = 0
    puts: int = 0
    busy: int = 0
    late: int = 0
    refused: int = 0
    sent_bytes: int = 0
    came_bytes: int = 0


class CacheServer:
    """Answers on the event loop of the store."""

    def __init__(self, store: PageStore, *, progress_s: float = PROGRESS_S) -> None:
        self.counts = ServiceCounts()
        self._store = store
        self._progress_s = progress_s
        self._gets = 0
        self._puts = 0
        self._incoming = 0
        self._said_small = False

    def handlers(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Have": grpc.unary_unary_rpc_method_handler(self._have),
                "Get": grpc.unary_stream_rpc_method_handler(self._get),
                "Put": grpc.stream_stream_rpc_method_handler(self._put),
                "Doubt": grpc.unary_unary_rpc_method_handler(self._doubt),
                "Stats": grpc.unary_unary_rpc_method_handler(self._stats),
            },
        )

    @property
    def incoming_bytes(self) -> int:
        """Of pages that are on their way in."""
        return self._incoming

    def load(self, *, draining: bool = False) -> MemberLoad:
        """What its next heartbeat says."""
        store = self._store
        return MemberLoad(
            running=self._gets + self._puts,
            draining=draining,
            stored_bytes=store.stored_bytes,
            capacity_bytes=store.capacity_bytes,
        )

    async def _have(self, request: bytes, context: Context) -> bytes:
        try:
            keys = read_keys(read_message(pb.PageKeys, request).keys)
        except InvalidRequestError as error:
            await self._end(context, error)
        sizes = [self._store.size_of(key) for key in keys]
        held = bytes(size is not None for size in sizes)
        nbytes = sum(size or 0 for size in sizes[: leading(held)])
        return pb.HaveReply(held=held, nbytes=nbytes).SerializeToString()

    async def _get(self, request: bytes, context: Context) -> None:
        try:
            keys = read_keys(read_message(pb.PageKeys, request).keys)
            if self._gets >= MOST_GETS:
                raise ExhaustedError(f"{self._gets} calls read pages here: ask again later")
            self._gets += 1
            try:
                await self._send(keys, context)
            finally:
                self._gets -= 1
        except MoeserveError as error:
            await self._end(context, error)

    async def _send(self, keys: Sequence[PageKey], context: Context) -> None:
        self.counts.gets += 1
        self._store.touch(keys)
        for key in keys:
            page = await self._store.get(key)
            if page is None:
                return
            with self._store.memory.in_use(page):
                head: pb.PageHead | None = head_of(key, page.namespace, page.nbytes)
                for digest, data in parts_of(page):
                    part = write_part(pb.PagePart(head=head, digest=digest), data)
                    await self._soon(context.write(part))
                    self.counts.sent_bytes += len(data)
                    head = None

    async def _put(self, requests: AsyncIterator[bytes], context: Context) -> None:
        try:
            if self._puts >= MOST_PUTS:
                raise ExhaustedError(f"{self._puts} calls bring pages here: try again later")
            self._puts += 1
            try:
                await self._take(requests, context)
            finally:
                self._puts -= 1
        except MoeserveError as error:
            await self._end(context, error)

    async def _take(self, requests: AsyncIterator[bytes], context: Context) -> None:
        self.counts.puts += 1
        first, data = await self._next(requests)
        if not 0 < len(first.offer) <= MOST_OFFERED or data.nbytes:
            raise InvalidRequestError(
                f"{len(first.offer)} pages are offered: expected 1 to {MOST_OFFERED}, and no bytes"
            )
        offers = [read_head(head) for head in first.offer]
        outcomes = self._want(offers)
        reserved = sum(
            offer[2] for offer, what in zip(offers, outcomes, strict=True) if what == WANTED
        )
        self._incoming += reserved
        try:
            await self._soon(context.write(_reply(outcomes)))
            for at, offer in enumerate(offers):
                if outcomes[at] == WANTED:
                    outcomes[at] = await self._take_page(requests, offer)
            await self._soon(context.write(_reply(outcomes)))
        finally:
            self._incoming -= reserved

    def _want(self, offers: Sequence[Offer]) -> list[str]:
        """An answer to each page of an offer."""
        room = int(INCOMING * self._store.memory.ledger.capacity) - self._incoming
        outcomes: list[str] = []
        seen: set[PageKey] = set()
        for key, namespace, nbytes in offers:
            if key in seen or self._store.size_of(key) is not None:
                self._store.touch([key])
                outcomes.append(PutOutcome.HELD)
            elif (nbytes > room and (self._incoming or WANTED in outcomes)) or (
                not self._store.could_hold(namespace, nbytes)
            ):
                self._refuse(nbytes)
                outcomes.append(PutOutcome.FULL)
            else:
                room -= nbytes
                outcomes.append(WANTED)
            seen.add(key)
        return outcomes

    def _refuse(self, nbytes: int) -> None:
        """Counts it, and says so once where no page of this size can ever be kept."""
        self._store.counts.full += 1
        quota = self._store.memory.ledger.quota
        if nbytes + OVERHEAD > quota and not self._said_small:
            self._said_small = True
            log.warning(
                "a page of %d bytes does not fit: a tenant has %d bytes of memory here; raise "
                "cache_memory, or cache_share",
                nbytes,
                quota,
            )

    async def _take_page(self, requests: AsyncIterator[bytes], offer: Offer) -> PutOutcome:
        gathering = PageGathering(*offer)
        while True:
            part, data = await self._next(requests)
            if part.offer:
                raise InvalidRequestError("a second offer in one call")
            page = gathering.add(part.digest, data)
            self.counts.came_bytes += data.nbytes
            if page is not None:
                return self._store.put(page)

    async def _doubt(self, request: bytes, context: Context) -> bytes:
        try:
            message = read_message(pb.DoubtRequest, request)
            keys = read_keys(message.keys)
        except InvalidRequestError as error:
            await self._end(context, error)
        dropped = 0
        for key in keys:
            dropped += self._store.drop(key) if message.drop else await self._store.doubt(key)
        return pb.DoubtReply(dropped=dropped).SerializeToString()

    async def _stats(self, request: bytes, context: Context) -> bytes:
        store = self._store
        counts = {**asdict(self.counts), **store.counted()}
        return pb.StatsReply(
            stored_bytes=store.stored_bytes, capacity_bytes=store.capacity_bytes, counts=counts
        ).SerializeToString()

    async def _next(self, requests: AsyncIterator[bytes]) -> tuple[pb.PutPart, memoryview]:
        try:
            content = await self._soon(anext(requests))
        except StopAsyncIteration:
            raise InvalidRequestError("the call ended before what it offered had come") from None
        return read_part(pb.PutPart, content)

    async def _soon(self, waited: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(self._progress_s):
                return await waited
        except TimeoutError:
            raise DeadlineError(
                f"the caller neither read nor sent for {self._progress_s:g} s"
            ) from None

    async def _end(self, context: Context, error: MoeserveError) -> None:
        self.counts.busy += isinstance(error, ExhaustedError)
        self.counts.late += isinstance(error, DeadlineError)
        self.counts.refused += isinstance(error, InvalidRequestError)
        await context.abort(grpc.StatusCode[error.code], error.message)


def _reply(outcomes: Sequence[str]) -> bytes:
    return pb.PutReply(outcomes=outcomes).SerializeToString()
