"""A client that has no protos: it learns services by reflection, asks health as grpc-health-probe
does, and generates through both inference services. ``ADDRESS MODEL PROMPT``."""

from __future__ import annotations

import json
import sys
from typing import Any

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

PATIENCE_S = 60


def call(channel: Any, pool: DescriptorPool, service: str, method: str, fields: Any) -> Any:
    """A unary call of a method that is known only by its name."""
    found = pool.FindServiceByName(service).methods_by_name[method]
    request, answer = GetMessageClass(found.input_type), GetMessageClass(found.output_type)
    ask = channel.unary_unary(
        f"/{service}/{method}",
        request_serializer=request.SerializeToString,
        response_deserializer=answer.FromString,
    )
    return ask(request(**fields), timeout=PATIENCE_S)


def main(address: str, model: str, prompt: str) -> None:
    with grpc.insecure_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        pool = DescriptorPool(database)
        sampling = {"max_tokens": 8, "temperature": 0}
        own = call(
            channel,
            pool,
            "moeserve.v1.Inference",
            "GenerateUnary",
            {"text": prompt, "sampling": sampling},
        )
        text = {"name": "text_input", "datatype": "BYTES", "shape": [1]}
        no_echo = {"name": "exclude_input_in_output", "datatype": "BOOL", "shape": [1]}
        given = {"name": "sampling_parameters", "datatype": "BYTES", "shape": [1]}
        kserve = call(
            channel, pool, "inference.GRPCInferenceService", "ModelInfer",
            {
                "model_name": model,
                "inputs": [
                    text | {"contents": {"bytes_contents": [prompt.encode()]}},
                    no_echo | {"contents": {"bool_contents": [True]}},
                    given | {"contents": {"bytes_contents": [json.dumps(sampling).encode()]}},
                ],
            },
        )  # fmt: skip
        health = health_pb2_grpc.HealthStub(channel)
        statuses = {
            name: health.Check(health_pb2.HealthCheckRequest(service=name), timeout=PATIENCE_S)
            for name in ("", "moeserve.v1.Inference", "inference.GRPCInferenceService")
        }
        print(
            json.dumps(
                {
                    "services": sorted(database.get_services()),
                    "own": own.outputs[0].text,
                    "kserve": kserve.outputs[0].contents.bytes_contents[0].decode(),
                    "health": {name: found.status for name, found in statuses.items()},
                }
            )
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
