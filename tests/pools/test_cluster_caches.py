"""What befalls the disk of a cache member costs hits and no answer: bytes that change while the
cluster serves, and no room."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
from cluster_parts import (
    PATIENCE_S,
    STORY,
    Part,
    Parts,
    ask,
    ask_all,
    blocks_are_free,
    body,
    members,
    shown,
    until,
)

from moeserve.comm.control.rpc import Trust, open_channel, proof_metadata
from moeserve.pb import cache_pb2
from moeserve.pools.cache.messages import SERVICE
from moeserve.worker.cluster_trust import RUN

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

PROMPTS = 8


def bodies(first: int) -> list[dict[str, Any]]:
    """Each of pages of its own."""
    prompts = {i: f"{i}. {STORY}. " * 6 for i in range(first, first + PROMPTS)}
    return [body(i, prompt=prompt, max_tokens=8) for i, prompt in prompts.items()]


@pytest.fixture(scope="module")
def alone() -> Iterator[Part]:
    """One process by itself: what is right."""
    part = Part("alone", ["moeserve.cli", "serve"])
    yield part
    part.process.close()


@pytest.fixture
def cluster() -> Iterator[Parts]:
    parts = Parts()
    parts.gateway("g0")
    yield parts
    parts.close()


def with_members(parts: Parts, folder: Path) -> Part:
    """The cache has memory for a page or three, and lots of disk as far as it knows."""
    disk = {"cache_memory": "300KiB", "cache_disk": "64MiB", "cache_folder": str(folder)}
    parts.peer("cache-0", "cache", **disk)
    parts.peer("first", "unified")
    parts.ready()
    members(parts["g0"], "unified", 1)
    return parts["g0"]


def another_member(parts: Parts) -> Part:
    """One that has nothing, in place of the one that was there."""
    parts["first"].send(signal.SIGTERM)
    assert parts["first"].process.wait(PATIENCE_S)
    parts.peer("second", "unified")
    parts.ready()
    members(parts["g0"], "unified", 1)
    return parts["second"]


def counted(cache: Part) -> Mapping[str, int]:
    """What a cache member has counted."""
    host, _, port = cache.said("ready: ").rpartition(" ")[2].rpartition(":")

    async def asked() -> Mapping[str, int]:
        async with open_channel(host, int(port), Trust(), "") as channel:
            call: grpc.aio.UnaryUnaryCall[bytes, bytes] = channel.unary_unary(f"/{SERVICE}/Stats")(
                b"", metadata=proof_metadata(Trust(), RUN), timeout=PATIENCE_S
            )
            return dict(cache_pb2.StatsReply.FromString(await call).counts)

    return asyncio.run(asked())


def flip(path: Path, at: int) -> None:
    """One bit of a file, in place."""
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_bytes_that_change_on_the_disk_are_found(
    alone: Part, cluster: Parts, tmp_path: Path
) -> None:
    gateway, right = with_members(cluster, tmp_path / "pages"), ask_all([alone.url], bodies(0))
    assert [ask(gateway.url, one) for one in bodies(0)] == right
    pages = tmp_path / "pages/pages"
    until(lambda: len(list(pages.glob("*/*"))) >= PROMPTS // 2, "pages are on the disk")
    files = sorted(pages.glob("*/*"))
    for number, path in enumerate(files):
        flip(path, (number * 7919) % path.stat().st_size)
    member = another_member(cluster)
    assert ask_all([gateway.url], bodies(0)) == right
    assert shown(member, "cache_pool_asked_total") >= PROMPTS
    counts = counted(cluster["cache-0"])
    assert counts["disk_bad"] > 0
    assert counts["disk_read"] == counts["disk_hits"], "a page that had changed was sent"
    blocks_are_free(gateway)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, of which three quarters are taken."""
    place = tmp_path / "small"
    place.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=1m", "cache-test", str(place)]
    if os.getuid() or subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small file system")
    (place / "taken").write_bytes(bytes(768 << 10))
    yield place / "pages"
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_costs_pages_and_no_answer(
    alone: Part, cluster: Parts, small_disk: Path
) -> None:
    gateway, right = with_members(cluster, small_disk), ask_all([alone.url], bodies(100))
    assert [ask(gateway.url, one) for one in bodies(100)] == right
    until(lambda: counted(cluster["cache-0"])["disk_full"] > 0, "the disk is full")
    member = another_member(cluster)
    assert ask_all([gateway.url], bodies(100)) == right
    assert shown(member, "cache_pool_asked_total") >= PROMPTS
    assert cluster["cache-0"].process.alive
    blocks_are_free(gateway)
