"""What the doors count: connections, and what each tenant has used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from moeserve.gateway.entrance import Entrance
from moeserve.gateway.http.phases import ConnectionPhase
from moeserve.gateway.trust.identity import TenantUsage
from moeserve.observe.families import PREFIX


def door_metrics(entrance: Entrance, usage: Mapping[str, TenantUsage]) -> Iterator[Metric]:
    """At the moment of a scrape. The tenant of a server with one key, or none, is ``""``."""
    evicted = CounterMetricFamily(
        f"{PREFIX}connections_evicted", "idle ones that gave way to others", labels=["door"]
    )
    if entrance.http is not None:
        phases = entrance.http.phases
        held = GaugeMetricFamily(
            f"{PREFIX}http_connections", "by what they wait for", labels=["phase"]
        )
        for phase in ConnectionPhase:
            held.add_metric([phase.value], phases.count(phase))
        yield held
        held_bytes = GaugeMetricFamily(
            f"{PREFIX}http_held_bytes", "of bodies on their way in and answers not read"
        )
        held_bytes.add_metric([], phases.held_bytes)
        yield held_bytes
        evicted.add_metric(["http"], entrance.http.evicted)
    if entrance.grpc is not None:
        evicted.add_metric(["grpc"], entrance.grpc.connections.evicted)
    yield evicted
    for name, text in (
        ("requests", "requests that were taken"),
        ("prompt_tokens", "tokens of their prompts"),
        ("generated_tokens", "tokens they were answered with"),
    ):
        family = CounterMetricFamily(f"{PREFIX}tenant_{name}", text, labels=["tenant"])
        for tenant, used in sorted(usage.items()):
            family.add_metric([tenant], getattr(used, name))
        yield family
