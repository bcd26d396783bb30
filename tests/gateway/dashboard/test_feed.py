"""One snapshot serves all who watch, and none is made when nobody does."""

from __future__ import annotations

import asyncio

import pytest

from moeserve.errors import UnavailableError
from moeserve.gateway.dashboard.feed import SnapshotFeed

PATIENCE_S = 30.0


class Maker:
    """Snapshots are numbers; ``fail`` of them are not made."""

    def __init__(self, fail: int = 0) -> None:
        self.asked = 0
        self._fail = fail

    async def __call__(self) -> str:
        self.asked += 1
        if self.asked <= self._fail:
            raise RuntimeError("what a member said made no sense")
        return str(self.asked)


def feed_of(make: Maker, **bounds: int) -> SnapshotFeed:
    return SnapshotFeed(make, period_s=0.001, **bounds)


async def read(feed: SnapshotFeed, count: int) -> list[str]:
    found: list[str] = []
    snapshots = feed.watch()
    async with asyncio.timeout(PATIENCE_S):
        async for one in snapshots:
            found.append(one)
            if len(found) == count:
                break
    await snapshots.aclose()
    return found


async def test_many_viewers_cost_what_one_does() -> None:
    make = Maker()
    feed = feed_of(make)
    read_by_all = await asyncio.gather(*(read(feed, 20) for _ in range(30)))
    assert all(one == read_by_all[0] for one in read_by_all)
    assert feed.made == make.asked <= 22


async def test_nothing_is_made_when_nobody_watches() -> None:
    make = Maker()
    feed = feed_of(make)
    await asyncio.sleep(0.02)
    assert make.asked == 0
    await read(feed, 3)
    made = make.asked
    await asyncio.sleep(0.02)
    assert (make.asked, feed.viewers) == (made, 0)
    assert len(await read(feed, 2)) == 2


async def test_a_slow_viewer_gets_the_newest_and_holds_nothing_up() -> None:
    make = Maker()
    feed = feed_of(make)
    slow = feed.watch()
    first = int(await anext(slow))
    await read(feed, 10)
    assert int(await anext(slow)) == feed.made >= first + 10
    await slow.aclose()


async def test_viewers_are_bounded() -> None:
    feed = feed_of(Maker(), most_viewers=1)
    one = feed.watch()
    await anext(one)
    with pytest.raises(UnavailableError, match="1 viewers watch"):
        await anext(feed.watch())
    await one.aclose()
    assert len(await read(feed, 1)) == 1


async def test_a_snapshot_that_cannot_be_made_is_left_out() -> None:
    assert await read(feed_of(Maker(fail=2)), 2) == ["3", "4"]


async def test_closing_ends_every_stream() -> None:
    feed = feed_of(Maker())
    reading = asyncio.create_task(read(feed, 10**9))
    await read(feed, 1)
    await feed.close()
    async with asyncio.timeout(PATIENCE_S):
        await reading
    assert feed.viewers == 0
    with pytest.raises(UnavailableError):
        await anext(feed.watch())
