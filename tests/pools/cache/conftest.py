"""Pages to keep, members that keep them, and what reaches these."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import grpc
import pytest

from moeserve.comm.control.rpc import Trust, open_channel, open_server, proof_metadata
from moeserve.pools.cache.keys import Namespace, PageKey
from moeserve.pools.cache.pages import StoredPage, StoredRun, seal
from moeserve.pools.cache.service import CacheServer
from moeserve.pools.cache.store import PageStore, StoreLimits
from moeserve.pools.members import Member, Role

RUN = b"run"
AMPLE = StoreLimits(1 << 24)
MakePage = Callable[..., StoredPage]


def page_of(number: int, nbytes: int = 1000, namespace: bytes = b"tenant") -> StoredPage:
    content = sha256(number.to_bytes(4, "little")).digest()
    data = (content * (nbytes // 64 + 1))[: nbytes // 2]
    runs = [StoredRun(layer, 64 * number, 64, content[:16], data) for layer in (0, 1)]
    return seal(PageKey(content), Namespace(namespace.ljust(16, b"\0")), runs)


@pytest.fixture(scope="session")
def make_page() -> MakePage:
    """A page by number: of two layers, its bytes follow from its number."""
    return page_of


Until = Callable[[Callable[[], object]], Awaitable[None]]


@pytest.fixture(scope="session")
def until() -> Until:
    """Waits until something holds, for a minute at most."""

    async def wait(holds: Callable[[], object]) -> None:
        for _ in range(6000):
            if holds():
                return
            await asyncio.sleep(0.01)
        pytest.fail("it does not come to hold")

    return wait


@dataclass
class PlainChannels:
    """One connection to each address."""

    metadata: tuple[tuple[str, str], ...] = proof_metadata(Trust(), RUN)
    opened: dict[str, grpc.aio.Channel] = field(default_factory=dict)

    @asynccontextmanager
    async def use(self, address: str, server_name: str) -> AsyncIterator[grpc.aio.Channel]:
        if address not in self.opened:
            host, _, port = address.rpartition(":")
            self.opened[address] = open_channel(host, int(port), Trust(), server_name)
        yield self.opened[address]


@pytest.fixture
async def channels() -> AsyncIterator[PlainChannels]:
    found = PlainChannels()
    yield found
    for channel in found.opened.values():
        await channel.close()


@dataclass
class Keeper:
    """A cache member in this process."""

    member: Member
    store: PageStore
    server: CacheServer
    grpc_server: grpc.aio.Server


MakeKeeper = Callable[..., object]


@pytest.fixture
async def make_keeper() -> AsyncIterator[MakeKeeper]:
    """A cache member by name; ``progress_s`` is what its callers get."""
    running: list[Keeper] = []

    async def make(name: str, limits: StoreLimits = AMPLE, progress_s: float = 10.0) -> Keeper:
        store = await PageStore.open(limits)
        server = CacheServer(store, progress_s=progress_s)
        grpc_server, port = open_server("127.0.0.1", Trust(), RUN, [server.handlers()])
        await grpc_server.start()
        member = Member(f"{name}-1", name, Role.CACHE, f"127.0.0.1:{port}")
        running.append(Keeper(member, store, server, grpc_server))
        return running[-1]

    yield make
    for keeper in running:
        await keeper.grpc_server.stop(None)
        await keeper.store.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=1m", "cache-test", str(place)]
    if os.getuid() or subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small file system")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)
