"""Inferences by Triton's gRPC client, whole and streamed: ``ADDRESS MODEL PROMPT``."""

from __future__ import annotations

import json
import queue
import sys
from typing import Any

import numpy as np
import tritonclient.grpc as triton

SAMPLING = {"temperature": "0", "max_tokens": "8"}
PATIENCE_S = 60


def inputs(prompt: str, *, stream: bool, sampling: dict[str, Any]) -> list[Any]:
    made = []
    for name, datatype, value in (
        ("text_input", "BYTES", np.array([prompt.encode()], dtype=np.object_)),
        ("stream", "BOOL", np.array([stream], dtype=bool)),
        ("sampling_parameters", "BYTES", np.array([json.dumps(sampling).encode()], np.object_)),
        ("exclude_input_in_output", "BOOL", np.array([True], dtype=bool)),
    ):
        tensor = triton.InferInput(name, list(value.shape), datatype)
        tensor.set_data_from_numpy(value)
        made.append(tensor)
    return made


def texts_of(result: Any) -> list[str]:
    return [text.decode() for text in result.as_numpy("text_output")]


def streamed(client: Any, model: str, prompt: str) -> tuple[dict[str, str], str]:
    """The text of each of three inferences in one stream, and the error of a fourth."""
    came: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(callback=lambda result, error: came.put((result, error)))
    texts = {"0": "", "1": "", "2": ""}
    for name in texts:
        asked = inputs(prompt, stream=True, sampling=SAMPLING)
        client.async_stream_infer(model, asked, request_id=name, enable_empty_final_response=True)
    wrong = inputs(prompt, stream=True, sampling={"temperature": 9})
    client.async_stream_infer(model, wrong, request_id="wrong")
    running, failed = set(texts), ""
    while running or not failed:
        result, error = came.get(timeout=PATIENCE_S)
        if error is not None:
            failed = str(error)
            continue
        response = result.get_response()
        texts[response.id] += texts_of(result)[0]
        if response.parameters["triton_final_response"].bool_param:
            running.remove(response.id)
    client.stop_stream()
    return texts, failed


def main(address: str, model: str, prompt: str) -> None:
    client = triton.InferenceServerClient(address)
    whole = client.infer(model, inputs(prompt, stream=False, sampling=SAMPLING), request_id="one")
    config = client.get_model_config(model, as_json=True)["config"]
    metadata = client.get_model_metadata(model, as_json=True)
    texts, failed = streamed(client, model, prompt)
    try:
        client.infer("other", inputs(prompt, stream=False, sampling=SAMPLING))
        refused = ""
    except triton.InferenceServerException as error:
        refused = f"{error.status()}: {error.message()}"
    found = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready() and client.is_model_ready(model),
        "unknown_ready": client.is_model_ready("other"),
        "server": client.get_server_metadata(as_json=True)["name"],
        "index": [m["name"] for m in client.get_model_repository_index(as_json=True)["models"]],
        "inputs": [tensor["name"] for tensor in metadata["inputs"]],
        "decoupled": config["model_transaction_policy"]["decoupled"],
        "id": whole.get_response().id,
        "whole": texts_of(whole),
        "streamed": texts,
        "failed": failed,
        "refused": refused,
    }
    client.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
