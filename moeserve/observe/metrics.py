"""What Prometheus sees.

Counts come from the engine's counters and a load snapshot at the moment of scraping; only
durations are kept here, as histograms that the engine feeds (it calls the ``on_`` methods). Every
metric that vLLM has too is also served under vLLM's name, so that existing dashboards work. The
registry is this object's own.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Protocol

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from moeserve.core import Counters, FinishReason, StepPlan, Timing

LABEL = "model_name"
PREFIX = "moeserve_"
# Ours -> vLLM's, without prefixes and without the _total of counters.
ALIASES = {
    "num_requests_running": "num_requests_running",
    "num_requests_waiting": "num_requests_waiting",
    "kv_cache_usage_ratio": "kv_cache_usage_perc",
    "prefix_cache_queries": "prefix_cache_queries",
    "prefix_cache_hits": "prefix_cache_hits",
    "prompt_tokens": "prompt_tokens",
    "generated_tokens": "generation_tokens",
    "preemptions": "num_preemptions",
    "requests_finished": "request_success",
    "time_to_first_token_seconds": "time_to_first_token_seconds",
    "inter_token_latency_seconds": "inter_token_latency_seconds",
    "e2e_latency_seconds": "e2e_request_latency_seconds",
    "queue_time_seconds": "request_queue_time_seconds",
    "prefill_time_seconds": "request_prefill_time_seconds",
    "decode_time_seconds": "request_decode_time_seconds",
}
_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SLOW = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_SIZES = (1, 4, 16, 64, 256, 1024, 4096, 16384)


class LoadView(Protocol):
    """The part of an engine's load that is shown."""

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def total_blocks(self) -> int: ...
    @property
    def free_blocks(self) -> int: ...


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


class Metrics:
    """Observes one engine and renders its page; ``bind`` says whose numbers to show."""

    def __init__(self) -> None:
        self._model = ""
        self._counters: Callable[[], Counters] = Counters
        self._load: Callable[[], LoadView] | None = None
        self._ranks: RanksView | None = None
        self._ttft = _histogram("time_to_first_token_seconds", "arrival to first token", _SLOW)
        self._itl = _Gaps(_FAST)
        self._e2e = _histogram("e2e_latency_seconds", "arrival to end of a request", _SLOW)
        self._queue = _histogram("queue_time_seconds", "arrival to first step", _SLOW)
        self._prefill = _histogram("prefill_time_seconds", "first step to first token", _SLOW)
        self._decode = _histogram("decode_time_seconds", "first token to end", _SLOW)
        self._step = _histogram("step_seconds", "one forward pass", _FAST)
        self._step_tokens = _histogram("step_tokens", "tokens in a forward pass", _SIZES)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Page(self.collect))

    def bind(
        self,
        model: str,
        counters: Callable[[], Counters],
        load: Callable[[], LoadView],
        ranks: RanksView | None = None,
    ) -> None:
        """What is asked at every scrape; ``ranks`` where there are several."""
        self._model, self._counters, self._load, self._ranks = model, counters, load, ranks

    def also(self, collect: Callable[[], Iterable[Metric]]) -> None:
        """Metrics of another's, asked for at every scrape."""
        self._registry.register(_Page(collect))

    def render(self) -> tuple[bytes, str]:
        """The page and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4

    def on_gaps(self, gaps: Mapping[float, int]) -> None:
        self._itl.add(gaps)

    def on_step(self, plan: StepPlan, seconds: float) -> None:
        self._step.labels(self._model).observe(seconds)
        self._step_tokens.labels(self._model).observe(plan.num_tokens)

    def on_first_token(self, timing: Timing) -> None:
        if timing.first_token_s is None:
            return
        self._ttft.labels(self._model).observe(timing.first_token_s)
        if timing.scheduled_s is not None:
            self._queue.labels(self._model).observe(timing.scheduled_s)
            self._prefill.labels(self._model).observe(timing.first_token_s - timing.scheduled_s)

    def on_finish(self, reason: FinishReason, timing: Timing) -> None:
        self._e2e.labels(self._model).observe(timing.elapsed_s)
        if timing.first_token_s is not None:
            self._decode.labels(self._model).observe(timing.elapsed_s - timing.first_token_s)

    def collect(self) -> Iterator[Metric]:
        """Every metric, each followed by its alias."""
        for metric in self._ours():
            yield metric
            alias = ALIASES.get(metric.name.removeprefix(PREFIX))
            if alias is not None:
                yield _renamed(metric, f"vllm:{alias}")

    def _ours(self) -> Iterator[Metric]:
        if self._load is not None:
            load = self._load()
            used = load.total_blocks - load.free_blocks
            yield self._gauge("num_requests_running", "in the running batch", load.running)
            yield self._gauge("num_requests_waiting", "in the queue", load.waiting)
            yield self._gauge("kv_blocks", "KV blocks in all", load.total_blocks)
            yield self._gauge(
                "kv_cache_usage_ratio", "KV blocks in use, of 1", used / max(1, load.total_blocks)
            )
        count = self._counters()
        yield self._counter("steps", "forward passes", count.steps)
        yield self._counter("prompt_tokens", "tokens of admitted prompts", count.prompt_tokens)
        yield self._counter("generated_tokens", "tokens made", count.generated_tokens)
        yield self._counter("computed_tokens", "tokens run", count.computed_tokens)
        yield self._counter("recomputed_tokens", "of these, once more", count.recomputed_tokens)
        yield self._counter("prefix_cache_queries", "tokens looked up", count.prefix_queried_tokens)
        yield self._counter("prefix_cache_hits", "tokens found", count.prefix_hit_tokens)
        yield self._counter("preemptions", "requests put back for room", count.preemptions)
        yield self._counter("evicted_blocks", "cached KV blocks given up", count.evicted_blocks)
        yield self._counter("plan_changes", "changes of plan that ended", count.plan_changes)
        yield self._counter("plan_layers_switched", "in them", count.plan_layers_switched)
        yield self._counter("plan_bytes_read", "of experts for them", count.plan_bytes_read)
        yield self._counter("plan_paused_seconds", "steps held up", count.plan_paused_s)
        finished = CounterMetricFamily(
            f"{PREFIX}requests_finished", "ended requests", labels=[LABEL, "finished_reason"]
        )
        for reason in FinishReason:
            finished.add_metric([self._model, reason.value], count.finished.get(reason, 0))
        yield finished
        if self._ranks is not None:
            yield from _of_ranks(self._model, self._ranks)
        yield self._itl.family(self._model)
        for histogram in self._histograms():
            yield from histogram.collect()

    def _histograms(self) -> tuple[Histogram, ...]:
        return (
            *(self._ttft, self._e2e, self._queue),
            *(self._prefill, self._decode, self._step, self._step_tokens),
        )

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=[LABEL])
        family.add_metric([self._model], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=[LABEL])
        family.add_metric([self._model], value)
        return family


class _Gaps:
    """A histogram of seconds from token to token that takes a whole step at once: the tokens of
    a step mostly came equally long after the ones before them."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._seconds = 0.0

    def add(self, gaps: Mapping[float, int]) -> None:
        for seconds, count in gaps.items():
            self._counts[bisect_left(self._bounds, seconds)] += count
            self._seconds += seconds * count

    def family(self, model: str) -> Metric:
        """Without samples before the first gap."""
        name = f"{PREFIX}inter_token_latency_seconds"
        family = HistogramMetricFamily(name, "token to token", labels=[LABEL])
        sums = list(accumulate(self._counts))
        if sums[-1]:
            bounds = [*map(str, self._bounds), "+Inf"]
            family.add_metric([model], list(zip(bounds, sums, strict=True)), self._seconds)
        return family


