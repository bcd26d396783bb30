"""What a gateway shows of its cluster: on the dashboard, and as metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from moeserve.gateway.dashboard.snapshot import ExpertLoads, Flow
from moeserve.observe.families import PREFIX, counter
from moeserve.pools.cluster import ClusterEngine
from moeserve.pools.members import Report, Role
from moeserve.pools.registry.view import ClusterView

# Name and text of each counter, by the field of ``ClusterCounts``.
_COUNTED: Mapping[str, tuple[str, str]] = {
    "sent": ("cluster_requests_sent", "requests sent to members, each time"),
    "sent_with_sources": ("cluster_requests_split", "of these, prefilled by another member"),
    "lost": ("cluster_requests_lost", "requests whose member was lost"),
    "given_up": ("cluster_requests_given_up", "of these, those that ended for it"),
    "returned": ("cluster_requests_returned", "requests that a member gave back"),
    "moves": ("cluster_moves", "requests that another member was to take over"),
    "moved": ("cluster_moves_done", "of these, those that it did"),
    "late_events": ("cluster_late_events", "events of members that had lost the request"),
}


@dataclass(frozen=True, slots=True)
class ClusterSource:
    """A ``SnapshotSource`` of the dashboard."""

    view: ClusterView
    engine: ClusterEngine

    async def refresh(self) -> None:
        """Members report by themselves."""

    def reports(self) -> Sequence[Report]:
        return self.view.members()

    def flows(self) -> Sequence[Flow]:
        """Members know what moves between them; they do not tell."""
        return ()

    def experts(self) -> ExpertLoads | None:
        return None

    def counts(self) -> Mapping[str, float]:
        counters = self.engine.counters
        made = {name: getattr(counters, name) for name in ("prompt_tokens", "generated_tokens")}
        return made | asdict(self.engine.counts)


def cluster_metrics(model: str, view: ClusterView, engine: ClusterEngine) -> Iterator[Metric]:
    """At the moment of a scrape."""
    roles = Counter(report.member.role for report in view.members())
    members = GaugeMetricFamily(
        f"{PREFIX}cluster_members", "members of the cluster", labels=["role"]
    )
    for role in Role:
        members.add_metric([role.value], roles[role])
    yield members
    for field, (name, text) in _COUNTED.items():
        yield counter(model, name, text, getattr(engine.counts, field))
