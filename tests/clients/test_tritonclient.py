"""Triton's gRPC client, by KServe's inference protocol."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

CLIENT = "tritonclient"
PROMPT = "Once upon a time"

pytestmark = [pytest.mark.long, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def found(client: Any, server: Any) -> Any:
    return client.run("tritonclient_grpc.py", server.grpc, server.model, PROMPT)


@pytest.fixture(scope="module")
def expected(server: Any) -> str:
    """What the HTTP door answers."""
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    answer = httpx.post(f"{server.http}/v1/completions", json=body, timeout=60)
    return str(answer.json()["choices"][0]["text"])


def test_infer_answers_as_the_http_door(found: Any, expected: str) -> None:
    assert found["whole"] == [expected]
    assert found["id"] == "one"


def test_three_inferences_of_one_stream(found: Any, expected: str) -> None:
    assert found["streamed"] == {"0": expected, "1": expected, "2": expected}


def test_errors_in_a_stream_and_as_a_status(found: Any) -> None:
    assert "temperature=9" in found["failed"]
    assert found["refused"].startswith("StatusCode.NOT_FOUND: model 'other'")


def test_readiness_metadata_config_and_index(found: Any, server: Any) -> None:
    assert (found["live"], found["ready"], found["unknown_ready"]) == (True, True, False)
    assert found["server"] == "moeserve"
    assert found["index"] == [server.model]
    assert found["inputs"][0] == "text_input"
    assert found["decoupled"] is True
