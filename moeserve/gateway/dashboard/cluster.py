"""The members of a cluster as what the dashboard of a gateway shows.

Who is there and how loaded comes with heartbeats. What a member has counted (KV that it had from
others, experts) is asked of it while somebody watches: all at once, each within a second. Of one
that does not answer, what it said before is shown.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import fields

import numpy as np

from moeserve.core import Counters
from moeserve.engine.ranks.counted import RankCounts
from moeserve.errors import MoeserveError
from moeserve.gateway.dashboard.live import Dashboard
from moeserve.gateway.dashboard.snapshot import ExpertLoads, Flow
from moeserve.observe.metrics import Metrics
from moeserve.pools.members import Member, Report, Role
from moeserve.pools.metrics import add_counts, member_families

ASK_S = 1.0
# Members that are asked; the others of a larger cluster are shown by their heartbeats alone.
MOST_ASKED = 256


def show_cluster(
    dashboard: Dashboard,
    metrics: Metrics,
    reports: Callable[[], Sequence[Report]],
    ask: Callable[[Member], Awaitable[RankCounts]] | None = None,
    counts: Iterable[object] = (),
) -> None:
    """What a gateway does once, when it knows its cluster: the dashboard shows the members, the
    page of metrics sums them up, and has all that ``counts`` count (``pools.metrics.PARTS``)."""
    dashboard.show(ClusterMembers(reports, ask))
    metrics.also(lambda: member_families(reports()))
    for one in counts:
        add_counts(metrics.parts, one)


class ClusterMembers:
    """A ``SnapshotSource``. ``reports`` are those of the members one knows; ``ask`` gives what a
    member has counted (``engine.ranks.counted.ask_counts`` over its link), or raises an error of
    ours."""

    def __init__(
        self,
        reports: Callable[[], Sequence[Report]],
        ask: Callable[[Member], Awaitable[RankCounts]] | None = None,
    ) -> None:
        self._reports = reports
        self._ask = ask
        self._counted: dict[str, RankCounts] = {}

    async def refresh(self) -> None:
        members = [report.member for report in self._reports()]
        self._counted = {m.id: self._counted[m.id] for m in members if m.id in self._counted}
        asked = [member for member in members if member.role is not Role.CACHE][:MOST_ASKED]
        await asyncio.gather(*map(self._refresh, asked))

    def reports(self) -> Sequence[Report]:
        return self._reports()

    def flows(self) -> Sequence[Flow]:
        """From whoever is at an address now; of addresses where nobody is any more, by address."""
        ids = {report.member.address: report.member.id for report in self._reports()}
        return [
            Flow(ids.get(one.source, one.source), target, one.bytes, one.runs)
            for target, counted in self._counted.items()
            for one in counted.received
        ]

    def experts(self) -> ExpertLoads | None:
        """Of the members together that count, as far as their models have the same layers."""
        counting = [c for c in self._counted.values() if c.expert_choices and c.moe_layers]
        if not counting:
            return None
        layers, size = counting[0].moe_layers, len(counting[0].expert_choices)
        if size % len(layers):
            return None
        alike = [
            counted.expert_choices
            for counted in counting
            if counted.moe_layers == layers and len(counted.expert_choices) == size
        ]
        choices = np.sum(np.array(alike, np.int64), axis=0)
        return ExpertLoads(layers, choices.reshape(len(layers), -1))

    def counts(self) -> Mapping[str, float]:
        """Of all members that were asked."""
        names = [f.name for f in fields(Counters) if f.name != "finished"]
        total: Counter[str] = Counter()
        for counted in self._counted.values():
            total.update({name: getattr(counted.counters, name) for name in names})
        return dict(total)

    async def _refresh(self, member: Member) -> None:
        if self._ask is None:
            return
        try:
            async with asyncio.timeout(ASK_S):
                self._counted[member.id] = await self._ask(member)
        except (MoeserveError, TimeoutError):
            return  # as it was
