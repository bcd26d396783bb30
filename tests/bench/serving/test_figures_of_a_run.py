"""Latencies, percentiles, goodput and rates of a run, from times that are given, not measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.bench.serving import statistics
from moeserve.bench.serving.figures import draw, require_figures
from moeserve.bench.serving.outcomes import Outcome
from moeserve.bench.serving.report import LoadReport, lines
from moeserve.bench.serving.saving import save
from moeserve.bench.serving.slos import Slo, kept_by, parse_slos
from moeserve.errors import ConfigError


def outcome(
    index: int = 0,
    *,
    sent_s: float = 0.0,
    messages: tuple[tuple[float, int], ...] = ((0.2, 1), (0.3, 1), (0.5, 2)),
    **changed: Any,
) -> Outcome:
    """Whose messages come at times after the sending."""
    at = tuple(sent_s + after for after, _ in messages)
    known: dict[str, Any] = {
        "index": index,
        "due_s": sent_s,
        "ready_s": sent_s,
        "sent_s": sent_s,
        "end_s": at[-1] if at else sent_s,
        "asked_input": 10,
        "asked_output": 4,
        "message_s": at,
        "message_tokens": tuple(tokens for _, tokens in messages),
        "input_tokens": 10,
        "output_tokens": sum(tokens for _, tokens in messages),
    }
    return Outcome(**(known | changed))


def report(*outcomes: Outcome, slos: tuple[str, ...] = (), **changed: Any) -> LoadReport:
    known: dict[str, Any] = {"percentiles": (50.0, 99.0), "cpu_s": 0.0, "settings": {}}
    return LoadReport(outcomes, parse_slos(slos), **(known | changed))


def test_latencies_are_those_of_the_field() -> None:
    found = outcome(sent_s=7.0)
    assert found.ttft_s == pytest.approx(0.2)
    assert found.e2el_s == pytest.approx(0.5)
    assert found.tpot_s == pytest.approx((0.5 - 0.2) / 3), "by tokens, not by messages"
    assert list(found.itl_s) == pytest.approx([0.1, 0.2])
    assert outcome(messages=((0.2, 1),)).tpot_s is None


def test_a_failed_request_has_no_latency() -> None:
    failed = outcome(failure="reset")
    assert (failed.ttft_s, failed.tpot_s, failed.e2el_s, list(failed.itl_s)) == (None,) * 3 + ([],)
    shown = report(failed, outcome(1)).to_json()
    assert shown["failures"] == {"reset": 1}
    assert (shown["completed"], shown["failed"], shown["total_output_tokens"]) == (1, 1, 4)
    assert shown["max_ttft_ms"] == pytest.approx(200)
    assert "1 of 2 requests failed" in " ".join(shown["warnings"])


@given(values=st.lists(st.floats(0, 1e6), min_size=1), asked=st.lists(st.floats(0, 100)))
def test_percentiles_are_those_of_numpy_and_in_order(
    values: list[float], asked: list[float]
) -> None:
    found = statistics.spread(values, asked)
    assert set(found.percentiles) == {50.0, *asked}
    for p, value in found.percentiles.items():
        assert value == pytest.approx(float(np.percentile(values, p)))
    in_order = list(found.percentiles.values())
    assert in_order == sorted(in_order)
    assert found.least <= in_order[0] <= in_order[-1] <= found.most
    assert found.count == len(values)


SPANS = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), min_size=1, max_size=40)


@given(spans=SPANS)
def test_outstanding_is_what_a_count_at_every_moment_says(spans: list[tuple[int, int]]) -> None:
    outcomes = [
        outcome(i, sent_s=float(start), end_s=float(start + length))
        for i, (start, length) in enumerate(spans)
    ]
    steps = statistics.outstanding(outcomes)
    times = [at for at, _ in steps]
    assert times == sorted(set(times))
    assert steps[-1][1] == 0
    for at, level in steps:
        assert level == sum(o.sent_s <= at < o.end_s for o in outcomes)
    area = sum(
        level * (after - at)
        for (at, level), after in zip(steps, [*times[1:], times[-1]], strict=True)
    )
    duration = statistics.duration(outcomes)
    assert statistics.mean_outstanding(outcomes) * duration == pytest.approx(area)


@given(
    messages=st.lists(st.tuples(st.floats(0, 9), st.integers(0, 5)), min_size=1, max_size=30),
    bin_s=st.floats(0.1, 3),
)
def test_the_token_rate_adds_up_to_all_tokens(
    messages: list[tuple[float, int]], bin_s: float
) -> None:
    found = outcome(messages=tuple(sorted(messages)))
    rates = statistics.token_rate([found], bin_s)
    assert sum(rates) * bin_s == pytest.approx(found.output_tokens)


def test_messages_without_counts_share_the_tokens_of_their_answer() -> None:
    found = outcome(messages=((0.5, 0), (1.5, 0)), output_tokens=6)
    assert statistics.token_rate([found], 1.0) == [3.0, 3.0]


def test_goodput_counts_requests_that_keep_every_limit() -> None:
    quick, late = outcome(0), outcome(1, messages=((0.4, 1), (0.5, 3)))
    slow = outcome(2, sent_s=0.5, messages=((0.1, 1), (1.5, 1)))
    failed = outcome(3, failure="http 500", end_s=2.0)
    made = report(quick, late, slow, failed, slos=("ttft:300ms", "tpot:200", "e2el:1s")).to_json()
    assert made["duration"] == 2.0
    assert made["request_goodput"] == 0.5
    assert made["slo_attainment"] == 0.25
    attained = {name: slo["attainment"] for name, slo in made["slos"].items()}
    assert attained == {"ttft": 0.5, "tpot": 0.5, "e2el": 0.5}


def test_one_token_has_a_tpot_of_nothing() -> None:
    single = outcome(messages=((0.2, 1),))
    assert kept_by([single], parse_slos(["tpot:1ms"])) == 1
    assert report(single).latency("tpot").count == 0


@pytest.mark.parametrize(
    ("word", "slo"),
    [
        ("ttft:200ms", Slo("ttft", 0.2)),
        ("tpot:12.5", Slo("tpot", 0.0125)),
        ("e2el:3s", Slo("e2el", 3.0)),
    ],
)
def test_limits_have_units(word: str, slo: Slo) -> None:
    (found,) = parse_slos([word])
    assert found.metric == slo.metric
    assert found.limit_s == pytest.approx(slo.limit_s)


@pytest.mark.parametrize("word", ["", "ttft", "itl:3", "ttft:0", "ttft:-1", "ttft:1h", "ttft:1e9"])
def test_limits_that_are_none_are_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="--slo"):
        parse_slos([word])
    with pytest.raises(ConfigError, match="has a limit already"):
        parse_slos(["ttft:1", "ttft:2s"])


def test_names_are_those_that_scripts_for_vllm_read() -> None:
    shown = report(outcome(0), outcome(1, sent_s=0.5), settings={"model_id": "demo"}).to_json()
    assert shown["model_id"] == "demo"
    assert (shown["duration"], shown["completed"]) == (1.0, 2)
    assert (shown["total_input_tokens"], shown["total_output_tokens"]) == (20, 8)
    assert (shown["request_throughput"], shown["output_throughput"]) == (2.0, 8.0)
    assert shown["total_token_throughput"] == 28.0
    assert shown["tokens_per_message"] == pytest.approx(4 / 3)
    for metric in ("ttft", "tpot", "itl", "e2el"):
        for name in ("mean", "median", "std", "p99"):
            assert math.isfinite(shown[f"{name}_{metric}_ms"])
    assert shown["median_ttft_ms"] == shown["p50_ttft_ms"] == pytest.approx(200)
    json.dumps(shown, allow_nan=False)


def test_lateness_of_ours_is_told_and_warned_of() -> None:
    late = outcome(sent_s=1.0, ready_s=0.9)
    shown = report(late).to_json()
    assert shown["max_send_lag_ms"] == pytest.approx(100)
    assert "sent up to 100.0 ms late" in shown["warnings"][0]
    waited = outcome(sent_s=1.0, due_s=0.2)  # for a place in a closed loop: ready only then
    assert report(waited).to_json()["max_send_lag_ms"] == 0.0
    assert report(waited).warnings() == []


@pytest.mark.parametrize(
    ("changed", "settings", "says"),
    [
        ({"asked_output": 9}, {"ignore_eos": True}, "1 answers are shorter than asked for"),
        ({"asked_output": 2}, {}, "1 answers are longer than asked for"),
        ({"asked_input": 5}, {}, "2.00 times the tokens"),
    ],
)
def test_what_spoils_figures_is_said(
    changed: dict[str, Any], settings: dict[str, Any], says: str
) -> None:
    made = report(outcome(**changed), settings=settings)
    assert [says in warning for warning in made.warnings()] == [True]
    assert f"warning: {made.warnings()[0]}" in lines(made)


def test_a_busy_client_and_requests_sent_again_are_said() -> None:
    said = " ".join(report(outcome(), cpu_s=0.45, resent=2).warnings())
    assert "busy for 90% of the run" in said
    assert "2 requests went out again" in said


def test_a_run_without_an_answer_has_a_report() -> None:
    failed = outcome(messages=(), failure="connect", detail="refused")
    shown = report(failed, slos=("ttft:1",)).to_json()
    assert (shown["completed"], shown["request_goodput"]) == (0, 0.0)
    assert "failed: 1 x connect (refused)" in lines(report(failed))
    json.dumps(shown, allow_nan=False)


def test_outcomes_are_saved_line_by_line(tmp_path: Path) -> None:
    save([outcome(0), outcome(1, failure="timeout")], tmp_path / "raw.jsonl")
    first, second = map(json.loads, (tmp_path / "raw.jsonl").read_text().splitlines())
    assert first["message_s"] == [0.2, 0.3, 0.5]
    assert first["message_tokens"] == [1, 1, 2]
    assert second["failure"] == "timeout"
    with pytest.raises(ConfigError, match="--save="):
        save([], tmp_path / "nowhere" / "raw.jsonl")


@pytest.mark.parametrize("failure", ["", "reset"])
def test_a_report_is_drawn(tmp_path: Path, failure: str) -> None:
    path = tmp_path / "run.svg"
    require_figures(path)
    draw(report(outcome(failure=failure), slos=("ttft:1s",)), path)
    assert "<svg" in path.read_text()
    with pytest.raises(ConfigError, match=r"\.png, \.svg or \.pdf"):
        require_figures(tmp_path / "run.jpeg")
