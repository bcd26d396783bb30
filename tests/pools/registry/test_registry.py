"""Members join registries, in this process and over sockets, and views follow them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.comm.control.rpc import Trust, open_channel, open_server, proof_metadata
from moeserve.errors import (
    ConfigError,
    ExhaustedError,
    InvalidRequestError,
    NotFoundError,
    UnavailableError,
)
from moeserve.pb import registry_pb2 as pb
from moeserve.pools.members import Member, MemberLoad, Report, Role
from moeserve.pools.registry.base import (
    BEATS_PER_S,
    EVERYTHING,
    HEARTBEAT_S,
    LEASE_S,
    MOST_BEAT_S,
    MOST_MEMBERS,
    Changes,
    Interest,
    Registry,
    beat_of,
)
from moeserve.pools.registry.connect import connect_registry
from moeserve.pools.registry.embedded import SERVICE, RegistryServer
from moeserve.pools.registry.follow import Follower
from moeserve.pools.registry.heartbeat import Heartbeat
from moeserve.pools.registry.memory import MemoryRegistry
from moeserve.pools.registry.view import ClusterView

WAIT_S = 20.0
RUN = b"a cluster"
TRUST = Trust(secret=b"known to the cluster")
PERIOD_S, SHORT_LEASE_S = 0.05, 0.5


def report(name: str, sequence: int = 1, role: Role = Role.DECODE) -> Report:
    return Report(Member(name, name, role, "127.0.0.1:80"), MemberLoad(sequence))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Gateway:
    """A registry that others reach. It can be stopped, and begin anew at the same port."""

    def __init__(self, lease_s: float = SHORT_LEASE_S) -> None:
        self._lease_s = lease_s
        self._port = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    async def start(self) -> None:
        self.registry = MemoryRegistry(lease_s=self._lease_s)
        handlers = [RegistryServer(self.registry).handlers()]
        self._server, self._port = open_server("127.0.0.1", TRUST, RUN, handlers, self._port)
        await self._server.start()

    async def stop(self) -> None:
        await self.registry.close()
        await self._server.stop(0)


@contextlib.asynccontextmanager
async def gateways(count: int, lease_s: float = SHORT_LEASE_S) -> AsyncIterator[list[Gateway]]:
    opened = [Gateway(lease_s) for _ in range(count)]
    for gateway in opened:
        await gateway.start()
    try:
        yield opened
    finally:
        for gateway in opened:
            await gateway.stop()


@contextlib.asynccontextmanager
async def connected(*gateways: Gateway) -> AsyncIterator[Registry]:
    registry = connect_registry([g.address for g in gateways], TRUST, RUN)
    try:
        yield registry
    finally:
        await registry.close()


@contextlib.asynccontextmanager
async def beating(registry: Registry, name: str, load: MemberLoad) -> AsyncIterator[Heartbeat]:
    heartbeat = Heartbeat(registry, report(name).member, lambda: load, PERIOD_S)
    heartbeat.start()
    try:
        assert await heartbeat.wait_joined(WAIT_S)
        yield heartbeat
    finally:
        await heartbeat.close()


@contextlib.asynccontextmanager
async def following(
    registry: Registry, interest: Interest = EVERYTHING
) -> AsyncIterator[tuple[ClusterView, Follower]]:
    view = ClusterView()
    follower = Follower(registry, view, interest)
    follower.start()
    try:
        yield view, follower
    finally:
        await follower.close()


async def until(holds: Callable[[], bool]) -> None:
    for _ in range(int(WAIT_S / PERIOD_S)):
        if holds():
            return
        await asyncio.sleep(PERIOD_S)
    raise AssertionError(f"it does not come to hold within {WAIT_S} s")


def ids(view: ClusterView) -> list[str]:
    return sorted(r.member.id for r in view.members())


async def heard(news: Any) -> Changes:
    return await asyncio.wait_for(anext(news), WAIT_S)


async def test_watchers_hear_of_what_they_want_to_know() -> None:
    registry = MemoryRegistry(Clock())
    all_of_it = registry.watch()
    caches = registry.watch(Interest(frozenset({Role.CACHE}), loads=False))
    assert await heard(all_of_it) == await heard(caches) == Changes(whole=True, settle_s=3.0)
    await registry.join(report("d", 1))
    await registry.join(report("c", 1, Role.CACHE))
    assert (await heard(caches)).put == (report("c", 1, Role.CACHE),)
    await registry.renew(report("d", 2))
    await registry.renew(report("c", 2, Role.CACHE))
    assert (await heard(all_of_it)).put == (report("d", 2), report("c", 2, Role.CACHE))
    draining = Report(report("c", role=Role.CACHE).member, MemberLoad(3, draining=True))
    await registry.renew(draining)
    assert (await heard(caches)).put == (draining,)
    await registry.leave("c")
    assert await heard(caches) == Changes(left=("c",))
    await registry.leave("nobody")
    await registry.close()
    for news in (all_of_it, caches):
        await asyncio.wait_for(news.aclose(), WAIT_S)


async def test_a_closed_registry_says_so() -> None:
    registry = MemoryRegistry()
    news = registry.watch()
    await heard(news)
    await registry.close()
    with pytest.raises(UnavailableError):
        await heard(news)
    with pytest.raises(UnavailableError):
        await registry.join(report("a"))


async def test_a_member_that_falls_silent_is_dropped() -> None:
    clock = Clock()
    registry = MemoryRegistry(clock)
    news = registry.watch()
    await heard(news)
    await registry.join(report("a"))
    await heard(news)
    waiting = asyncio.create_task(heard(news))
    while not waiting.done():
        clock.now += 0.1
        await asyncio.sleep(0.02)
    assert (await waiting).expired == ("a",)
    with pytest.raises(NotFoundError, match="join again"):
        await registry.renew(report("a", 2))
    await news.aclose()
    await registry.close()


async def test_a_watcher_that_is_stuck_costs_no_more_than_the_members(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("moeserve.pools.registry.memory.MOST_MEMBERS", 3)
    registry = MemoryRegistry()
    news = registry.watch()
    await heard(news)
    await registry.join(report("here"))
    for i in range(10):
        await registry.join(report(f"m{i}"))
        await registry.leave(f"m{i}")
    changes = await heard(news)
    assert changes.whole
    assert changes.put == (report("here"),)
    await registry.close()
    await news.aclose()


async def test_a_full_registry_takes_no_more() -> None:
    registry = MemoryRegistry(most=1)
    await registry.join(report("a"))
    await registry.join(report("a", 2))
    with pytest.raises(ExhaustedError, match="1 members at most"):
        await registry.join(report("b"))
    await registry.close()


async def test_members_join_over_sockets_and_views_follow() -> None:
    async with (
        gateways(1) as [gateway],
        connected(gateway) as registry,
        following(registry) as (view, _),
        following(gateway.registry) as (own, _),
    ):
        async with (
            beating(registry, "a", MemberLoad(running=3)) as beats,
            beating(registry, "b", MemberLoad()),
        ):
            for seen in (view, own):
                assert await seen.wait_for(lambda v: ids(v) == ["a", "b"], WAIT_S)
            assert await view.wait_for(_reached("a", 5), WAIT_S)
            found = view.get("a")
            assert found is not None
            assert found.load.running == 3
            assert beats.counts.joined == 1
            assert beats.counts.failed == 0
            assert beats.error is None
        for seen in (view, own):
            assert await seen.wait_for(lambda v: ids(v) == [], WAIT_S)


def _reached(name: str, sequence: int) -> Any:
    def enough(view: ClusterView) -> bool:
        found = view.get(name)
        return found is not None and found.load.sequence >= sequence

    return enough


async def test_errors_keep_their_kind_over_sockets() -> None:
    async with gateways(1) as [gateway], connected(gateway) as registry:
        [part] = registry.parts()
        with pytest.raises(NotFoundError, match="join again"):
            await part.renew(report("a"))
        await part.join(report("a"))
        elsewhere = Member("a", "a", Role.DECODE, "127.0.0.1:81")
        with pytest.raises(InvalidRequestError, match="an id of its own"):
            await part.join(Report(elsewhere))
        await part.leave("a")
        await part.join(Report(elsewhere))
    with pytest.raises(UnavailableError, match=r"registry 127\.0\.0\.1"):
        async with connected(gateway) as registry:
            await registry.join(report("a"))


async def test_who_is_not_of_the_cluster_is_refused() -> None:
    async with gateways(1) as [gateway]:
        stranger = connect_registry([gateway.address], Trust(secret=b"another"), RUN)
        with pytest.raises(ConfigError, match="ep_secret"):
            await stranger.join(report("a"))
        with pytest.raises(ConfigError, match="ep_secret"):
            await anext(stranger.watch())
        await stranger.close()
        assert (await heard(gateway.registry.watch())).put == ()


async def test_a_gateway_that_restarts_changes_nothing_for_a_view() -> None:
    async with (
        gateways(1) as [gateway],
        connected(gateway) as registry,
        following(registry) as (view, follower),
        beating(registry, "a", MemberLoad()),
        beating(registry, "b", MemberLoad()),
    ):
        assert await view.wait_for(lambda v: ids(v) == ["a", "b"], WAIT_S)
        gone: list[str] = []
        view.subscribe(lambda change: gone.extend(change.gone))
        await gateway.stop()
        await asyncio.sleep(2 * SHORT_LEASE_S)
        assert ids(view) == ["a", "b"]
        assert follower.connected == 0
        await gateway.start()
        async with following(gateway.registry) as (own, _):
            assert await own.wait_for(lambda v: ids(v) == ["a", "b"], WAIT_S)
        reached = {r.member.id: r.load.sequence + 2 for r in view.members()}
        for name, sequence in reached.items():
            assert await view.wait_for(_reached(name, sequence), WAIT_S)
        assert gone == []


async def test_one_gateway_of_two_is_enough() -> None:
    async with (
        gateways(2) as [first, second],
        connected(first, second) as registry,
        following(registry) as (view, _),
        following(second.registry) as (own, _),
        beating(registry, "a", MemberLoad()) as beats,
    ):
        assert await own.wait_for(lambda v: ids(v) == ["a"], WAIT_S)
        await first.stop()
        async with beating(registry, "b", MemberLoad()):
            assert await view.wait_for(lambda v: ids(v) == ["a", "b"], WAIT_S)
            assert await own.wait_for(lambda v: ids(v) == ["a", "b"], WAIT_S)
            await until(lambda: isinstance(beats.error, UnavailableError))
            await first.start()
            async with following(first.registry) as (its, _):
                assert await its.wait_for(lambda v: ids(v) == ["a", "b"], WAIT_S)
        assert await view.wait_for(lambda v: ids(v) == ["a"], WAIT_S)


async def test_a_member_without_a_heartbeat_is_dropped_from_the_view() -> None:
    async with (
        gateways(1) as [gateway],
        connected(gateway) as registry,
        following(registry) as (view, _),
        beating(registry, "a", MemberLoad()),
    ):
        await registry.join(report("dead"))
        assert await view.wait_for(lambda v: ids(v) == ["a", "dead"], WAIT_S)
        assert await view.wait_for(lambda v: ids(v) == ["a"], WAIT_S)


@pytest.mark.parametrize("method", ["Join", "Renew", "Leave", "Watch"])
@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xff\xff",
        pb.JoinRequest(report=b"{").SerializeToString(),
        pb.RenewRequest(id="x" * 1000, load=b"{}").SerializeToString(),
        pb.RenewRequest(id="b", load=b"[" * 9000).SerializeToString(),
        pb.WatchRequest(roles=["king"]).SerializeToString(),
    ],
)
async def test_what_a_confused_member_sends_harms_nobody(method: str, content: bytes) -> None:
    async with (
        gateways(1) as [gateway],
        connected(gateway) as registry,
        following(gateway.registry) as (view, _),
        beating(registry, "a", MemberLoad()),
    ):
        host, _, port = gateway.address.rpartition(":")
        channel = open_channel(host, int(port), TRUST, "")
        metadata = proof_metadata(TRUST, RUN)
        path = f"/{SERVICE}/{method}"
        call: Any = channel.unary_stream(path)(content, metadata=metadata, timeout=1.0)
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for _ in call:
                break
        code = await call.code() if method != "Watch" else None
        assert code in (
            None,
            grpc.StatusCode.OK,
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.StatusCode.NOT_FOUND,
        )
        call.cancel()
        await channel.close()
        before = view.get("a")
        assert await view.wait_for(
            _reached("a", 2 + (before.load.sequence if before else 0)), WAIT_S
        )
        assert ids(view) == ["a"]


async def test_no_addresses_and_wrong_ones_are_explained() -> None:
    with pytest.raises(ConfigError, match="0 registries"):
        connect_registry([], TRUST, RUN)
    with pytest.raises(ConfigError, match="expected host:port"):
        connect_registry(["somewhere"], TRUST, RUN)


async def test_a_member_that_is_none_is_told_at_the_start() -> None:
    member = Member("a", "a", Role.DECODE, "nowhere")
    with pytest.raises(InvalidRequestError, match="host:port"):
        Heartbeat(MemoryRegistry(), member, MemberLoad)


async def test_a_member_that_another_one_signs_off_comes_back() -> None:
    async with (
        gateways(1) as [gateway],
        connected(gateway) as registry,
        beating(registry, "a", MemberLoad()) as beats,
    ):
        await registry.leave("a")
        await until(lambda: beats.counts.joined == 2)
        async with following(registry) as (view, _):
            assert await view.wait_for(lambda v: ids(v) == ["a"], WAIT_S)


async def test_a_load_that_cannot_be_told_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> MemberLoad:
        raise ZeroDivisionError("a bug")

    heartbeat = Heartbeat(MemoryRegistry(), report("a").member, broken, PERIOD_S)
    heartbeat.start()
    assert not await heartbeat.wait_joined(2 * PERIOD_S)
    assert "a bug" in caplog.text
    await heartbeat.close()


@given(st.integers(0, MOST_MEMBERS))
def test_the_more_members_the_less_often_each_beats_and_leases_are_kept(members: int) -> None:
    period_s = max(HEARTBEAT_S, beat_of(members))
    assert period_s <= max(HEARTBEAT_S, beat_of(members + 1)) <= LEASE_S / 3
    assert members / period_s <= BEATS_PER_S + 1e-6 or period_s == LEASE_S / 3


async def test_members_are_told_over_sockets_how_often_to_beat() -> None:
    async with gateways(1, lease_s=60.0) as [gateway], connected(gateway) as registry:
        (part,) = registry.parts()
        await part.join(report("a"))
        assert part.beat_s == 0.0
        for there, count, expected in ((1, 300, 300 / BEATS_PER_S), (300, 800, MOST_BEAT_S)):
            for i in range(there, count):
                await gateway.registry.join(report(f"m{i}"))
            await part.renew(report("a", sequence=count))
            assert part.beat_s == pytest.approx(expected)


async def test_a_member_that_is_told_to_beats_less_often_and_still_tells_at_once() -> None:
    class Crowded(MemoryRegistry):
        @property
        def beat_s(self) -> float:
            return 600.0

    registry = Crowded()
    async with beating(registry, "a", MemberLoad()) as beats:
        await asyncio.sleep(4 * PERIOD_S)
        assert beats.counts.taken == 1
        beats.beat_now()
        await until(lambda: beats.counts.taken == 2)
    await registry.close()
