"""A registry in etcd, over its gRPC v3 API: members are keys with leases.

A member's key is ``PREFIX/members/ID``, and its value the report as JSON. Each heartbeat renews the
lease and writes the newest load, a fast call each. Who leaves writes an empty value before it gives
up the lease, so that watchers tell it from one that fell silent. What others wrote is not believed:
a value that is no report, or of another key, is passed over and counted in ``unreadable``.

etcd counts leases by its own monotonic clock. One that was stopped longer than a lease drops all
members as it goes on; they join again with their next beat, and a view keeps them that long
(``view``). Several endpoints of one etcd are used in turn, the next when one fails. Everything else
that etcd can do (its users and passwords among them) is not used here.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from moeserve.comm.control.rpc import reason
from moeserve.engine.ranks.messages import parse
from moeserve.errors import InvalidRequestError, NotFoundError, UnavailableError
from moeserve.pb import etcd_pb2 as pb
from moeserve.pools.members import Report, check_member, read_report
from moeserve.pools.registry.base import (
    CALL_S,
    EVERYTHING,
    LEASE_S,
    MOST_MEMBERS,
    Changes,
    Interest,
    Registry,
)

log = logging.getLogger(__name__)

_KV, _LEASE, _WATCH = "/etcdserverpb.KV", "/etcdserverpb.Lease", "/etcdserverpb.Watch"
_LEFT = b""

M = TypeVar("M", bound=Message)


class EtcdRegistry(Registry):
    """See ``base.Registry``. ``channels`` are to endpoints of one etcd and become its own;
    ``prefix`` is the cluster's. Leases are of whole seconds."""

    def __init__(
        self, channels: Sequence[grpc.aio.Channel], prefix: str, lease_s: float = LEASE_S
    ) -> None:
        assert channels
        self._channels = tuple(channels)
        self._used = 0
        self._prefix = f"{prefix}/members/".encode()
        self._ttl = math.ceil(lease_s)
        self._leases: dict[str, int] = {}
        self.unreadable = 0

    def __str__(self) -> str:
        return f"etcd {self._prefix.decode()}"

    async def join(self, report: Report) -> None:
        check_member(report.member)
        asked = pb.LeaseGrantRequest(TTL=self._ttl)
        granted = await self._ask(f"{_LEASE}/LeaseGrant", asked, pb.LeaseGrantResponse)
        if granted.error:
            raise UnavailableError(f"{self}: no lease is granted: {granted.error}")
        await self._put(report, granted.ID)
        self._leases[report.member.id] = granted.ID

    async def renew(self, report: Report) -> None:
        member_id = report.member.id
        lease = self._leases.get(member_id)
        if lease is None:
            raise NotFoundError(f"{self}: member {member_id} has no lease: join again")
        if not await self._keep(lease):
            del self._leases[member_id]
            raise NotFoundError(f"{self}: the lease of {member_id} has run out: join again")
        await self._put(report, lease)

    async def leave(self, member_id: str) -> None:
        """Of members that joined here."""
        lease = self._leases.pop(member_id, None)
        if lease is None:
            return
        goodbye = pb.PutRequest(key=self._key(member_id), value=_LEFT, lease=lease)
        await self._ask(f"{_KV}/Put", goodbye, pb.Answered)
        await self._ask(f"{_LEASE}/LeaseRevoke", pb.LeaseRevokeRequest(ID=lease), pb.Answered)

    async def watch(self, interest: Interest = EVERYTHING) -> AsyncGenerator[Changes, None]:
        everything = pb.RangeRequest(
            key=self._prefix, range_end=_end_of(self._prefix), limit=MOST_MEMBERS
        )
        found = await self._ask(f"{_KV}/Range", everything, pb.RangeResponse)
        known = _Known(interest)
        reports = (self._readable(item) for item in found.kvs)
        yield known.all_of([report for report in reports if report is not None])
        open_stream: Any = self._channel().stream_stream(f"{_WATCH}/Watch")
        call = open_stream()
        created = pb.WatchCreateRequest(
            key=self._prefix,
            range_end=_end_of(self._prefix),
            start_revision=found.header.revision + 1,
            fragment=True,
        )
        try:
            await call.write(pb.WatchRequest(create_request=created).SerializeToString())
            while (content := await call.read()) is not grpc.aio.EOF:
                message = parse(pb.WatchResponse, content)
                if message.canceled:
                    break
                changes = self._read(message.events, known)
                if changes != Changes():
                    yield changes
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise self._lost(error) from error
        finally:
            call.cancel()
        raise UnavailableError(f"{self} ended the watch: try again")

    def parts(self) -> tuple[Registry, ...]:
        return (self,)

    async def close(self) -> None:
        await asyncio.gather(*(channel.close() for channel in self._channels))

    def _key(self, member_id: str) -> bytes:
        return self._prefix + member_id.encode()

    async def _put(self, report: Report, lease: int) -> None:
        key, value = self._key(report.member.id), report.to_json().encode()
        try:
            asked = pb.PutRequest(key=key, value=value, lease=lease)
            await self._ask(f"{_KV}/Put", asked, pb.Answered)
        except NotFoundError:
            self._leases.pop(report.member.id, None)
            raise

    async def _keep(self, lease: int) -> bool:
        """Whether there still is such a lease."""
        open_stream: Any = self._channel().stream_stream(f"{_LEASE}/LeaseKeepAlive")
        call = open_stream(timeout=CALL_S)
        try:
            await call.write(pb.LeaseKeepAliveRequest(ID=lease).SerializeToString())
            content = await call.read()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise self._lost(error) from error
        finally:
            call.cancel()
        if content is grpc.aio.EOF:
            raise UnavailableError(f"{self} does not answer: try again")
        return parse(pb.LeaseKeepAliveResponse, content).TTL > 0

    async def _ask(self, path: str, request: Message, kind: type[M]) -> M:
        ask: Any = self._channel().unary_unary(path)
        try:
            content = await ask(request.SerializeToString(), timeout=CALL_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                raise NotFoundError(f"{self}: {reason(error)}: join again") from error
            raise self._lost(error) from error
        return parse(kind, content)

    def _channel(self) -> grpc.aio.Channel:
        return self._channels[self._used % len(self._channels)]

    def _lost(self, error: Exception) -> UnavailableError:
        self._used += 1
        why = reason(error) if isinstance(error, grpc.aio.AioRpcError) else "the call has ended"
        return UnavailableError(f"{self}: {why}")

    def _readable(self, item: pb.KeyValue) -> Report | None:
        if item.value == _LEFT:
            return None
        try:
            report = read_report(item.value)
            if self._key(report.member.id) != item.key:
                raise InvalidRequestError(f"key {item.key[:200]!r} holds {report.member.id}")
        except InvalidRequestError as error:
            self.unreadable += 1
            log.warning("%s: a member is passed over: %s", self, error.message)
            return None
        return report

    def _read(self, events: Iterable[pb.Event], known: _Known) -> Changes:
        for event in events:
            member_id = event.kv.key.removeprefix(self._prefix).decode(errors="replace")
            if event.type == pb.Event.DELETE:
                known.expire(member_id)
            elif event.kv.value == _LEFT:
                known.leave(member_id)
            elif (report := self._readable(event.kv)) is not None:
                known.put(report)
        return known.take()


class _Known:
    """The members that a watcher was told of, and what it has not been told."""

    def __init__(self, interest: Interest) -> None:
        self._interest = interest
        self._reports: dict[str, Report] = {}
        self._puts: dict[str, Report] = {}
        self._left: dict[str, None] = {}
        self._expired: dict[str, None] = {}

    def all_of(self, reports: Iterable[Report]) -> Changes:
        self._reports = {r.member.id: r for r in reports if self._interest.covers(r)}
        return Changes(tuple(self._reports.values()), whole=True)

    def put(self, report: Report) -> None:
        member_id = report.member.id
        if not self._interest.covers(report):
            return
        known = self._reports.get(member_id)
        if known is None and len(self._reports) >= MOST_MEMBERS:
            return
        self._reports[member_id] = report
        self._left.pop(member_id, None)
        self._expired.pop(member_id, None)
        told = known is not None and known.load.draining == report.load.draining
        if self._interest.loads or not told:
            self._puts[member_id] = report

    def leave(self, member_id: str) -> None:
        self._drop(member_id, self._left)

    def expire(self, member_id: str) -> None:
        self._drop(member_id, self._expired)

    def take(self) -> Changes:
        changes = Changes(tuple(self._puts.values()), tuple(self._left), tuple(self._expired))
        self._puts, self._left, self._expired = {}, {}, {}
        return changes

    def _drop(self, member_id: str, kind: dict[str, None]) -> None:
        if self._reports.pop(member_id, None) is not None:
            self._puts.pop(member_id, None)
            kind[member_id] = None


def _end_of(prefix: bytes) -> bytes:
    """The first key behind all that begin with ``prefix``, which ends with a slash."""
    return prefix[:-1] + bytes([prefix[-1] + 1])
