"""Calls to one cache member: what is asked of it, with a deadline on every wait.

A member that cannot be reached, answers late, or says what makes no sense raises UnavailableError;
that is the member's fault. An answer like "full" or "not here" is none.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from moeserve.comm.control.rpc import reason
from moeserve.errors import InvalidRequestError, MoeserveError, UnavailableError
from moeserve.pb import cache_pb2 as pb
from moeserve.pools.cache.keys import Namespace, PageKey
from moeserve.pools.cache.messages import (
    SERVICE,
    WANTED,
    PageGathering,
    head_of,
    leading,
    parts_of,
    read_head,
    read_message,
    read_part,
    write_keys,
    write_part,
)
from moeserve.pools.cache.pages import StoredPage
from moeserve.pools.cache.store import PutOutcome
from moeserve.pools.members import Member

Metadata = tuple[tuple[str, str], ...]


class Channels(Protocol):
    """Connections to members: ``pools.kv.channels.ChannelPool`` is one. ``metadata`` goes with
    every call."""

    @property
    def metadata(self) -> Metadata: ...

    def use(
        self, address: str, server_name: str
    ) -> AbstractAsyncContextManager[grpc.aio.Channel]: ...


@dataclass(frozen=True, slots=True)
class Offered:
    """A page that is made only where it is wanted."""

    key: PageKey
    namespace: Namespace
    nbytes: int
    make: Callable[[], StoredPage]


class CacheCalls:
    """``answer_s`` is what a member gets for a small answer, ``progress_s`` for the next part of a
    page, ``put_s`` for all of a put."""

    def __init__(
        self, channels: Channels, *, answer_s: float, progress_s: float, put_s: float
    ) -> None:
        self._channels = channels
        self._answer_s = answer_s
        self._progress_s = progress_s
        self._put_s = put_s

    async def have(
        self, member: Member, keys: Sequence[PageKey], deadline: float
    ) -> tuple[int, int]:
        """How many pages it has from the first on, and about how many bytes these are."""
        request = pb.PageKeys(keys=write_keys(keys))
        content = await self._ask(member, "Have", request, deadline)
        with _failures_of(member):
            reply = read_message(pb.HaveReply, content)
        if len(reply.held) != len(keys):
            raise UnavailableError(f"{member.address}: {len(reply.held)} of {len(keys)} answers")
        return leading(reply.held), reply.nbytes

    async def get(
        self,
        member: Member,
        keys: Sequence[PageKey],
        deadline: float,
        room: bytearray | None = None,
    ) -> AsyncGenerator[StoredPage, None]:
        """Pages in the order of their keys, until it lacks one; not checked. The deadline is of
        ``time.monotonic``. Those that fit lie in ``room``, each until the next is asked for."""
        with _failures_of(member):
            async with self._channels.use(member.address, member.server_name) as channel:
                asked: Any = channel.unary_stream(f"/{SERVICE}/Get")
                request = pb.PageKeys(keys=write_keys(keys)).SerializeToString()
                call = asked(request, metadata=self._channels.metadata)
                try:
                    for key in keys:
                        page = await self._receive(call, key, deadline, room)
                        if page is None:
                            return
                        yield page
                finally:
                    call.cancel()

    async def put(self, member: Member, pages: Sequence[Offered]) -> list[str]:
        """What became of each: of ``PutOutcome``."""
        with _failures_of(member):
            async with (
                asyncio.timeout(self._put_s),
                self._channels.use(member.address, member.server_name) as channel,
            ):
                asked: Any = channel.stream_stream(f"/{SERVICE}/Put")
                call = asked(metadata=self._channels.metadata, timeout=self._put_s)
                try:
                    return await _offer(call, pages)
                finally:
                    call.cancel()

    async def doubt(self, member: Member, keys: Sequence[PageKey], *, drop: bool) -> None:
        request = pb.DoubtRequest(keys=write_keys(keys), drop=drop)
        await self._ask(member, "Doubt", request, time.monotonic() + self._answer_s)

    async def stats(self, member: Member) -> pb.StatsReply:
        deadline = time.monotonic() + self._answer_s
        content = await self._ask(member, "Stats", pb.StatsRequest(), deadline)
        with _failures_of(member):
            return read_message(pb.StatsReply, content)

    async def _ask(self, member: Member, method: str, request: Any, deadline: float) -> bytes:
        left = min(self._answer_s, deadline - time.monotonic())
        with _failures_of(member):
            async with self._channels.use(member.address, member.server_name) as channel:
                asked: Any = channel.unary_unary(f"/{SERVICE}/{method}")
                content: object = await asked(
                    request.SerializeToString(), metadata=self._channels.metadata, timeout=left
                )
                if not isinstance(content, bytes):  # a call that ends well without an answer
                    raise InvalidRequestError(f"no answer to {method}")
        return content

    async def _receive(
        self, call: Any, key: PageKey, deadline: float, room: bytearray | None
    ) -> StoredPage | None:
        gathering: PageGathering | None = None
        while True:
            left = min(self._progress_s, deadline - time.monotonic())
            async with asyncio.timeout(left):
                content = await call.read()
            if not isinstance(content, bytes):  # the end
                if gathering is not None:
                    raise InvalidRequestError("a page was cut off")
                return None
            part, data = read_part(pb.PagePart, content)
            if gathering is None:
                found, namespace, nbytes = read_head(part.head)
                if found != key:
                    raise InvalidRequestError("another page was sent than was asked for")
                gathering = PageGathering(found, namespace, nbytes, room)
            page = gathering.add(part.digest, data)
            if page is not None:
                return page


async def _offer(call: Any, pages: Sequence[Offered]) -> list[str]:
    heads = [head_of(page.key, page.namespace, page.nbytes) for page in pages]
    await call.write(write_part(pb.PutPart(offer=heads)))
    wanted = await _outcomes(call, len(pages))
    if WANTED not in wanted:
        return wanted
    for page, outcome in zip(pages, wanted, strict=True):
        if outcome == WANTED:
            for digest, data in parts_of(await asyncio.to_thread(page.make)):
                await call.write(write_part(pb.PutPart(digest=digest), data))
    await call.done_writing()
    return await _outcomes(call, len(pages))


async def _outcomes(call: Any, count: int) -> list[str]:
    content = await call.read()
    if not isinstance(content, bytes):
        raise InvalidRequestError("no answer to an offer")
    outcomes = list(read_message(pb.PutReply, content).outcomes)
    if len(outcomes) != count or not set(outcomes) <= {WANTED, *PutOutcome}:
        raise InvalidRequestError(f"{len(outcomes)} answers to {count} offers")
    return outcomes


@contextmanager
def _failures_of(member: Member) -> Iterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise UnavailableError(f"cache member {member.address}: {reason(error)}") from error
    except (TimeoutError, asyncio.InvalidStateError) as error:
        raise UnavailableError(f"cache member {member.address}: no answer in time") from error
    except UnavailableError:
        raise
    except MoeserveError as error:
        raise UnavailableError(f"cache member {member.address}: {error.message}") from error
