"""Spans of requests, as OpenTelemetry has them, to a collector over OTLP's gRPC.

One trace per request of a client. Its door begins a span, or goes on with the trace that the
client's ``traceparent`` names (W3C Trace Context); the ranks that work for it hang theirs under
that one: ``queue``, ``prefill``, ``decode``, and ``kv_transfer`` where KV came from elsewhere. What
crosses processes is the text of a ``traceparent``, ``Request.trace``.

Names of attributes are those of OpenTelemetry's conventions for generative AI, and vLLM's for
durations. Spans of ranks are made when a request leaves its engine, from what the engine has kept
of it anyway, so a step costs nothing more. Sampling is the SDK's (``OTEL_TRACES_SAMPLER``); a
collector that is slow or away costs spans, and no request waits for it.

The packages are those of ``moeserve[otel]``; without ``--otlp-endpoint`` they are not imported.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, Protocol

import moeserve
from moeserve.core import FinishReason, StepPlan, Timing
from moeserve.errors import ConfigError
from moeserve.observe.requests import OK, RequestRecord

# OpenTelemetry's, which is not there at import.
Provider = Any
Exporter = Any
Span = Any
Context = Any

# A ``traceparent`` that can be gone on with: version 00, ids that are not all zeros.
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
TRACE_CHARS = 55
# How long a batch may take to be exported.
EXPORT_S = 3.0
Attribute = str | bool | int | float | tuple[str, ...]

_trace: ContextVar[str] = ContextVar("trace", default="")


def serve_trace(traceparent: str) -> None:
    """This task, and those it starts, serve a request that came with this header; anything that is
    none counts as no header."""
    _trace.set(traceparent if _TRACEPARENT.fullmatch(traceparent) else "")


def served_trace() -> str:
    """The ``traceparent`` that this task's request came with; empty if with none."""
    return _trace.get()


class DoorSpan(Protocol):
    """Of one client's request, from its arrival. ``trace`` is what its parts hang under."""

    @property
    def trace(self) -> str: ...

    def end(self, record: RequestRecord, attributes: Mapping[str, Attribute]) -> None:
        """The request has ended, or was refused."""
        ...


class Untraced:
    """The span of a request that nobody traces."""

    trace = ""

    def end(self, record: RequestRecord, attributes: Mapping[str, Attribute]) -> None: ...


UNTRACED = Untraced()


class RequestSpans:
    """Makes all spans of a process. As an engine's observer it makes those of that engine's
    requests. For any thread."""

    def __init__(self, provider: Provider, now_ns: Callable[[], int] = time.time_ns) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("moeserve", moeserve.__version__)
        self._text = TraceContextTextMapPropagator()
        self._now_ns = now_ns

    def open(self, parent: str) -> DoorSpan:
        """The span of a request that has just arrived, under ``parent`` if that is any."""
        from opentelemetry.trace import SpanKind

        span = self._tracer.start_span(
            "generate",
            context=self._context(parent),
            kind=SpanKind.SERVER,
            start_time=self._now_ns(),
        )
        carrier: dict[str, str] = {}
        self._text.inject(carrier, _holding(span))
        return _OpenDoorSpan(span, carrier.get("traceparent", ""), self._now_ns)

    def add(
        self, trace: str, name: str, began_s: float, ended_s: float, **attributes: Attribute
    ) -> None:
        """A span that is over, from ``began_s`` to ``ended_s`` seconds ago; none without
        ``trace``."""
        if not _TRACEPARENT.fullmatch(trace):
            return
        now = self._now_ns()
        span = self._tracer.start_span(
            name,
            context=self._context(trace),
            attributes={f"moeserve.{key}": value for key, value in attributes.items()},
            start_time=now - round(began_s * 1e9),
        )
        span.end(now - round(ended_s * 1e9))

    def on_finish(self, reason: FinishReason, timing: Timing) -> None:
        """A request has left the engine, which has had it for ``elapsed_s``."""
        if not timing.trace:
            return
        whole, scheduled, first = timing.elapsed_s, timing.scheduled_s, timing.first_token_s
        known = {"request_id": timing.request_id}
        ended = {"finish_reason": reason.value}
        waited = whole if scheduled is None else scheduled
        last = ended if scheduled is None else {}
        self.add(timing.trace, "queue", whole, whole - waited, **known, **last)
        if scheduled is None:
            return
        prompt = {
            "prompt_tokens": timing.prompt_tokens,
            "cached_tokens": timing.cached_tokens,
        }
        if first is None:
            self.add(timing.trace, "prefill", whole - scheduled, 0.0, **known, **prompt, **ended)
            return
        self.add(timing.trace, "prefill", whole - scheduled, whole - first, **known, **prompt)
        made = {"output_tokens": timing.output_tokens}
        self.add(timing.trace, "decode", whole - first, 0.0, **known, **made, **ended)

    def on_step(self, plan: StepPlan, seconds: float) -> None: ...

    def on_gaps(self, gaps: Mapping[float, int]) -> None: ...

    def on_first_token(self, timing: Timing) -> None: ...

    def close(self) -> None:
        """Exports what is left, for no longer than a batch or two may take."""
        self._provider.shutdown()

    def _context(self, trace: str) -> Context:
        from opentelemetry import context

        empty = context.Context()
        return self._text.extract({"traceparent": trace}, empty) if trace else empty