def _of_ranks(model: str, ranks: RanksView) -> Iterator[Metric]:
    """What moved between ranks, and how steps were cut."""

    def family(name: str, text: str, *labels: str) -> CounterMetricFamily:
        return CounterMetricFamily(PREFIX + name, text, labels=[LABEL, *labels])

    tokens = family("rank_layer_tokens", "tokens routed, each once per MoE layer", "rank")
    waited = family("rank_waited_seconds", "time spent waiting for other ranks", "rank")
    inter_node = family("rank_copies_inter_node", "copies of tokens sent to other nodes", "rank")
    copies = family("rank_copies", "copies of tokens sent to other ranks", "rank")
    moved = family("rank_sent_bytes", "bytes of tokens and of results", "rank", "direction")
    steps = family("steps_by_microbatches", "forward passes cut into so many", "microbatches")
    for rank, work in enumerate(ranks.work):
        tokens.add_metric([model, str(rank)], work.tokens)
        waited.add_metric([model, str(rank)], work.waited_s)
        inter_node.add_metric([model, str(rank)], work.inter_node)
        copies.add_metric([model, str(rank)], work.copies)
        moved.add_metric([model, str(rank), "dispatch"], work.dispatch_bytes)
        moved.add_metric([model, str(rank), "combine"], work.combine_bytes)
    for count, number in sorted(ranks.chosen.items()):
        steps.add_metric([model, str(count)], number)
    yield from (tokens, waited, inter_node, copies, moved, steps)


class _Page(Collector):
    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        return self._collect()


def _histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
    return Histogram(PREFIX + name, text, labelnames=[LABEL], buckets=buckets, registry=None)


def _renamed(metric: Metric, name: str) -> Metric:
    alias = Metric(name, f"{metric.documentation} (as {metric.name})", metric.type)
    for sample in metric.samples:
        alias.samples.append(sample._replace(name=name + sample.name.removeprefix(metric.name)))
    return alias
