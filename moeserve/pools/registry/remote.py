"""A registry in another process, over gRPC (``registry.proto``): the other end of ``embedded``.

Every call answers or fails within ``CALL_S``; a watch lives until the registry is lost, which
gRPC's keepalive finds out, and then raises UnavailableError. A member that this release cannot read
is passed over, and counted in ``unreadable``.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Any

import grpc
from google.protobuf.message import Message

from moeserve.comm.control.rpc import reason
from moeserve.engine.ranks.messages import parse
from moeserve.errors import (
    ConfigError,
    ExhaustedError,
    InvalidRequestError,
    MoeserveError,
    NotFoundError,
    UnavailableError,
)
from moeserve.pb import registry_pb2 as pb
from moeserve.pools.members import Report, read_report, write_load
from moeserve.pools.registry.base import (
    CALL_S,
    EVERYTHING,
    MOST_BEAT_S,
    Changes,
    Interest,
    Registry,
)
from moeserve.pools.registry.embedded import SERVICE

log = logging.getLogger(__name__)

# What a registry may answer, as our errors; everything else is that it is not reached.
_ANSWERS: dict[grpc.StatusCode, type[MoeserveError]] = {
    grpc.StatusCode[kind.code]: kind
    for kind in (InvalidRequestError, NotFoundError, ExhaustedError)
}


class RemoteRegistry(Registry):
    """See ``base.Registry``. ``where`` names it in errors; ``metadata`` goes with every call. The
    channel becomes its own."""

    def __init__(
        self, where: str, channel: grpc.aio.Channel, metadata: Sequence[tuple[str, str]]
    ) -> None:
        self._where = where
        self._channel = channel
        self._metadata = tuple(metadata)
        self.unreadable = 0
        self._beat_s = 0.0

    def __str__(self) -> str:
        return self._where

    async def join(self, report: Report) -> None:
        reply = await self._ask("Join", pb.JoinRequest(report=report.to_json().encode()))
        self._hear_beat(parse(pb.JoinReply, reply).beat_s)

    async def renew(self, report: Report) -> None:
        load = write_load(report.load).encode()
        reply = await self._ask("Renew", pb.RenewRequest(id=report.member.id, load=load))
        self._hear_beat(parse(pb.RenewReply, reply).beat_s)

    @property
    def beat_s(self) -> float:
        return self._beat_s

    async def leave(self, member_id: str) -> None:
        await self._ask("Leave", pb.LeaveRequest(id=member_id))

    async def watch(self, interest: Interest = EVERYTHING) -> AsyncGenerator[Changes, None]:
        request = pb.WatchRequest(roles=sorted(interest.roles), loads=interest.loads)
        open_stream: Any = self._channel.unary_stream(f"/{SERVICE}/Watch")
        call = open_stream(request.SerializeToString(), metadata=self._metadata)
        try:
            async for content in call:
                yield self._read(parse(pb.MemberChanges, content))
        except grpc.aio.AioRpcError as error:
            raise self._as_ours(error) from error
        finally:
            call.cancel()
        raise UnavailableError(f"registry {self._where} ended the watch: try again")

    def parts(self) -> tuple[Registry, ...]:
        return (self,)

    async def close(self) -> None:
        await self._channel.close()

    def _hear_beat(self, beat_s: float) -> None:
        """Whatever it says, a lease is kept."""
        self._beat_s = min(max(0.0, beat_s), MOST_BEAT_S)

    async def _ask(self, method: str, request: Message) -> bytes:
        ask: Any = self._channel.unary_unary(f"/{SERVICE}/{method}")
        content = request.SerializeToString()
        try:
            reply: bytes = await ask(content, timeout=CALL_S, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise self._as_ours(error) from error
        return reply

    def _as_ours(self, error: grpc.aio.AioRpcError) -> MoeserveError:
        kind = _ANSWERS.get(error.code(), UnavailableError)
        if error.code() is grpc.StatusCode.UNAUTHENTICATED:
            kind = ConfigError
        return kind(f"registry {self._where}: {reason(error)}")

    def _read(self, message: pb.MemberChanges) -> Changes:
        reports = tuple(self._readable(message.put))
        left, expired = tuple(message.left), tuple(message.expired)
        return Changes(reports, left, expired, message.whole, max(0.0, message.settle_s))

    def _readable(self, contents: Iterable[bytes]) -> Iterable[Report]:
        for content in contents:
            try:
                yield read_report(content)
            except InvalidRequestError as error:
                self.unreadable += 1
                log.warning("registry %s: a member is passed over: %s", self._where, error.message)
