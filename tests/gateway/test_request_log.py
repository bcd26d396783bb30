"""Every request of a client is told of in one record, whatever became of it."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest

from moeserve.observe.logs import FIELDS
from moeserve.pb import inference_pb2 as pb

if TYPE_CHECKING:
    from conftest import House

DASHBOARD = Path(__file__).resolve().parents[2] / "launch/grafana/moeserve.json"
PROMPT = [72, 101, 108, 108, 111]
LONG = {"max_tokens": 400, "temperature": 0, "ignore_eos": True}


class Told:
    """The fields of what a logger said, as they come."""

    def __init__(self, caplog: pytest.LogCaptureFixture, logger: str) -> None:
        self._caplog = caplog
        self._logger = logger

    def by_id(self) -> dict[str, dict[str, Any]]:
        return {found["id"]: found for found in self.all()}

    def all(self) -> list[dict[str, Any]]:
        # ``records`` grows while other threads log.
        return [getattr(r, FIELDS) for r in list(self._caplog.records) if r.name == self._logger]


@pytest.fixture
def requests(caplog: pytest.LogCaptureFixture) -> Iterator[Told]:
    with caplog.at_level(logging.INFO, "moeserve.request"):
        yield Told(caplog, "moeserve.request")


@pytest.fixture
def calls(caplog: pytest.LogCaptureFixture) -> Iterator[Told]:
    with caplog.at_level(logging.INFO, "moeserve.access"):
        yield Told(caplog, "moeserve.access")


def test_an_answer_is_told_with_tokens_and_times(house: House, requests: Told) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 9, "temperature": 0}
    body |= {"request_id": "whole", "n": 2, "ignore_eos": True}
    assert house.http.post("/v1/completions", json=body).status_code == 200
    house.eventually(lambda: "whole" in requests.by_id(), "the record")
    found = requests.by_id()["whole"]
    durations = {name: found.pop(name) for name in ("queue_s", "ttft_s", "tpot_s", "total_s")}
    assert found == {
        "id": "whole",
        "model": "tiny",
        "status": "OK",
        "n": 2,
        "prompt_tokens": 5,
        "cached_tokens": 0,
        "output_tokens": 18,
        "finish": "length",
    }
    assert 0 <= durations["queue_s"] <= durations["ttft_s"] <= durations["total_s"]
    assert durations["tpot_s"] > 0


def test_grpc_requests_are_told_alike(house: House, requests: Told) -> None:
    request = pb.GenerateRequest(
        request_id="by-grpc",
        token_ids=pb.TokenIds(ids=PROMPT),
        sampling=pb.SamplingParams(max_tokens=4, temperature=0, ignore_eos=True),
    )
    list(house.stub.Generate(request, timeout=60))
    house.eventually(lambda: "by-grpc" in requests.by_id(), "the record")
    found = requests.by_id()["by-grpc"]
    assert (found["status"], found["output_tokens"], found["finish"]) == ("OK", 4, "length")


def test_who_leaves_early_is_told_as_cancelled(house: House, requests: Told) -> None:
    body = {"prompt": PROMPT, "request_id": "left", "stream": True, **LONG}
    with house.http.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    house.eventually(lambda: "left" in requests.by_id(), "the record")
    found = requests.by_id()["left"]
    assert found["status"] == "CANCELLED"
    assert 0 < found["output_tokens"] < 400


def test_aborted_and_late_ones_are_told_by_their_codes(house: House, requests: Told) -> None:
    request = pb.GenerateRequest(
        request_id="aborted",
        token_ids=pb.TokenIds(ids=PROMPT),
        sampling=pb.SamplingParams(**LONG),
    )
    stream = house.stub.Generate(request, timeout=60)
    next(iter(stream))
    house.stub.Abort(pb.AbortRequest(request_id="aborted"), timeout=60)
    with pytest.raises(grpc.RpcError):
        list(stream)
    house.eventually(lambda: "aborted" in requests.by_id(), "the record")
    found = requests.by_id()["aborted"]
    assert (found["status"], found["error"]) == ("CANCELLED", "request aborted was aborted")


def test_what_is_refused_is_told_with_its_reason(house: House, requests: Told, calls: Told) -> None:
    body = {"prompt": PROMPT, "request_id": "wrong", "temperature": 9}
    assert house.http.post("/v1/completions", json=body).status_code == 400
    found = requests.by_id()["wrong"]
    assert found["status"] == "INVALID_ARGUMENT"
    assert "temperature=9" in found["error"]
    assert "output_tokens" not in found
    assert not calls.all(), "a request is told once"


def test_calls_that_are_no_requests_are_told_where_they_fail(house: House, calls: Told) -> None:
    assert house.http.get("/v1/models").status_code == 200
    assert house.http.get("/nowhere").status_code == 404
    kind = {"content-type": "application/json"}
    assert house.http.post("/v1/completions", content=b"{", headers=kind).status_code == 400
    house.eventually(lambda: len(calls.all()) == 2, "the lines")
    told = [(found["method"], found["path"], found["status"]) for found in calls.all()]
    assert told == [("GET", "/nowhere", 404), ("POST", "/v1/completions", 400)]
    assert "JSON" in calls.all()[1]["error"]


def test_grpc_calls_that_the_service_never_sees_are_told_too(
    tiny_checkpoint: Callable[[str], Path], open_house: Callable[..., House], calls: Told
) -> None:
    method = "/moeserve.v1.Inference/GenerateUnary"
    with open_house(tiny_checkpoint("mixtral"), num_blocks=64, api_key="a key of its own") as house:
        call: Any = house.channel.unary_unary(method)
        with pytest.raises(grpc.RpcError, match="send the api key"):
            call(b"", timeout=60)
        house.eventually(lambda: len(calls.all()) == 1, "the line")
    (found,) = calls.all()
    assert (found["method"], found["status"]) == (method, "UNAUTHENTICATED")
    assert found["error"].startswith("send the api key")


def test_the_dashboard_finds_its_metrics_on_the_page_of_a_server(house: House) -> None:
    body = {"prompt": PROMPT, "max_tokens": 2, "temperature": 0}
    assert house.http.post("/v1/completions", json=body).status_code == 200
    samples = {re.split(r"[{ ]", line)[0] for line in house.http.get("/metrics").text.splitlines()}
    asked = set(re.findall(r"\b(?:moeserve_|process_)\w+", DASHBOARD.read_text()))
    of_ranks = {name for name in asked if "_rank_" in name or "microbatches" in name}
    assert len(of_ranks) == 6
    assert asked - of_ranks <= samples


def test_client_requests_fill_their_distributions(house: House) -> None:
    def read() -> dict[str, float]:
        lines = house.http.get("/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line.startswith("vllm:request_params"))
        return {name.partition("{")[0]: float(value) for name, value in pairs if "le=" not in name}

    before = read()
    body = {"prompt": PROMPT, "n": 3, "max_tokens": 2, "temperature": 0}
    assert house.http.post("/v1/completions", json=body).status_code == 200
    after = read()
    changed = {name: after[name] - before[name] for name in before}
    assert changed == {
        "vllm:request_params_n_sum": 3,
        "vllm:request_params_n_count": 1,
        "vllm:request_params_max_tokens_sum": 2,
        "vllm:request_params_max_tokens_count": 1,
    }


@pytest.mark.long
def test_a_server_logs_json_lines_from_loading_to_requests(tiny: Path) -> None:
    """Standard error holds nothing else, so that a collector can read all of it."""
    command = [sys.executable, "-m", "moeserve.cli", "serve", "--model", str(tiny)]
    command += ["--grpc-port", "none", "--http-port", "0", "--threads", "1", "--num-blocks", "64"]
    process = subprocess.Popen(
        [*command, "--log-format", "json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    heard: list[str] = []
    reader = threading.Thread(target=lambda: heard.extend(process.stderr or ()))
    reader.start()
    try:
        url = process.stdout.readline().split("http=")[1].strip()
        body = {"prompt": PROMPT, "max_tokens": 3, "request_id": "one", "temperature": 0}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200
    finally:
        process.terminate()
        process.wait(60)
        reader.join(60)
        process.stdout.close()
        process.stderr.close()
    lines = [json.loads(line) for line in heard]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    loaded = [line["message"] for line in lines if line["logger"] == "moeserve.loading"]
    assert loaded and loaded[-1].endswith("(100 %)")
    told = [line for line in lines if line["message"] == "request"]
    assert [line["id"] for line in told] == ["one"]
