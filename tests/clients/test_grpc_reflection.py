"""A gRPC client without protos, and health as grpc-health-probe asks for it."""

from __future__ import annotations

from typing import Any

import pytest

CLIENT = "grpc_reflection"
SERVING = 1

pytestmark = [pytest.mark.long, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def found(client: Any, server: Any) -> Any:
    return client.run("reflected.py", server.grpc, server.model, "Once upon a time")


def test_services_are_listed_and_described(found: Any) -> None:
    assert {
        "grpc.health.v1.Health",
        "inference.GRPCInferenceService",
        "moeserve.v1.Inference",
    } <= set(found["services"])


def test_both_inference_services_answer_alike(found: Any) -> None:
    assert found["own"]
    assert found["own"] == found["kserve"]


def test_health_is_known_for_the_server_and_each_service(found: Any) -> None:
    assert set(found["health"].values()) == {SERVING}
