"""Routing that planners are measured on: recorded, joined from it, or drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moeserve.placement.cluster import Cluster
from moeserve.placement.formats import routing_files as inputs
from moeserve.placement.routing import Routing, split, workload_of_tokens


@dataclass(frozen=True, slots=True, eq=False)
class PlannedCase:
    """``routing`` is planned for and bounded; ``held`` is what it is evaluated on besides.

    ``bound_cpu_s`` is what a bound is worth: where it would stay about the same with more.
    """

    name: str
    routing: Routing
    cluster: Cluster
    held: Routing | None = None
    slots: int | None = field(default=None, kw_only=True)  # one for each expert
    max_imbalance: float = 1.05
    bound_cpu_s: float = 60.0

    @property
    def title(self) -> str:
        nodes = self.cluster.nodes
        where = f"{nodes} nodes x {self.cluster.devices // nodes}" if nodes > 1 else ""
        copies = "" if self.slots is None else f", {self.slots} slots"
        return f"{self.name}, {where or self.cluster.devices}{copies}"


def traces(data: Path) -> Iterator[tuple[str, Routing]]:
    for name in ("deepseek_v2_lite", "gpt_oss_20b"):
        files = sorted((data / name).glob("*.npz"))
        if files:
            yield name, inputs.read_all([str(f) for f in files])


def synthetic(tokens: int, layers: int, experts: int, k: int, topics: int = 16) -> Routing:
    """Sequences of one topic each; topics like hidden clusters of experts, others in each layer."""
    random = np.random.default_rng(11)
    topk = np.empty((tokens, layers, k), np.int32)
    topic_T = np.arange(tokens) * topics * 4 // tokens % topics
    for l in range(layers):
        cluster_E = random.permutation(experts) // max(1, experts // 32)
        liking = random.normal(size=(topics, int(cluster_E.max()) + 1)) * 1.5
        taste = liking[:, cluster_E] + random.normal(size=experts) * 0.5
        score = taste[topic_T] + random.gumbel(size=(tokens, experts))
        topk[:, l] = np.argpartition(-score, k, axis=1)[:, :k]
    lens = np.full(topics * 4, tokens // (topics * 4))
    lens[-1] += tokens - lens.sum()
    workload = workload_of_tokens("synthetic", topk, lens, num_experts=experts)
    return Routing((workload,), tuple(range(layers)))


def joined_layers(whole: Routing, l: int) -> Routing:
    """Layers ``l`` and ``l + 1`` as one of twice the experts, of which a token chooses twice k."""
    tokens_TLK, experts = whole.tokens_TLK, whole.num_experts
    both = np.concatenate((tokens_TLK[:, l], tokens_TLK[:, l + 1] + experts), axis=1)
    lens = whole.seq_lens_C
    workload = workload_of_tokens("joined", both[:, None], lens, num_experts=2 * experts)
    return Routing((workload,), (0,))


def one_layer(whole: Routing, l: int) -> Routing:
    workload = workload_of_tokens(
        "one", whole.tokens_TLK[:, l : l + 1], whole.seq_lens_C, num_experts=whole.num_experts
    )
    return Routing((workload,), (0,))


def recorded_cases(data: Path) -> Iterator[PlannedCase]:
    """Half of the sequences of each trace, the other half held out."""
    for name, whole in traces(data):
        fitted, held = split(whole, 0.5)
        yield PlannedCase(name, fitted, Cluster(8), held, bound_cpu_s=1200.0)
        yield PlannedCase(name, fitted, Cluster(16, 4), held)
        # One slot more on each device: with one for each expert, no plan is within the limit.
        yield PlannedCase(name, fitted, Cluster(16, 4), held, slots=whole.num_experts + 16)


def single_layers(data: Path) -> Iterator[PlannedCase]:
    """Shapes that no recorded model has, as one layer each."""
    whole = dict(traces(data)).get("deepseek_v2_lite")
    if whole is not None:
        fitted, _ = split(whole, 0.5)
        yield PlannedCase("one layer, groups of 16", one_layer(fitted, 5), Cluster(4))
        yield PlannedCase(
            "one layer, groups of 32", one_layer(fitted, 5), Cluster(2), bound_cpu_s=10.0
        )
        yield PlannedCase("two layers as one of 128", joined_layers(whole, 4), Cluster(16))
    drawn = synthetic(16384, 1, 256, 8)
    yield PlannedCase("drawn, 256 on 64", drawn, Cluster(64), None, 3.0, 10.0)
    yield PlannedCase("drawn, 256 on 32", drawn, Cluster(32), None, 3.0, 120.0)
