"""A registry in this process: leases, and a queue for each watcher. On one event loop's thread.

A gateway has one, for its own view and, over gRPC, for others (``embedded``). A heartbeat costs the
same however many members there are: watchers that hear of loads are few, those that do not are not
looked at. ``clock`` is monotonic.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable

from moeserve.errors import ExhaustedError, UnavailableError
from moeserve.pools.members import MemberLoad, Report
from moeserve.pools.registry.base import (
    EVERYTHING,
    LEASE_S,
    MOST_MEMBERS,
    MOST_WATCHERS,
    Changes,
    Interest,
    Registry,
    beat_of,
)
from moeserve.pools.registry.leases import LeaseTable

# How often leases are looked at.
SWEEP_S = 0.2


class MemoryRegistry(Registry):
    """See ``base.Registry``. Leases are of ``lease_s``, for ``most`` members at most."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        lease_s: float = LEASE_S,
        most: int = MOST_MEMBERS,
    ) -> None:
        self._clock = clock
        self._lease_s = lease_s
        self._table = LeaseTable(lease_s, most)
        self._began = clock()
        self._watchers: set[_Watcher] = set()
        self._told_loads: set[_Watcher] = set()  # of them
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    async def join(self, report: Report) -> None:
        self._require_open()
        self._table.join(report, self._clock())
        self._put(report, self._watchers)
        self._sweep_later()

    @property
    def beat_s(self) -> float:
        return beat_of(len(self._table.reports), self._lease_s)

    async def renew(self, report: Report) -> None:
        self.renew_lease(report.member.id, report.load)

    def renew_lease(self, member_id: str, load: MemberLoad) -> None:
        """``renew``, for who has only these."""
        self._require_open()
        known = self._table.reports.get(member_id)
        new = self._table.renew(member_id, load, self._clock())
        if known is not None and new is not known:
            turned = new.load.draining != known.load.draining
            self._put(new, self._watchers if turned else self._told_loads)

    async def leave(self, member_id: str) -> None:
        if self._table.leave(member_id):
            for watcher in self._watchers:
                watcher.drop(member_id, watcher.left)

    async def watch(self, interest: Interest = EVERYTHING) -> AsyncGenerator[Changes, None]:
        self._require_open()
        if len(self._watchers) >= MOST_WATCHERS:
            raise ExhaustedError(f"{MOST_WATCHERS} watch this registry: expected no more")
        watcher = _Watcher(interest)
        self._watchers.add(watcher)
        if interest.loads:
            self._told_loads.add(watcher)
        try:
            yield self._whole(interest)
            while True:
                await watcher.news.wait()
                self._require_open()
                yield watcher.take() or self._whole(interest)
        finally:
            self._watchers.discard(watcher)
            self._told_loads.discard(watcher)

    def parts(self) -> tuple[Registry, ...]:
        return (self,)

    async def close(self) -> None:
        """Watchers end with UnavailableError."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for watcher in self._watchers:
            watcher.news.set()

    def _whole(self, interest: Interest) -> Changes:
        there = tuple(r for r in self._table.reports.values() if interest.covers(r))
        settle_s = max(0.0, self._lease_s - (self._clock() - self._began))
        return Changes(there, whole=True, settle_s=settle_s)

    def _require_open(self) -> None:
        if self._closed:
            raise UnavailableError("this registry is closed: ask another")

    def _put(self, report: Report, watchers: set[_Watcher]) -> None:
        for watcher in watchers:
            watcher.put(report)

    def _sweep_later(self) -> None:
        if self._timer is None and not self._closed:
            self._timer = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        self._timer = None
        for member_id in self._table.expire(self._clock()):
            for watcher in self._watchers:
                watcher.drop(member_id, watcher.expired)
        if self._table.reports:
            self._sweep_later()


class _Watcher:
    """What one watcher has not taken yet: a member is in one of the three. Where more have gone
    than ``MOST_MEMBERS``, it begins anew."""

    def __init__(self, interest: Interest) -> None:
        self._interest = interest
        self.news = asyncio.Event()
        self._overrun = False
        self._puts: dict[str, Report] = {}
        self.left: dict[str, None] = {}
        self.expired: dict[str, None] = {}

    def put(self, report: Report) -> None:
        if self._interest.covers(report):
            self.left.pop(report.member.id, None)
            self.expired.pop(report.member.id, None)
            self._puts[report.member.id] = report
            self.news.set()

    def drop(self, member_id: str, kind: dict[str, None]) -> None:
        self._puts.pop(member_id, None)
        kind[member_id] = None
        if len(kind) > MOST_MEMBERS:
            self._clear()
            self._overrun = True
        self.news.set()

    def take(self) -> Changes | None:
        """None: the watcher has to hear of all members."""
        changes = Changes(tuple(self._puts.values()), tuple(self.left), tuple(self.expired))
        overrun, self._overrun = self._overrun, False
        self._clear()
        self.news.clear()
        return None if overrun else changes

    def _clear(self) -> None:
        for part in (self._puts, self.left, self.expired):
            part.clear()
