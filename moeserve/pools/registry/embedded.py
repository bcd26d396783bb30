"""A registry of this process as others reach it (``registry.proto``), beside whatever else its
server answers.

What a caller sends is not believed: a call whose bytes are no message, whose report is of no member
or whose lease is unknown ends with the status of our error, and others notice nothing of it. A
watcher has one stream for as long as it lives; gRPC's keepalive finds one that is dead
(``comm.control.rpc``), and what waits for one that is slow is bounded by the number of members.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import Message

from moeserve.engine.ranks.messages import parse
from moeserve.errors import InvalidRequestError, MoeserveError
from moeserve.pb import registry_pb2 as pb
from moeserve.pools.members import Role, read_load, read_report
from moeserve.pools.registry.base import Changes, Interest
from moeserve.pools.registry.memory import MemoryRegistry

SERVICE = "moeserve.registry.RegistryService"
# How often a watcher is written to at most: what comes in between goes together.
GATHER_S = 0.1

Context = grpc.aio.ServicerContext[Any, Any]


class RegistryServer:
    """Answers calls of ``registry.proto`` from ``registry``."""

    def __init__(self, registry: MemoryRegistry) -> None:
        self._registry = registry

    def handlers(self) -> grpc.GenericRpcHandler:
        unary = grpc.unary_unary_rpc_method_handler
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Join": unary(_answering(self._join)),
                "Renew": unary(_answering(self._renew)),
                "Leave": unary(_answering(self._leave)),
                "Watch": grpc.unary_stream_rpc_method_handler(self._watch),
            },
        )

    async def _join(self, content: bytes) -> Message:
        await self._registry.join(read_report(parse(pb.JoinRequest, content).report))
        return pb.JoinReply(beat_s=self._registry.beat_s)

    async def _renew(self, content: bytes) -> Message:
        request = parse(pb.RenewRequest, content)
        self._registry.renew_lease(request.id, read_load(request.load))
        return pb.RenewReply(beat_s=self._registry.beat_s)

    async def _leave(self, content: bytes) -> Message:
        await self._registry.leave(parse(pb.LeaveRequest, content).id)
        return pb.LeaveReply()

    async def _watch(self, content: bytes, context: Context) -> None:
        try:
            interest = _read_interest(parse(pb.WatchRequest, content))
            async with contextlib.aclosing(self._registry.watch(interest)) as news:
                async for changes in news:
                    await context.write(_write_changes(changes).SerializeToString())
                    await asyncio.sleep(GATHER_S)
        except MoeserveError as error:
            await context.abort(grpc.StatusCode[error.code], error.message)


def _answering(
    answer: Callable[[bytes], Awaitable[Message]],
) -> Callable[[bytes, Context], Awaitable[bytes]]:
    async def handle(content: bytes, context: Context) -> bytes:
        try:
            reply = await answer(content)
        except MoeserveError as error:
            await context.abort(grpc.StatusCode[error.code], error.message)
        return reply.SerializeToString()

    return handle


def _read_interest(request: pb.WatchRequest) -> Interest:
    try:
        roles = frozenset(Role(name) for name in request.roles)
    except ValueError as error:
        raise InvalidRequestError(f"roles: {error}: expected some of {list(Role)}") from error
    return Interest(roles or frozenset(Role), request.loads)


def _write_changes(changes: Changes) -> pb.MemberChanges:
    return pb.MemberChanges(
        put=[report.to_json().encode() for report in changes.put],
        left=changes.left,
        expired=changes.expired,
        whole=changes.whole,
        settle_s=changes.settle_s,
    )