class _OpenDoorSpan:
    """A ``DoorSpan`` under way."""

    def __init__(self, span: Span, trace: str, now_ns: Callable[[], int]) -> None:
        self._span = span
        self._now_ns = now_ns
        self.trace = trace

    def end(self, record: RequestRecord, attributes: Mapping[str, Attribute]) -> None:
        from opentelemetry.trace import Status, StatusCode

        for name, value in {**attributes, **attributes_of(record)}.items():
            self._span.set_attribute(name, value)
        operation = attributes.get("gen_ai.operation.name", "generate")
        self._span.update_name(f"{operation} {record.model}".rstrip())
        if record.status != OK:
            self._span.set_status(Status(StatusCode.ERROR, record.error))
        self._span.end(self._now_ns())


def attributes_of(record: RequestRecord) -> dict[str, Attribute]:
    """What a record says, as attributes of its span."""
    found: dict[str, Attribute] = {
        "gen_ai.provider.name": "moeserve",
        "gen_ai.request.model": record.model,
        "gen_ai.response.id": record.id,
        "gen_ai.request.choice.count": record.n,
    }
    if record.max_tokens is not None:
        found["gen_ai.request.max_tokens"] = record.max_tokens
    if record.tenant:
        found["moeserve.tenant"] = record.tenant
    if record.status != OK:
        found["error.type"] = record.status
    if record.refused:
        return found
    found |= {
        "gen_ai.response.model": record.model,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
        "gen_ai.response.finish_reasons": tuple(filter(None, record.finish.split(","))),
        "gen_ai.latency.e2e": record.total_s,
    }
    if record.ttft_s is not None:
        found["gen_ai.response.time_to_first_chunk"] = record.ttft_s
        found["gen_ai.latency.time_to_first_token"] = record.ttft_s
    if record.queue_s is not None:
        found["gen_ai.latency.time_in_queue"] = record.queue_s
    return found


def open_spans(endpoint: str | None) -> RequestSpans | None:
    """To the collector at ``endpoint``, such as ``http://127.0.0.1:4317``; None without one.
    ConfigError where the packages for it are missing."""
    if endpoint is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ConfigError(
            f"otlp_endpoint={endpoint!r}: opentelemetry is not installed: pip install "
            "'moeserve[otel]'"
        ) from error
    return RequestSpans(provider_of(OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_S)))


def provider_of(exporter: Exporter) -> Provider:
    """One that exports in batches, on a thread of its own; its queue is bounded."""
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # What the environment says (OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES) comes first.
    own = {
        "service.name": "moeserve",
        "service.version": moeserve.__version__,
        "service.instance.id": f"{socket.gethostname()}-{os.getpid()}",
    }
    resource = Resource.create(own).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=2000))
    return provider


def _holding(span: Span) -> Context:
    from opentelemetry import context, trace

    return trace.set_span_in_context(span, context.Context())
