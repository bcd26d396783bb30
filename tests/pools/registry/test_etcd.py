"""The real etcd as a registry: members that are killed, an etcd that is stopped, and what others
wrote into it."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from moeserve.comm.control.rpc import Trust, open_channel
from moeserve.errors import ConfigError, NotFoundError, UnavailableError
from moeserve.pb import etcd_pb2 as pb
from moeserve.pools.members import Member, MemberLoad, Report, Role
from moeserve.pools.registry.base import LEASE_S, Interest, Registry
from moeserve.pools.registry.connect import connect_registry
from moeserve.pools.registry.etcd import EtcdRegistry
from moeserve.pools.registry.etcd_server import etcd_command
from moeserve.pools.registry.follow import Follower
from moeserve.pools.registry.heartbeat import Heartbeat
from moeserve.pools.registry.view import GRACE_S, ClusterView

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(shutil.which("etcd") is None, reason="etcd is not installed"),
]
WAIT_S = 30.0


def free_port() -> int:
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        return int(tried.getsockname()[1])


class Etcd:
    """A process that can be stopped, and started again with what it kept."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._log = (folder / "log").open("wb")
        self._command = etcd_command(folder / "data", self.port, free_port())

    def start(self) -> None:
        self.process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log
        )

    def wait(self) -> None:
        """It listens when it can answer."""
        for _ in range(int(WAIT_S / 0.1)):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            time.sleep(0.1)
        raise AssertionError(f"etcd does not listen: {self.process.poll()}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(WAIT_S)

    def close(self) -> None:
        self.kill()
        self._log.close()

    def named(self, name: str) -> str:
        return f"etcd://127.0.0.1:{self.port}/{name}"


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    started = Etcd(tmp_path_factory.mktemp("etcd"))
    started.start()
    started.wait()
    yield started
    started.close()


@contextlib.asynccontextmanager
async def connected(*addresses: str) -> AsyncIterator[Registry]:
    registry = connect_registry(addresses, Trust(), b"")
    try:
        yield registry
    finally:
        await registry.close()


@contextlib.asynccontextmanager
async def beating(registry: Registry, *names: str) -> AsyncIterator[list[Heartbeat]]:
    beats = [Heartbeat(registry, member(name), MemberLoad) for name in names]
    for beat in beats:
        beat.start()
    try:
        for beat in beats:
            assert await beat.wait_joined(WAIT_S), beat.error
        yield beats
    finally:
        for beat in beats:
            await beat.close()


@contextlib.asynccontextmanager
async def following(registry: Registry) -> AsyncIterator[tuple[ClusterView, Follower]]:
    view = ClusterView()
    follower = Follower(registry, view)
    follower.start()
    try:
        yield view, follower
    finally:
        await follower.close()


def start_member(where: str, name: str) -> subprocess.Popen[str]:
    script = Path(__file__).with_name("beating_member.py")
    return subprocess.Popen(
        [sys.executable, script, where, name], stdout=subprocess.PIPE, text=True
    )


def member(name: str, role: Role = Role.DECODE) -> Member:
    return Member(name, name, role, "127.0.0.1:80")


def shows(*names: str) -> Callable[[ClusterView], bool]:
    return lambda view: sorted(r.member.id for r in view.members()) == sorted(names)


def past(name: str, sequence: int) -> Callable[[ClusterView], bool]:
    def enough(view: ClusterView) -> bool:
        found = view.get(name)
        return found is not None and found.load.sequence > sequence

    return enough


async def all_go_on(view: ClusterView) -> None:
    """Reports come from everybody who is there."""
    reached = {r.member.id: r.load.sequence + 1 for r in view.members()}
    for name, sequence in reached.items():
        assert await view.wait_for(past(name, sequence), WAIT_S)


async def test_members_join_report_and_leave(etcd: Etcd) -> None:
    async with (
        connected(etcd.named("plain")) as registry,
        connected(etcd.named("another")) as another,
        following(registry) as (view, _),
        following(another) as (other_view, _),
        beating(registry, "a"),
        beating(another, "elsewhere"),
    ):
        async with beating(registry, "b"):
            assert await view.wait_for(shows("a", "b"), WAIT_S)
            await all_go_on(view)
        assert await view.wait_for(shows("a"), WAIT_S)
        assert shows("elsewhere")(other_view)


async def test_a_watcher_without_loads_hears_of_changes_alone(etcd: Etcd) -> None:
    async with connected(etcd.named("quiet")) as registry:
        cache, decode = member("c", Role.CACHE), member("d")
        await registry.join(Report(decode, MemberLoad(1)))
        caches = Interest(frozenset({Role.CACHE}), loads=False)
        [part] = registry.parts()
        async with contextlib.aclosing(part.watch(caches)) as news, asyncio.timeout(WAIT_S):
            assert (await anext(news)).put == ()
            await registry.join(Report(cache, MemberLoad(1)))
            assert (await anext(news)).put == (Report(cache, MemberLoad(1)),)
            await registry.renew(Report(decode, MemberLoad(2)))
            await registry.renew(Report(cache, MemberLoad(2)))
            draining = Report(cache, MemberLoad(3, draining=True))
            await registry.renew(draining)
            assert (await anext(news)).put == (draining,)
            await registry.leave("c")
            assert (await anext(news)).left == ("c",)
            await registry.leave("nobody")


async def test_a_member_that_is_killed_is_dropped_and_one_that_is_stopped_comes_back(
    etcd: Etcd,
) -> None:
    where = etcd.named("killed")
    async with (
        connected(where) as registry,
        following(registry) as (view, _),
        beating(registry, "a"),
    ):
        processes = [start_member(where, name) for name in ("killed", "stopped")]
        try:
            assert await view.wait_for(shows("a", "killed", "stopped"), WAIT_S)
            for process, sent in zip(processes, (signal.SIGKILL, signal.SIGSTOP), strict=True):
                process.send_signal(sent)
            assert await view.wait_for(shows("a"), WAIT_S)
            processes[1].send_signal(signal.SIGCONT)
            assert await view.wait_for(shows("a", "stopped"), WAIT_S)
            await all_go_on(view)
        finally:
            for process in processes:
                process.kill()
                process.communicate(timeout=WAIT_S)


async def test_an_etcd_that_is_stopped_or_restarted_changes_nothing_for_a_view(etcd: Etcd) -> None:
    async with (
        connected(etcd.named("away")) as registry,
        following(registry) as (view, follower),
        beating(registry, "a", "b") as beats,
    ):
        assert await view.wait_for(shows("a", "b"), WAIT_S)
        gone: list[str] = []
        view.subscribe(lambda change: gone.extend(change.gone))

        etcd.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(LEASE_S + GRACE_S)
        assert isinstance(beats[0].error, UnavailableError)
        etcd.process.send_signal(signal.SIGCONT)
        await all_go_on(view)

        etcd.kill()
        await asyncio.sleep(2.0)
        assert follower.connected == 0
        assert shows("a", "b")(view)
        etcd.start()
        await all_go_on(view)
        assert gone == []


async def test_what_others_wrote_is_passed_over(etcd: Etcd) -> None:
    channel = open_channel("127.0.0.1", etcd.port, Trust(), "")
    put = channel.unary_unary("/etcdserverpb.KV/Put")
    good = Report(member("x")).to_json().encode()

    async def write(key: bytes, value: bytes) -> None:
        asked = pb.PutRequest(key=b"/moeserve/dirty/members/" + key, value=value)
        await put(asked.SerializeToString(), timeout=WAIT_S)

    wrong = [(b"x1", b"{"), (b"x2", good), (b"\xff", b"\xff" * 10_000), (b"x4", b"[" * 5000)]
    for key, value in wrong:
        await write(key, value)
    registry = EtcdRegistry([channel], "/moeserve/dirty")
    async with following(registry) as (view, _), beating(registry, "a"):
        assert await view.wait_for(shows("a"), WAIT_S)
        assert registry.unreadable == len(wrong)
        for key, value in wrong:
            await write(key, value)
        await all_go_on(view)
        assert shows("a")(view)
        assert registry.unreadable == 2 * len(wrong)
    await registry.close()


async def test_a_lease_that_ran_out_has_to_be_taken_anew(etcd: Etcd) -> None:
    async with connected(etcd.named("lease")) as registry:
        report = Report(member("a"))
        [part] = registry.parts()
        with pytest.raises(NotFoundError, match="join again"):
            await part.renew(report)
        await part.join(report)
        assert isinstance(part, EtcdRegistry)
        lease = pb.LeaseRevokeRequest(ID=part._leases["a"]).SerializeToString()
        async with open_channel("127.0.0.1", etcd.port, Trust(), "") as channel:
            revoke = channel.unary_unary("/etcdserverpb.Lease/LeaseRevoke")
            await revoke(lease, timeout=WAIT_S)
        with pytest.raises(NotFoundError, match="join again"):
            await part.renew(report)
        await part.join(report)
        await part.renew(report)
        await part.leave("a")


async def test_the_next_endpoint_is_used_where_one_is_not_there(etcd: Etcd) -> None:
    where = f"etcd://127.0.0.1:{free_port()},127.0.0.1:{etcd.port}/several"
    async with (
        connected(where) as registry,
        beating(registry, "a"),
        following(registry) as (view, _),
    ):
        assert await view.wait_for(shows("a"), WAIT_S)
        await all_go_on(view)


async def test_addresses_of_etcd_are_checked() -> None:
    for wrong in ("etcd://", "etcd:///name", "etcd://host/name", "etcd://host:1/a/b"):
        with pytest.raises(ConfigError):
            connect_registry([wrong], Trust(), b"")


def test_etcd_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="install etcd-server"):
        etcd_command(Path("x"), 1, 2)
