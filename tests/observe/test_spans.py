"""What spans say, against an exporter that keeps them in memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode, format_trace_id

from moeserve.core import FinishReason, Timing
from moeserve.errors import ConfigError
from moeserve.observe.requests import OK, RequestRecord
from moeserve.observe.spans import RequestSpans, open_spans, serve_trace, served_trace

NOW_NS = 1_700_000_000_000_000_000
CLIENT = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"


class Kept:
    """Spans that end at a time that stands still."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.spans = RequestSpans(provider, now_ns=lambda: NOW_NS)

    def take(self) -> dict[str, ReadableSpan]:
        found = {span.name: span for span in self._exporter.get_finished_spans()}
        self._exporter.clear()
        return found


@pytest.fixture
def kept() -> Iterator[Kept]:
    kept = Kept()
    yield kept
    kept.spans.close()


def timing(scheduled_s: float | None, first_token_s: float | None) -> Timing:
    return Timing(7, 2, 5, scheduled_s, first_token_s, 4.0, "req-1", CLIENT)


def stretch(span: ReadableSpan) -> tuple[float, float]:
    """Seconds before now, from and to."""
    assert span.start_time is not None and span.end_time is not None
    return (NOW_NS - span.start_time) / 1e9, (NOW_NS - span.end_time) / 1e9


def test_a_request_that_ended_has_been_in_three_places(kept: Kept) -> None:
    kept.spans.on_finish(FinishReason.LENGTH, timing(1.0, 1.5))
    found = kept.take()
    assert {name: stretch(span) for name, span in found.items()} == {
        "queue": (4.0, 3.0),
        "prefill": (3.0, 2.5),
        "decode": (2.5, 0.0),
    }
    for span in found.values():
        assert span.parent is not None and span.context is not None
        assert format_trace_id(span.context.trace_id) == CLIENT[3:35]
        assert f"{span.parent.span_id:016x}" == CLIENT[36:52]
    assert dict(found["prefill"].attributes or {}) == {
        "moeserve.request_id": "req-1",
        "moeserve.prompt_tokens": 7,
        "moeserve.cached_tokens": 2,
    }
    assert (found["decode"].attributes or {})["moeserve.output_tokens"] == 5
    assert (found["decode"].attributes or {})["moeserve.finish_reason"] == "length"


@pytest.mark.parametrize(("scheduled_s", "names"), [(None, ["queue"]), (1.0, ["prefill", "queue"])])
def test_one_that_did_not_get_so_far_says_where_it_ended(
    kept: Kept, scheduled_s: float | None, names: list[str]
) -> None:
    kept.spans.on_finish(FinishReason.DEADLINE, timing(scheduled_s, None))
    found = kept.take()
    assert sorted(found) == names
    last = found["queue" if scheduled_s is None else "prefill"]
    assert (last.attributes or {})["moeserve.finish_reason"] == "deadline"
    assert stretch(last)[1] == 0.0


def test_without_a_trace_there_are_no_spans(kept: Kept) -> None:
    kept.spans.on_finish(FinishReason.STOP, Timing(7, 2, 5, 1.0, 1.5, 4.0, "req-1"))
    kept.spans.add("", "kv_transfer", 1.0, 0.0)
    kept.spans.add("not a trace", "kv_transfer", 1.0, 0.0)
    assert kept.take() == {}


def test_a_door_goes_on_with_the_trace_of_its_client(kept: Kept) -> None:
    span = kept.spans.open(CLIENT)
    assert span.trace.split("-")[1] == CLIENT.split("-")[1]
    assert span.trace.split("-")[2] != CLIENT.split("-")[2]
    kept.spans.add(span.trace, "kv_transfer", 2.0, 1.0, bytes=10)
    record = RequestRecord(
        "r", "tiny", OK, 3.0, prompt_tokens=4, output_tokens=6, finish="stop", ttft_s=0.5
    )
    span.end(record, {"gen_ai.operation.name": "chat", "gen_ai.request.temperature": 0.0})
    found = kept.take()
    door, inner = found["chat tiny"], found["kv_transfer"]
    assert door.context is not None and inner.parent is not None
    assert inner.parent.span_id == door.context.span_id
    attributes = dict(door.attributes or {})
    assert attributes["gen_ai.usage.input_tokens"] == 4
    assert attributes["gen_ai.usage.output_tokens"] == 6
    assert attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert attributes["gen_ai.response.time_to_first_chunk"] == 0.5
    assert attributes["gen_ai.request.temperature"] == 0.0
    assert door.status.status_code is StatusCode.UNSET


def test_a_refusal_is_an_error_with_its_code(kept: Kept) -> None:
    span = kept.spans.open("")
    span.end(RequestRecord("r", "tiny", "INVALID_ARGUMENT", 0.0, refused=True, error="why"), {})
    (door,) = kept.take().values()
    assert door.parent is None
    assert door.status.status_code is StatusCode.ERROR
    assert door.status.description == "why"
    assert (door.attributes or {})["error.type"] == "INVALID_ARGUMENT"


def test_a_client_that_is_not_sampled_is_not_traced(kept: Kept) -> None:
    span = kept.spans.open(CLIENT[:-2] + "00")
    assert span.trace.endswith("-00")
    kept.spans.add(span.trace, "queue", 1.0, 0.0)
    span.end(RequestRecord("r", "tiny", OK, 3.0), {})
    assert kept.take() == {}


@given(st.text(max_size=60) | st.sampled_from([CLIENT, CLIENT.upper(), CLIENT + "0", "00" * 27]))
def test_a_header_that_is_no_traceparent_counts_as_none(header: str) -> None:
    serve_trace(header)
    assert served_trace() == (header if header == CLIENT else "")


def test_nothing_is_imported_and_nothing_made_without_an_endpoint() -> None:
    script = (
        "import sys; from moeserve.observe.spans import open_spans; "
        "assert open_spans(None) is None; "
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


def test_without_the_packages_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"moeserve\[otel\]"):
        open_spans("http://127.0.0.1:4317")
