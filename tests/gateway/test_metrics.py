"""The page shows what was counted, under our names and vLLM's."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Histogram
from prometheus_client.parser import text_string_to_metric_families

from moeserve.comm.dispatcher import DispatchStats
from moeserve.core import (
    BudgetBy,
    Counters,
    FinishReason,
    Refusal,
    StepChoice,
    StepPlan,
    Timing,
)
from moeserve.observe.families import ALIASES, CacheInfo
from moeserve.observe.metrics import _FAST as ITL_BUCKETS
from moeserve.observe.metrics import Metrics
from moeserve.observe.requests import RequestRecord


@dataclass
class Load:
    running: int = 3
    waiting: int = 4
    total_blocks: int = 10
    free_blocks: int = 4


# On every sample but those of the process.
COMMON = {"model_name": "tiny", "engine": "0"}


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    page, kind = metrics.render()
    assert kind.startswith("text/plain")
    return {
        (s.name, tuple(sorted((k, v) for k, v in s.labels.items() if k not in COMMON))): s.value
        for family in text_string_to_metric_families(page.decode())
        for s in family.samples
    }


def bound() -> tuple[Metrics, Counters]:
    metrics, counters = Metrics(), Counters()
    metrics.bind("tiny", lambda: counters, Load, cache=CacheInfo(16, 10, "float32", True))
    return metrics, counters


def test_counters_are_read_when_asked() -> None:
    metrics, counters = bound()
    assert samples(metrics)["moeserve_generated_tokens_total", ()] == 0
    counters.generated_tokens = 42
    counters.finished[FinishReason.STOP] = 5
    found = samples(metrics)
    assert found["moeserve_generated_tokens_total", ()] == 42
    assert found["vllm:generation_tokens_total", ()] == 42
    assert found["vllm:request_success_total", (("finished_reason", "stop"),)] == 5
    assert found["moeserve_requests_finished_total", (("finished_reason", "abort"),)] == 0


def test_load_is_a_gauge() -> None:
    found = samples(bound()[0])
    assert found["moeserve_num_requests_running", ()] == 3
    assert found["vllm:num_requests_waiting", ()] == 4
    assert found["vllm:kv_cache_usage_perc", ()] == 0.6


def test_durations_fill_histograms() -> None:
    metrics, _ = bound()
    metrics.on_step(StepPlan(()), 0.02)
    metrics.on_gaps({0.5: 2})
    timing = Timing(5, 0, 3, scheduled_s=0.1, first_token_s=0.3, elapsed_s=1.3)
    metrics.on_first_token(timing)
    metrics.on_finish(FinishReason.STOP, timing)
    found = samples(metrics)
    sums = {
        name: round(found[f"vllm:{name}_sum", ()], 6)
        for name in (
            "time_to_first_token_seconds",
            "inter_token_latency_seconds",
            "e2e_request_latency_seconds",
            "request_queue_time_seconds",
            "request_prefill_time_seconds",
            "request_decode_time_seconds",
            "request_inference_time_seconds",
            "request_time_per_output_token_seconds",
        )
    }
    assert list(sums.values()) == [0.3, 1.0, 1.3, 0.1, 0.2, 1.0, 1.2, 0.5]
    assert found["moeserve_inter_token_latency_seconds_count", ()] == 2
    assert found["moeserve_step_seconds_count", ()] == 1


def test_requests_that_never_ran_have_no_token_times() -> None:
    metrics, _ = bound()
    never = Timing(5, 0, 0, scheduled_s=None, first_token_s=None, elapsed_s=0.2)
    metrics.on_finish(FinishReason.DEADLINE, never)
    found = samples(metrics)
    assert found["moeserve_e2e_latency_seconds_count", ()] == 1
    for name in ("decode_time", "inference_time", "time_per_output_token", "queue_time"):
        assert found[f"moeserve_{name}_seconds_count", ()] == 0


def test_every_alias_is_served_with_the_value_of_ours() -> None:
    metrics, _ = bound()
    timing = Timing(5, 0, 3, scheduled_s=0.1, first_token_s=0.3, elapsed_s=1.3)
    metrics.on_first_token(timing)
    metrics.on_step(StepPlan(()), 0.02)
    metrics.on_gaps({0.5: 1})
    metrics.on_finish(FinishReason.STOP, timing)
    metrics.on_request(RequestRecord("x", "tiny", "OK", 1.3, n=2, max_tokens=7, longest=3))
    found = samples(metrics)
    endings = ("", "_total", "_bucket", "_sum", "_count")
    for ours, others in ALIASES.items():
        for theirs in others:
            pairs = [
                (value, found[f"vllm:{theirs}{ending}", labels])
                for ending in endings
                for (name, labels), value in found.items()
                if name == f"moeserve_{ours}{ending}"
            ]
            assert pairs, ours
            assert all(a == b for a, b in pairs)


def test_why_steps_had_their_shape_is_counted() -> None:
    metrics, _ = bound()
    mixed = StepChoice(2, 30, 40, BudgetBy.TPOT, admitted=1, refused=Refusal.TOKENS)
    for choice in (StepChoice(2, budget=64), mixed, mixed._replace(group=(0, 2), swapped_in=1)):
        metrics.on_step(StepPlan((), choice=choice), 0.01)
    found = {
        (name.removeprefix("moeserve_"), *(value for _, value in labels)): count
        for (name, labels), count in samples(metrics).items()
        if name.startswith("moeserve_step") and count
    }
    assert found["steps_by_kind_total", "decode"] == 1
    assert found["steps_by_kind_total", "mixed"] == 2
    assert found["steps_by_budget_total", "most"] == 1
    assert found["steps_by_budget_total", "tpot"] == 2
    assert found["steps_by_refusal_total", "none"] == 1
    assert found["steps_by_refusal_total", "tokens"] == 2
    assert found["steps_layered_total",] == 1
    assert found["step_budget_tokens",] == 40
    assert found["step_prefill_tokens_total",] == 60
    assert found["step_admitted_requests_total",] == 2
    assert found["step_swapped_in_requests_total",] == 1


def test_two_of_them_share_nothing() -> None:
    one, counters = bound()
    other, _ = bound()
    counters.steps = 7
    assert samples(one)["moeserve_steps_total", ()] == 7
    assert samples(other)["moeserve_steps_total", ()] == 0


def test_before_a_model_is_there_the_page_has_no_load() -> None:
    assert not any("requests_running" in name for name, _ in samples(Metrics()))


@dataclass
class Ranks:
    """Two ranks of a group, or many."""

    work: list[DispatchStats]
    chosen: dict[int, int] = field(default_factory=dict)


def test_what_moves_between_ranks_is_shown_by_sender() -> None:
    metrics, ranks = Metrics(), Ranks([DispatchStats(), DispatchStats()], {1: 3, 2: 5})
    metrics.bind("tiny", Counters, Load, ranks)
    moved = ranks.work[1]
    moved.tokens, moved.waited_s, moved.inter_node = 30, 0.5, 4
    moved.copies, moved.dispatch_bytes, moved.combine_bytes = 9, 900, 700
    found = samples(metrics)

    def value(name: str, **labels: str) -> float:
        return found[name, tuple(sorted(labels.items()))]

    assert value("moeserve_rank_layer_tokens_total", rank="1") == 30
    assert value("moeserve_rank_waited_seconds_total", rank="1") == 0.5
    assert value("moeserve_rank_copies_inter_node_total", rank="1") == 4
    assert value("moeserve_rank_copies_total", rank="1") == 9
    assert value("moeserve_rank_sent_bytes_total", rank="1", direction="dispatch") == 900
    assert value("moeserve_rank_sent_bytes_total", rank="1", direction="combine") == 700
    assert value("moeserve_rank_copies_total", rank="0") == 0
    assert value("moeserve_steps_by_microbatches_total", microbatches="2") == 5


@given(st.lists(st.dictionaries(st.floats(0, 20), st.integers(1, 100), max_size=4), max_size=4))
def test_gaps_between_tokens_fall_into_the_buckets_of_one_by_one(
    steps: list[dict[float, int]],
) -> None:
    metrics, _ = bound()
    plain = Histogram("plain", "one by one", buckets=ITL_BUCKETS, registry=None)
    for gaps in steps:
        metrics.on_gaps(gaps)
        for seconds, count in gaps.items():
            for _ in range(count):
                plain.observe(seconds)
    found = samples(metrics)
    for sample in next(iter(plain.collect())).samples:
        labels = tuple(sample.labels.items())
        name = sample.name.replace("plain", "moeserve_inter_token_latency_seconds")
        if not name.endswith("_created"):
            assert found[name, labels] == pytest.approx(sample.value)


def test_every_distribution_is_there_before_the_first_request() -> None:
    found = samples(bound()[0])
    names = {name.removesuffix("_bucket") for name, _ in found if name.endswith("_bucket")}
    assert {
        f"vllm:{name}"
        for name in (
            "request_prompt_tokens",
            "request_generation_tokens",
            "request_max_num_generation_tokens",
            "request_params_n",
            "request_params_max_tokens",
            "iteration_tokens_total",
            "time_to_first_token_seconds",
            "time_per_output_token_seconds",
            "inter_token_latency_seconds",
        )
    } <= names
    assert all(found[f"{name}_count", ()] == 0 for name in names)


def test_every_sample_says_whose_it_is() -> None:
    page, _ = bound()[0].render()
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            if not sample.name.startswith("process_"):
                assert COMMON.items() <= sample.labels.items(), sample


def test_the_process_and_the_cache_are_described() -> None:
    found = samples(bound()[0])
    assert found["process_resident_memory_bytes", ()] > 0
    assert found["process_open_fds", ()] > 0
    said = next(dict(labels) for name, labels in found if name == "vllm:cache_config_info")
    assert said["block_size"] == "16"
    assert said["num_gpu_blocks"] == "10"
    assert said["enable_prefix_caching"] == "True"


def test_drafts_are_shown_as_vllm_shows_them() -> None:
    metrics, counters = bound()
    counters.drafts, counters.drafted_tokens, counters.accepted_tokens = 3, 9, 4
    found = samples(metrics)
    assert found["vllm:spec_decode_num_drafts_total", ()] == 3
    assert found["vllm:spec_decode_num_draft_tokens_total", ()] == 9
    assert found["vllm:spec_decode_num_accepted_tokens_total", ()] == 4


def test_what_clients_asked_for_is_counted_once_a_request() -> None:
    metrics, _ = bound()
    metrics.on_request(RequestRecord("a", "tiny", "OK", 1.0, n=2, max_tokens=60, longest=50))
    metrics.on_request(RequestRecord("b", "tiny", "OK", 1.0, longest=3))
    metrics.on_request(RequestRecord("c", "tiny", "RESOURCE_EXHAUSTED", 0.0, refused=True, n=9))
    found = samples(metrics)
    assert found["vllm:request_params_n_sum", ()] == 3
    assert found["vllm:request_params_n_count", ()] == 2
    assert found["vllm:request_params_max_tokens_sum", ()] == 60
    assert found["vllm:request_params_max_tokens_count", ()] == 1
    assert found["vllm:request_max_num_generation_tokens_sum", ()] == 53
