"""Spans from a server to a collector: OTLP over a real socket."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp

from moeserve.pb import inference_pb2 as pb

PATIENCE_S = 60.0
CLIENT = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"
TRACE, PARENT = CLIENT[3:35], CLIENT[36:52]


class Collector:
    """Keeps every span that is exported to it, with the process it is from."""

    def __init__(self) -> None:
        self._server = grpc.server(ThreadPoolExecutor(2))
        export = grpc.unary_unary_rpc_method_handler(
            self._export,
            request_deserializer=otlp.ExportTraceServiceRequest.FromString,
            response_serializer=otlp.ExportTraceServiceResponse.SerializeToString,
        )
        name = "opentelemetry.proto.collector.trace.v1.TraceService"
        handlers = grpc.method_handlers_generic_handler(name, {"Export": export})
        self._server.add_generic_rpc_handlers((handlers,))
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._lock = threading.Lock()
        self._spans: list[tuple[str, Any]] = []

    def __enter__(self) -> Collector:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait(PATIENCE_S)

    def of_trace(self, trace: str) -> list[tuple[str, Any]]:
        with self._lock:
            return [(who, s) for who, s in self._spans if s.trace_id.hex() == trace]

    def wait_for(self, trace: str, count: int) -> list[tuple[str, Any]]:
        deadline = time.monotonic() + PATIENCE_S
        while len(found := self.of_trace(trace)) < count:
            assert time.monotonic() < deadline, [span.name for _, span in found]
            time.sleep(0.05)
        return found

    def _export(self, request: Any, context: Any) -> Any:
        with self._lock:
            for resource in request.resource_spans:
                said = {a.key: a.value.string_value for a in resource.resource.attributes}
                assert said["service.name"] == "moeserve"
                for scope in resource.scope_spans:
                    self._spans += [(said["service.instance.id"], span) for span in scope.spans]
        return otlp.ExportTraceServiceResponse()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


def under_one_door(found: list[tuple[str, Any]], parent: str) -> Any:
    """The door's span, which all others hang under."""
    (door,) = (span for _, span in found if span.parent_span_id.hex() == parent)
    assert all(s.parent_span_id == door.span_id for _, s in found if s is not door)
    return door


def test_both_doors_make_one_trace_of_a_request(
    tiny: Path, open_house: Callable[..., Any], collector: Collector
) -> None:
    with open_house(tiny, num_blocks=64, otlp_endpoint=collector.endpoint) as house:
        body = {"prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        other = CLIENT.replace("0123", "4567", 1)
        answer = house.http.post("/v1/completions", json=body, headers={"traceparent": other})
        assert answer.status_code == 200
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=[1, 2, 3]), sampling=pb.SamplingParams(max_tokens=4)
        )
        metadata = [("traceparent", CLIENT)]
        house.stub.GenerateUnary(request, timeout=PATIENCE_S, metadata=metadata)
        for trace in (TRACE, other[3:35]):
            found = collector.wait_for(trace, 4)
            door = under_one_door(found, PARENT)
            names = sorted(span.name for _, span in found if span is not door)
            assert names == ["decode", "prefill", "queue"]
            said = {a.key: a.value for a in door.attributes}
            assert said["gen_ai.usage.input_tokens"].int_value == 3
            assert said["gen_ai.usage.output_tokens"].int_value == 4
            inner = sorted(found, key=lambda each: each[1].start_time_unix_nano)
            assert door.start_time_unix_nano <= inner[0][1].start_time_unix_nano


def test_a_collector_that_is_away_costs_no_answer(
    tiny: Path, open_house: Callable[..., Any]
) -> None:
    with open_house(tiny, num_blocks=64, otlp_endpoint="http://127.0.0.1:9") as house:
        assert len(house.tokens([1, 2, 3], 4)) == 4


def ask_for(url: str, trace: str, body: dict[str, Any]) -> None:
    asked = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json", "traceparent": f"00-{trace}-{PARENT}-01"},
    )
    with urllib.request.urlopen(asked, timeout=PATIENCE_S) as answer:
        assert answer.status == 200


@pytest.mark.long
@pytest.mark.timeout(180)
def test_spans_of_every_rank_hang_under_the_door(tiny: Path, collector: Collector) -> None:
    flags = ["--ep", "2", "--model", str(tiny), "--threads", "1", "--num-blocks", "64"]
    flags += ["--grpc-port", "none", "--http-port", "0", "--otlp-endpoint", collector.endpoint]
    with subprocess.Popen(
        [sys.executable, "-m", "moeserve.cli", "serve", *flags], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            found = re.fullmatch(r"ready: model=\S+ http=(http://\S+)\n", ready)
            assert found is not None, ready
            trace = "f" * 32
            body = {"prompt": [1, 2, 3], "max_tokens": 40, "n": 8, "ignore_eos": True}
            ask_for(found[1], trace, body)
            spans = collector.wait_for(trace, 1 + 3 * 8)
            under_one_door(spans, PARENT)
            assert len({who for who, _ in spans}) == 2, "both ranks tell"
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE_S)


def knows_members(url: str, *roles: str) -> None:
    """Waits until a gateway has one of each: that they are ready comes to it a moment later."""
    wanted = {f'moeserve_members{{role="{role}"}} 1' for role in roles}
    deadline = time.monotonic() + PATIENCE_S
    found: set[str] = set()
    while not wanted <= found:
        assert time.monotonic() < deadline, wanted
        with urllib.request.urlopen(f"{url}/metrics", timeout=PATIENCE_S) as page:
            found = {line.removesuffix(".0") for line in page.read().decode().splitlines()}


@pytest.mark.long
@pytest.mark.timeout(180)
def test_a_request_of_a_cluster_is_one_trace_from_gateway_to_decode(collector: Collector) -> None:
    flags = ["--prefill", "1", "--decode", "1", "--threads", "1", "--num-blocks", "64"]
    flags += ["--grpc-port", "none", "--http-port", "0", "--otlp-endpoint", collector.endpoint]
    with subprocess.Popen(
        [sys.executable, "-m", "moeserve.cli", "up", "demo", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "")
            ready = next(line for line in lines if line.startswith("ready: "))
            url = next(word for word in ready.split() if word.startswith("http="))[5:]
            knows_members(url, "prefill", "decode")
            trace = "a" * 32
            ask_for(url, trace, {"prompt": "Once upon a time " * 8, "max_tokens": 5})
            spans = collector.wait_for(trace, 1 + 3 + 1 + 3)
            door = under_one_door(spans, PARENT)
            by_process: dict[str, list[str]] = {}
            for who, span in sorted(spans, key=lambda each: each[1].start_time_unix_nano):
                by_process.setdefault(who, []).append(span.name)
            assert sorted(sorted(names) for names in by_process.values()) == [
                ["decode", "kv_transfer", "prefill", "queue"],
                ["decode", "prefill", "queue"],
                [door.name],
            ]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE_S)
