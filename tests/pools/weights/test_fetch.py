"""A checkpoint from other processes: whole, or an error that says who failed, whatever they do."""

from __future__ import annotations

import asyncio
import filecmp
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from moeserve.errors import ExhaustedError, UnavailableError
from moeserve.pools.cache.cache_members import CacheMembers
from moeserve.pools.kv.channels import ChannelPool
from moeserve.pools.members import Member, Report
from moeserve.pools.registry.base import Changes
from moeserve.pools.registry.view import ClusterView
from moeserve.pools.weights.counts import WeightCounts
from moeserve.pools.weights.fetch import WeightFetch, WeightSource, weight_calls
from moeserve.pools.weights.folders import WeightFolders
from moeserve.pools.weights.manifest import Manifest
from moeserve.pools.weights.offers import HeldCheckpoint
from moeserve.pools.weights.search import WeightSearch
from moeserve.pools.weights.stored import put_checkpoint

pytestmark = pytest.mark.long

Channels = Callable[[], ChannelPool]


def same(folder: Path, manifest: Manifest) -> bool:
    names = [file.name for file in manifest.files]
    equal, _, _ = filecmp.cmpfiles(folder, manifest.folder, names, shallow=False)
    return sorted(equal) == sorted(names)


async def fetched(
    demo: Manifest,
    root: Path,
    make_channels: Channels,
    members: Sequence[Member],
    meanwhile: Callable[[WeightFetch], object] = lambda fetch: None,
) -> tuple[WeightCounts, list[WeightSource]]:
    """All of it from these, checked file by file."""
    counts, channels = WeightCounts(), make_channels()
    sources = [WeightSource(member) for member in members]
    try:
        async with WeightFolders(root).fetching(demo.id, 60.0) as folder:
            calls = weight_calls(channels)
            fetch = WeightFetch(demo, folder.begin(demo), calls, counts, batch=1)
            running = asyncio.create_task(fetch.run(sources))
            while not running.done():
                meanwhile(fetch)
                await asyncio.sleep(0.01)
            await running
            folder.finish()
        assert same(folder.path, demo)
        folder.close()
    finally:
        await channels.close()
    assert counts.neighbour_bytes + counts.pool_bytes == demo.nbytes
    return counts, sources


def test_two_members_send_each_a_part(
    demo: Manifest, tmp_path: Path, start_holder: Callable[..., Any], make_channels: Channels
) -> None:
    holders = [start_holder(name, pause_s=0.05) for name in "ab"]
    members = [holder.member for holder in holders]
    counts, _ = asyncio.run(fetched(demo, tmp_path, make_channels, members))
    assert (counts.bad, counts.lost) == (0, 0)
    assert counts.neighbour_bytes == demo.nbytes


@pytest.mark.parametrize("flips", [1, 3])
def test_what_has_changed_on_its_way_is_counted_and_asked_again(
    demo: Manifest,
    tmp_path: Path,
    start_holder: Callable[..., Any],
    make_channels: Channels,
    flips: int,
) -> None:
    member = start_holder("a", flips=flips).member
    if flips == 1:
        counts, _ = asyncio.run(fetched(demo, tmp_path, make_channels, [member]))
    else:
        other = start_holder("b", pause_s=0.05).member
        counts, _ = asyncio.run(fetched(demo, tmp_path, make_channels, [member, other]))
    assert counts.bad == flips


def test_one_that_always_sends_other_bytes_is_left_alone(
    demo: Manifest, tmp_path: Path, start_holder: Callable[..., Any], make_channels: Channels
) -> None:
    bad = start_holder("a", flips=1000).member
    good = start_holder("b", pause_s=0.02).member
    counts, (first, _) = asyncio.run(fetched(demo, tmp_path, make_channels, [bad, good]))
    assert first.lost
    assert counts.bad == first.bad >= 4
    with pytest.raises(UnavailableError, match=r"chunks of the weights are missing"):
        asyncio.run(fetched(demo, tmp_path / "alone", make_channels, [bad]))
    assert not (tmp_path / "alone" / demo.id).exists()


def test_a_member_that_is_killed_on_the_way_is_replaced_by_another(
    demo: Manifest, tmp_path: Path, start_holder: Callable[..., Any], make_channels: Channels
) -> None:
    killed, other = start_holder("a", pause_s=0.1), start_holder("b", pause_s=0.1)

    def kill(fetch: WeightFetch) -> None:
        if fetch.came:
            killed.process.send_signal(signal.SIGKILL)

    members = [killed.member, other.member]
    counts, _ = asyncio.run(fetched(demo, tmp_path, make_channels, members, kill))
    assert counts.lost
    assert counts.bad == 0


def test_without_anybody_left_it_says_who_failed(
    demo: Manifest, tmp_path: Path, start_holder: Callable[..., Any], make_channels: Channels
) -> None:
    killed = start_holder("a", pause_s=0.1)

    def kill(fetch: WeightFetch) -> None:
        if fetch.came:
            killed.process.send_signal(signal.SIGKILL)

    with pytest.raises(UnavailableError, match=killed.member.address):
        asyncio.run(fetched(demo, tmp_path, make_channels, [killed.member], kill))
    assert not list(tmp_path.glob(f"{demo.id}*/"))


def test_the_pool_keeps_a_checkpoint_that_nobody_serves_any_more(
    demo: Manifest, tmp_path: Path, start_holder: Callable[..., Any], make_channels: Channels
) -> None:
    members = [start_holder(name, cache=tmp_path / name).member for name in "cd"]
    view = ClusterView()
    view.apply(0, Changes(tuple(Report(member) for member in members), whole=True))

    async def put_and_fetch() -> tuple[int, int, WeightCounts]:
        channels, counts, cache = make_channels(), WeightCounts(), CacheMembers()
        cache.set(members)
        calls = weight_calls(channels)
        held = HeldCheckpoint(demo, counts)
        new = await put_checkpoint(held, cache, calls, 4 * demo.nbytes)
        again = await put_checkpoint(held, cache, calls, 4 * demo.nbytes)
        found = await WeightSearch(view, calls, "demo", "").find(5.0)
        assert found is not None
        assert found.manifest == demo
        async with WeightFolders(tmp_path / "root").fetching(demo.id, 60.0) as folder:
            fetch = WeightFetch(demo, folder.begin(demo), calls, counts)
            await fetch.run(found.sources())
            folder.finish()
        assert same(folder.path, demo)
        folder.close()
        small = await put_checkpoint(held, cache, calls, demo.nbytes)
        await channels.close()
        return new, again + small, counts

    new, again, counts = asyncio.run(put_and_fetch())
    assert (new, again) == (demo.nbytes, 0)
    assert counts.pool_bytes == demo.nbytes
    assert counts.neighbour_bytes == 0


def test_a_folder_without_room_is_refused_before_anything_comes(
    demo: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda root: type("Usage", (), {"free": 1 << 20}))

    async def begin() -> None:
        async with WeightFolders(tmp_path).fetching(demo.id, 1.0) as folder:
            folder.begin(demo)

    with pytest.raises(ExhaustedError, match="--weights-folder"):
        asyncio.run(begin())
