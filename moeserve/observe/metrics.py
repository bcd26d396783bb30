"""What Prometheus sees.

Counts come from the engine's counters and a load snapshot at the moment of scraping; only
distributions are kept here: the engine feeds those of steps and sequences (it calls the ``on_``
methods), the service those of clients' requests. ``families`` says how they are written. The
registry is this object's own; it also holds ``process_*``, of this process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from moeserve.core import Counters, FinishReason, StepPlan, Timing
from moeserve.observe.choices import StepChoices
from moeserve.observe.counted import CountedParts
from moeserve.observe.families import (
    ALIASES,
    PREFIX,
    CacheInfo,
    Distribution,
    RanksView,
    by_label,
    cache_config,
    counter,
    gauge,
    of_ranks,
    renamed,
)
from moeserve.observe.requests import RequestRecord
from moeserve.observe.spans import RequestSpans

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SLOW = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_STEP_TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
_SEQUENCES = (1, 2, 5, 10, 20)

# Name and text of each counter, by the field of ``Counters``.
_COUNTED: Mapping[str, tuple[str, str]] = {
    "steps": ("steps", "forward passes"),
    "prompt_tokens": ("prompt_tokens", "tokens of admitted prompts"),
    "generated_tokens": ("generated_tokens", "tokens made"),
    "computed_tokens": ("computed_tokens", "tokens run"),
    "recomputed_tokens": ("recomputed_tokens", "of these, once more"),
    "drafts": ("drafts", "guesses of what follows, of one token or more"),
    "drafted_tokens": ("drafted_tokens", "tokens in them"),
    "accepted_tokens": ("accepted_tokens", "of these, those that were right"),
    "draft_read_tokens": ("draft_read_tokens", "read by a draft model before it could guess"),
    "prefix_queried_tokens": ("prefix_cache_queries", "tokens looked up"),
    "prefix_hit_tokens": ("prefix_cache_hits", "tokens found"),
    "layered_steps": ("layered_steps", "forward passes with prompts in some layers only"),
    "layered_tokens": ("layered_tokens", "tokens that went through the layers so"),
    "preemptions": ("preemptions", "requests put back for room"),
    "evicted_blocks": ("evicted_blocks", "cached KV blocks given up"),
    "swaps": ("swaps", "preempted requests whose KV went to host memory"),
    "swap_out_bytes": ("swap_out_bytes", "of KV, to host memory"),
    "swap_in_bytes": ("swap_in_bytes", "of KV, back from there"),
    "swap_copies": ("swap_copies", "runs of KV that were copied, out or in"),
    "swap_spared_bytes": ("swap_spared_bytes", "not copied, since host memory had them"),
    "swap_recomputed": ("swap_recomputed", "preempted requests that are computed again instead"),
    "plan_changes": ("plan_changes", "changes of plan that ended"),
    "plan_layers_switched": ("plan_layers_switched", "in them"),
    "plan_bytes_read": ("plan_bytes_read", "of experts for them"),
    "plan_paused_s": ("plan_paused_seconds", "steps held up"),
}


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


class Metrics:
    """Observes one engine and renders its page; ``bind`` says whose numbers to show. ``spans`` are
    for those who build engines: they observe each one that runs requests itself. ``parts`` are
    what others count: each adds its own once.
    """

    def __init__(self, spans: RequestSpans | None = None) -> None:
        self.spans = spans
        self.parts = CountedParts()
        self._model = ""
        self._counters: Callable[[], Counters] = Counters
        self._load: Callable[[], LoadView] | None = None
        self._ranks: RanksView | None = None
        self._cache: CacheInfo | None = None
        self._distributions: list[Distribution] = []
        # Of sequences, in seconds.
        self._ttft = self._kept("time_to_first_token_seconds", "arrival to first token", _SLOW)
        self._itl = self._kept("inter_token_latency_seconds", "token to token", _FAST)
        self._tpot = self._kept("time_per_output_token_seconds", "its mean of a sequence", _FAST)
        self._e2e = self._kept("e2e_latency_seconds", "arrival to end of a sequence", _SLOW)
        self._queue = self._kept("queue_time_seconds", "arrival to first step", _SLOW)
        self._inference = self._kept("inference_time_seconds", "first step to end", _SLOW)
        self._prefill = self._kept("prefill_time_seconds", "first step to first token", _SLOW)
        self._decode = self._kept("decode_time_seconds", "first token to end", _SLOW)
        # Of sequences, in tokens.
        self._prompt = self._kept("request_prompt_tokens", "tokens of a prompt", _TOKENS)
        self._fresh = self._kept("request_prefilled_tokens", "of these, not from cache", _TOKENS)
        self._made = self._kept("request_generated_tokens", "tokens that one made", _TOKENS)
        # Of steps.
        self._step = self._kept("step_seconds", "one forward pass", _FAST)
        self._step_tokens = self._kept("step_tokens", "tokens in a forward pass", _STEP_TOKENS)
        self._choices = StepChoices()
        # Of clients' requests, which may be several sequences.
        self._longest = self._kept("request_longest_tokens", "of its longest sequence", _TOKENS)
        self._n = self._kept("request_n", "sequences asked for", _SEQUENCES)
        self._asked = self._kept("request_max_tokens", "tokens asked for at most", _TOKENS)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Page(self.collect))
        self._registry.register(_Page(self.parts.collect))
        ProcessCollector(registry=self._registry)

    def _kept(self, name: str, text: str, bounds: tuple[float, ...]) -> Distribution:
        kept = Distribution(name, text, bounds)
        self._distributions.append(kept)
        return kept

    def bind(
        self,
        model: str,
        counters: Callable[[], Counters],
        load: Callable[[], LoadView],
        ranks: RanksView | None = None,
        cache: CacheInfo | None = None,
    ) -> None:
        """What is asked at every scrape; ``ranks`` where there are several."""
        self._model, self._counters, self._load = model, counters, load
        self._ranks, self._cache = ranks, cache

    def also(self, collect: Callable[[], Iterable[Metric]]) -> None:
        """Metrics of another's, asked for at every scrape."""
        self._registry.register(_Page(collect))

    def render(self) -> tuple[bytes, str]:
        """The page and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4

    def on_gaps(self, gaps: Mapping[float, int]) -> None:
        for seconds, count in gaps.items():
            self._itl.add(seconds, count)

    def on_step(self, plan: StepPlan, seconds: float) -> None:
        self._step.add(seconds)
        self._step_tokens.add(plan.num_tokens)
        self._choices.note(plan.choice)

    def on_first_token(self, timing: Timing) -> None:
        if timing.first_token_s is None:
            return
        self._ttft.add(timing.first_token_s)
        if timing.scheduled_s is not None:
            self._queue.add(timing.scheduled_s)
            self._prefill.add(timing.first_token_s - timing.scheduled_s)

    def on_finish(self, reason: FinishReason, timing: Timing) -> None:
        """Of one sequence."""
        self._e2e.add(timing.elapsed_s)
        self._prompt.add(timing.prompt_tokens)
        self._made.add(timing.output_tokens)
        if timing.scheduled_s is not None:
            self._inference.add(timing.elapsed_s - timing.scheduled_s)
            known = timing.cached_tokens + timing.received_tokens
            self._fresh.add(max(0, timing.prompt_tokens - known))
        if timing.first_token_s is not None:
            decoding = timing.elapsed_s - timing.first_token_s
            self._decode.add(decoding)
            if timing.output_tokens > 1:
                self._tpot.add(decoding / (timing.output_tokens - 1))

    def on_request(self, record: RequestRecord) -> None:
        """A client's request has ended that was not refused."""
        if record.refused:
            return
        self._longest.add(record.longest)
        self._n.add(record.n)
        if record.max_tokens is not None:
            self._asked.add(record.max_tokens)

    def collect(self) -> Iterator[Metric]:
        """Every metric, each followed by its aliases."""
        for metric in self._ours():
            yield metric
            for alias in ALIASES.get(metric.name.removeprefix(PREFIX), ()):
                yield renamed(metric, f"vllm:{alias}")

    def _ours(self) -> Iterator[Metric]:
        model, count = self._model, self._counters()
        if self._load is not None:
            load = self._load()
            used = load.total_blocks - load.free_blocks
            yield gauge(model, "num_requests_running", "in the running batch", load.running)
            yield gauge(model, "num_requests_waiting", "in the queue", load.waiting)
            yield gauge(model, "kv_blocks", "KV blocks in all", load.total_blocks)
            share = used / max(1, load.total_blocks)
            yield gauge(model, "kv_cache_usage_ratio", "KV blocks in use, of 1", share)
        if self._cache is not None:
            yield cache_config(model, self._cache)
        for field, (name, text) in _COUNTED.items():
            yield counter(model, name, text, getattr(count, field))
        yield by_label(
            model,
            "requests_finished",
            "ended requests",
            "finished_reason",
            {reason.value: count.finished.get(reason, 0) for reason in FinishReason},
        )
        if self._ranks is not None:
            yield from of_ranks(model, self._ranks)
        yield from self._choices.families(model)
        for distribution in self._distributions:
            yield distribution.family(model)


class _Page(Collector):
    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        return self._collect()
