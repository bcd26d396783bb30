"""The dashboard of a process: what it keeps from the start, and the snapshots made of it.

Until a source is shown, there are no members. Totals are taken every few seconds whether somebody
watches or not, since whoever opens the page wants to see what was before; they cost a sum over the
running answers. Everything else is done while somebody watches.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

from moeserve.gateway.dashboard.feed import SnapshotFeed
from moeserve.gateway.dashboard.history import (
    SAMPLE_S,
    SloTargets,
    SloWindow,
    TrafficHistory,
    TrafficTotals,
)
from moeserve.gateway.dashboard.snapshot import (
    ExpertLoads,
    Flow,
    Snapshot,
    SnapshotSource,
    with_rates,
)
from moeserve.gateway.service import InferenceService
from moeserve.observe.requests import RequestRecord
from moeserve.pools.members import Report


class NobodyYet:
    """The source while a model loads."""

    async def refresh(self) -> None: ...

    def reports(self) -> Sequence[Report]:
        return ()

    def flows(self) -> Sequence[Flow]:
        return ()

    def experts(self) -> ExpertLoads | None:
        return None

    def counts(self) -> Mapping[str, float]:
        return {}


class Dashboard:
    """Of one service. ``open`` and ``close`` it on the event loop. ``counted`` are totals of this
    process beside those of the source."""

    def __init__(
        self,
        service: InferenceService,
        targets: SloTargets,
        counted: Callable[[], Mapping[str, float]] = dict,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._service = service
        self._counted = counted
        self._clock = clock
        self._wall = wall
        self._began = clock()
        self._source: SnapshotSource = NobodyYet()
        self._window = SloWindow(targets)
        self._history = TrafficHistory()
        self._flows: tuple[float, tuple[Flow, ...]] = (self._began, ())
        self._sampling: asyncio.Task[None] | None = None
        self.feed = SnapshotFeed(self._make)

    def show(self, source: SnapshotSource) -> None:
        """From now on its members are shown."""
        self._source = source

    def on_request(self, record: RequestRecord) -> None:
        """A client's request has ended, or was refused."""
        self._window.add(self._clock(), record)

    def open(self) -> None:
        self._sampling = asyncio.create_task(self._sample())

    async def close(self) -> None:
        """Ends what viewers have open."""
        if self._sampling is not None:
            self._sampling.cancel()
        await self.feed.close()

    async def snapshot(self) -> Snapshot:
        """Of now."""
        source, service = self._source, self._service
        await source.refresh()
        now = self._clock()
        then, before = self._flows
        flows = with_rates(before, source.flows(), now - then)
        self._flows = now, flows
        return Snapshot(
            time=round(self._wall(), 3),
            uptime_s=round(now - self._began, 3),
            model=service.model_name,
            state=service.state.value,
            streams=service.running,
            members=tuple(source.reports()),
            flows=flows,
            attainment=self._window.attainment(now),
            points=self._history.points(now),
            experts=source.experts(),
            counts={**source.counts(), **self._counted()},
        )

    async def _make(self) -> str:
        return (await self.snapshot()).to_json()

    async def _sample(self) -> None:
        while True:
            self._history.add(self._clock(), TrafficTotals(*self._service.tokens))
            await asyncio.sleep(SAMPLE_S)
