"""What dashboards ask for is there: ours, and those that were made for vLLM."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from moeserve.comm.dispatcher import DispatchStats
from moeserve.core import Counters
from moeserve.engine.loop import EngineLoad
from moeserve.observe.families import CacheInfo
from moeserve.observe.metrics import Metrics

DASHBOARD = Path(__file__).resolve().parents[2] / "launch/grafana/moeserve.json"
A_METRIC = re.compile(r"\b(?:moeserve_|process_|vllm:)\w+")
LABELS = re.compile(r"\{([^}]*)\}")
# What the dashboards in vLLM's own examples query, for the engine that is current.
VLLM = """
vllm:e2e_request_latency_seconds_bucket vllm:e2e_request_latency_seconds_sum
vllm:e2e_request_latency_seconds_count vllm:prompt_tokens_total vllm:generation_tokens_total
vllm:time_per_output_token_seconds_bucket vllm:time_per_output_token_seconds_sum
vllm:inter_token_latency_seconds_bucket vllm:inter_token_latency_seconds_sum
vllm:num_requests_running vllm:num_requests_waiting vllm:time_to_first_token_seconds_bucket
vllm:time_to_first_token_seconds_sum vllm:kv_cache_usage_perc vllm:gpu_cache_usage_perc
vllm:request_prompt_tokens_bucket vllm:request_prompt_tokens_sum
vllm:request_generation_tokens_bucket vllm:request_generation_tokens_sum
vllm:request_success_total vllm:request_queue_time_seconds_sum
vllm:request_prefill_time_seconds_sum vllm:request_decode_time_seconds_sum
vllm:request_inference_time_seconds_bucket vllm:request_max_num_generation_tokens_sum
vllm:request_params_n_count vllm:request_params_max_tokens_bucket vllm:iteration_tokens_total_bucket
vllm:prefix_cache_queries_total vllm:prefix_cache_hits_total vllm:num_preemptions_total
vllm:spec_decode_num_drafts_total vllm:spec_decode_num_draft_tokens_total
vllm:spec_decode_num_accepted_tokens_total vllm:cache_config_info
process_resident_memory_bytes process_cpu_seconds_total
""".split()


class Ranks:
    """Two that have worked."""

    work = (DispatchStats(), DispatchStats())
    chosen = {1: 1}  # noqa: RUF012 - read only


def served() -> dict[str, set[str]]:
    """The labels of every sample that a server of several ranks shows before its first request."""
    metrics, counters = Metrics(), Counters()
    load = EngineLoad(0, 0, 8, 8, 0, 16, True)
    metrics.bind("tiny", lambda: counters, lambda: load, Ranks(), CacheInfo(16, 8, "int8", True))
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(metrics.render()[0].decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def queries() -> list[str]:
    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text())
    variables = [v["definition"] for v in dashboard["templating"]["list"] if "definition" in v]
    targets = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", [])]
    return variables + targets


def test_our_dashboard_asks_for_what_is_served() -> None:
    found, asked = served(), {name for query in queries() for name in A_METRIC.findall(query)}
    assert len(asked) > 40
    assert asked <= found.keys()


def test_our_dashboard_selects_and_groups_by_labels_that_samples_have() -> None:
    found = served()
    # Prometheus adds the instance as it scrapes.
    known = {"instance"} | {label for labels in found.values() for label in labels}
    for query in queries():
        selected = {part.split("=")[0] for s in LABELS.findall(query) for part in s.split(",")}
        grouped = {label for g in re.findall(r"by \(([^)]*)\)", query) for label in g.split(", ")}
        assert selected | grouped <= known, query
        for name, selector in re.findall(r"(moeserve_\w+)\{([^}]*)\}", query):
            assert {p.split("=")[0] for p in selector.split(",")} <= found[name] | {"instance"}


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for at in (panel["gridPos"] for panel in panels):
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not cells & taken
        assert at["x"] + at["w"] <= 24
        taken |= cells


def test_dashboards_made_for_vllm_find_their_metrics() -> None:
    found = served()
    assert set(VLLM) <= found.keys()
    for name in VLLM:
        if name.startswith("vllm:"):
            assert {"model_name", "engine"} <= found[name]
