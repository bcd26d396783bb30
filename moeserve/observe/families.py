"""How metrics are written: our names, vLLM's beside them, and histograms that exist from the start.

Every metric that vLLM has too is also served under vLLM's name and labels, so that dashboards made
for it work. Where vLLM has had two names for one thing, both are served.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric

PREFIX = "moeserve_"
LABELS = ("model_name", "engine")
# The engine whose numbers a page shows: a door has one, of all its ranks.
ENGINE = "0"
# Ours -> vLLM's, without prefixes and without the _total of counters.
ALIASES: Mapping[str, tuple[str, ...]] = {
    "num_requests_running": ("num_requests_running",),
    "num_requests_waiting": ("num_requests_waiting",),
    "kv_cache_usage_ratio": ("kv_cache_usage_perc", "gpu_cache_usage_perc"),
    "prefix_cache_queries": ("prefix_cache_queries", "gpu_prefix_cache_queries"),
    "prefix_cache_hits": ("prefix_cache_hits", "gpu_prefix_cache_hits", "prompt_tokens_cached"),
    "prompt_tokens": ("prompt_tokens",),
    "generated_tokens": ("generation_tokens",),
    "preemptions": ("num_preemptions",),
    "drafts": ("spec_decode_num_drafts",),
    "drafted_tokens": ("spec_decode_num_draft_tokens",),
    "accepted_tokens": ("spec_decode_num_accepted_tokens",),
    "requests_finished": ("request_success",),
    "cache_config_info": ("cache_config_info",),
    "step_tokens": ("iteration_tokens_total",),
    "time_to_first_token_seconds": ("time_to_first_token_seconds",),
    "inter_token_latency_seconds": ("inter_token_latency_seconds", "time_per_output_token_seconds"),
    "time_per_output_token_seconds": ("request_time_per_output_token_seconds",),
    "e2e_latency_seconds": ("e2e_request_latency_seconds",),
    "queue_time_seconds": ("request_queue_time_seconds",),
    "inference_time_seconds": ("request_inference_time_seconds",),
    "prefill_time_seconds": ("request_prefill_time_seconds",),
    "decode_time_seconds": ("request_decode_time_seconds",),
    "request_prompt_tokens": ("request_prompt_tokens",),
    "request_prefilled_tokens": ("request_prefill_kv_computed_tokens",),
    "request_generated_tokens": ("request_generation_tokens",),
    "request_longest_tokens": ("request_max_num_generation_tokens",),
    "request_n": ("request_params_n",),
    "request_max_tokens": ("request_params_max_tokens",),
}


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """The KV cache as it was sized: blocks of all ranks, and tokens in a block."""

    block_size: int
    num_blocks: int
    dtype: str
    prefix_cache: bool


class RankWork(Protocol):
    """What a rank has counted (``comm.dispatcher.DispatchStats``)."""

    tokens: int
    copies: int
    inter_node: int
    dispatch_bytes: int
    combine_bytes: int
    waited_s: float


class RanksView(Protocol):
    """What ranks have counted, and how many steps had so many microbatches."""

    @property
    def work(self) -> Sequence[RankWork]: ...
    @property
    def chosen(self) -> Mapping[int, int]: ...


class Distribution:
    """A histogram that is there with zeros before the first value. Not locked: one thread adds to
    it, and what another reads meanwhile may lack the newest value."""

    def __init__(self, name: str, text: str, bounds: tuple[float, ...]) -> None:
        self._name = PREFIX + name
        self._text = text
        self._bounds = bounds
        self._shown = [*map(str, map(float, bounds)), "+Inf"]
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float, count: int = 1) -> None:
        """``count`` times the same value."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def family(self, model: str) -> Metric:
        family = HistogramMetricFamily(self._name, self._text, labels=LABELS)
        buckets = list(zip(self._shown, accumulate(self._counts), strict=True))
        family.add_metric([model, ENGINE], buckets, self._sum)
        return family


def gauge(model: str, name: str, text: str, value: float) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, text, labels=LABELS)
    family.add_metric([model, ENGINE], value)
    return family


def counter(model: str, name: str, text: str, value: float) -> Metric:
    family = CounterMetricFamily(PREFIX + name, text, labels=LABELS)
    family.add_metric([model, ENGINE], value)
    return family


def by_label(
    model: str, name: str, text: str, label: str, values: Mapping[str, float]
) -> CounterMetricFamily:
    """One counter for each value of ``label``."""
    family = CounterMetricFamily(PREFIX + name, text, labels=[*LABELS, label])
    for value, count in values.items():
        family.add_metric([model, ENGINE, value], count)
    return family


def cache_config(model: str, cache: CacheInfo) -> Metric:
    """A constant 1 whose labels say how the KV cache was sized, as vLLM labels it."""
    said = {
        "block_size": str(cache.block_size),
        "cache_dtype": cache.dtype,
        "enable_prefix_caching": str(cache.prefix_cache),
        "num_cpu_blocks": "None",
        "num_gpu_blocks": str(cache.num_blocks),
    }
    family = GaugeMetricFamily(
        f"{PREFIX}cache_config_info", "how the KV cache was sized", labels=[*LABELS, *said]
    )
    family.add_metric([model, ENGINE, *said.values()], 1)
    return family


def of_ranks(model: str, ranks: RanksView) -> Iterator[Metric]:
    """What moved between ranks, and how steps were cut."""
    work = {str(rank): work for rank, work in enumerate(ranks.work)}

    def family(name: str, text: str, values: Mapping[str, float]) -> Metric:
        return by_label(model, name, text, "rank", values)

    moved = CounterMetricFamily(
        f"{PREFIX}rank_sent_bytes",
        "bytes of tokens and of results",
        labels=[*LABELS, "rank", "direction"],
    )
    for rank, counted in work.items():
        moved.add_metric([model, ENGINE, rank, "dispatch"], counted.dispatch_bytes)
        moved.add_metric([model, ENGINE, rank, "combine"], counted.combine_bytes)
    yield family(
        "rank_layer_tokens",
        "tokens routed, each once per MoE layer",
        {rank: counted.tokens for rank, counted in work.items()},
    )
    yield family(
        "rank_waited_seconds",
        "time spent waiting for other ranks",
        {rank: counted.waited_s for rank, counted in work.items()},
    )
    yield family(
        "rank_copies_inter_node",
        "copies of tokens sent to other nodes",
        {rank: counted.inter_node for rank, counted in work.items()},
    )
    yield family(
        "rank_copies",
        "copies of tokens sent to other ranks",
        {rank: counted.copies for rank, counted in work.items()},
    )
    yield moved
    yield by_label(
        model,
        "steps_by_microbatches",
        "forward passes cut into so many",
        "microbatches",
        {str(count): number for count, number in sorted(ranks.chosen.items())},
    )


def renamed(metric: Metric, name: str) -> Metric:
    """The same samples under another name."""
    alias = Metric(name, f"{metric.documentation} (as {metric.name})", metric.type)
    for sample in metric.samples:
        alias.samples.append(sample._replace(name=name + sample.name.removeprefix(metric.name)))
    return alias
