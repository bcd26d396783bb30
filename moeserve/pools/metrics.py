"""What a page of metrics says of a cluster: what its parts count, and its members' reports.

``PARTS`` names every dataclass of counts in this folder; ``add_counts`` puts one on a page. Reports
are summed by role; a role that nobody has is there with zeros, so that an alert on it can be
written before it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from moeserve.observe.counted import CountedParts
from moeserve.observe.families import PREFIX
from moeserve.pools.members import MemberLoad, Report, Role

# Class of the counts -> how its metrics begin, and the fields that are of now.
PARTS: Mapping[str, tuple[str, frozenset[str]]] = {
    "KvCounters": ("kv", frozenset({"calls", "borrowed", "serving"})),
    "ClusterCounts": ("cluster", frozenset()),
    "RouterCounts": ("router", frozenset()),
    "RebalanceCounts": ("rebalance", frozenset({"crowded"})),
    "HeartbeatCounts": ("heartbeat", frozenset()),
    "PagePoolCounts": ("cache_pool", frozenset()),
    "PooledCounts": ("cache_lookups", frozenset()),
    "PutCounts": ("cache_puts", frozenset()),
    "RecomputeCounts": ("cache_choices", frozenset()),
    "StoreCounts": ("cache_store", frozenset()),
    "DiskCounts": ("cache_disk", frozenset()),
    "ServiceCounts": ("cache_service", frozenset()),
    "WeightCounts": ("weights", frozenset()),
}

_SUMMED: Mapping[str, tuple[str, Callable[[MemberLoad], float]]] = {
    "members": ("that are there", lambda load: 1),
    "members_draining": ("of these, that take nothing new", lambda load: load.draining),
    "members_running": ("requests that they run", lambda load: load.running),
    "members_waiting": ("requests that wait at them", lambda load: load.waiting),
    "members_waiting_tokens": ("of prompts, to be computed", lambda load: load.waiting_tokens),
    "members_kv_blocks": ("blocks that they have", lambda load: load.total_blocks),
    "members_kv_blocks_free": ("of these, that nobody holds", lambda load: load.free_blocks),
    "members_prefill_rate": ("tokens per second, as measured", lambda load: load.prefill_rate),
    "members_stored_bytes": ("of KV that is kept for others", lambda load: load.stored_bytes),
    "members_capacity_bytes": ("for KV of others", lambda load: load.capacity_bytes),
}


def add_counts(parts: CountedParts, counts: object) -> None:
    """Every field of ``counts``, whose class is one of ``PARTS``, is a metric from now on."""
    name, now = PARTS[type(counts).__name__]
    parts.add(name, lambda: counts, now)


def member_families(reports: Sequence[Report]) -> Iterator[Metric]:
    """Each with a label ``role``."""
    for name, (text, value) in _SUMMED.items():
        family = GaugeMetricFamily(f"{PREFIX}{name}", text, labels=["role"])
        for role in Role:
            loads = (report.load for report in reports if report.member.role is role)
            family.add_metric([role.value], sum(map(value, loads)))
        yield family
