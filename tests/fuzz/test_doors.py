"""Whatever is sent to a door, it is answered, or refused in the form that clients expect: no
request ends with an internal error, and afterwards the door serves, and no block is held."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.config.options import ServeConfig
from moeserve.gateway.server import OneProcess, Server
from moeserve.pb import grpc_predict_v2_pb2 as v2
from moeserve.pb import inference_pb2 as pb

EXAMPLES = 60
PATIENCE_S = 60.0
# How an operator would see a fault of ours.
OURS = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS}

pytestmark = [pytest.mark.long, pytest.mark.timeout(200)]


class Doors:
    """A server of a tiny model in this process, on a thread and a loop of its own."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._live()))

    def __enter__(self) -> Doors:
        self._thread.start()
        assert self._ready.wait(PATIENCE_S)
        self.http = httpx.Client(
            base_url=f"http://127.0.0.1:{self.server.http_port}", timeout=PATIENCE_S
        )
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.server.grpc_port}")
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self.channel.close()
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()

    async def _live(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        async with Server(self._config, OneProcess()) as self.server:
            await self.server.load()
            self._ready.set()
            await self._end.wait()

    def all_free(self) -> bool:
        assert self.server.loaded is not None
        load = self.server.loaded.engine.load()
        return load.running == load.waiting == 0 and load.free_blocks == load.total_blocks


@pytest.fixture(scope="module")
def doors(tiny_checkpoint: Callable[[str], Path]) -> Iterator[Doors]:
    model = str(tiny_checkpoint("mixtral"))
    settings = {"model": model, "grpc_port": 0, "http_port": 0, "threads": 1, "num_blocks": 256}
    config = ServeConfig.model_validate(settings | {"served_model_name": "tiny"})
    with Doors(config) as running:
        yield running
        assert running.http.get("/health").status_code == 200
        deadline = time.monotonic() + PATIENCE_S
        while not running.all_free():
            assert time.monotonic() < deadline, "blocks are held"
            time.sleep(0.01)


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SAMPLING = {
    "max_tokens": 2, "temperature": 0, "top_p": 0.5, "top_k": 3, "n": 1, "stop": ["a"], "seed": 1,
    "logit_bias": {"1": 2}, "stream": False, "stream_options": {"include_usage": True},
    "user": "u", "presence_penalty": 0, "metadata": {},
}  # fmt: skip
MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": SAMPLING | {"prompt": "hi", "echo": False, "logprobs": 2, "suffix": None},
    "/v1/chat/completions": SAMPLING
    | {"messages": MESSAGES, "tools": [TOOL], "tool_choice": "none", "response_format": None},
    "/v1/responses": {"input": MESSAGES, "max_output_tokens": 2, "tools": [], "text": {}},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 2, "system": "s", "tools": []},
    "/tokenize": {"prompt": "hi", "add_special_tokens": True},
    "/detokenize": {"tokens": [1, 2]},
}


def answered(answer: httpx.Response) -> None:
    """Well, or with an error that says something; none of ours, nor a trace."""
    assert answer.status_code < 500, answer.text
    if answer.status_code != 200:
        assert answer.json()["error"]["message"], answer.text
    assert "Traceback" not in answer.text
    assert "internal error" not in answer.text
    assert len(answer.content) < 20_000


@pytest.mark.parametrize("path", BODIES)
@given(data=st.data())
def test_bodies_with_other_values(
    path: str, data: st.DataObject, values: st.SearchStrategy[Any], edited: Any, doors: Doors
) -> None:
    body = edited({"model": "tiny"} | BODIES[path], data, values)
    if isinstance(body, dict) and data.draw(st.booleans()):
        body = edited(body, data, values)
    content = json.dumps(body)  # with NaN, Infinity and lone surrogates, as it comes
    headers = {"content-type": "application/json"}
    answered(doors.http.post(path, content=content, headers=headers))


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages"])
@given(data=st.data())
def test_bodies_with_other_bytes(
    path: str, data: st.DataObject, spoiled: Any, doors: Doors
) -> None:
    content = spoiled(json.dumps({"model": "tiny"} | BODIES[path]).encode(), data)
    kind = data.draw(st.sampled_from(["application/json", "text/plain", ""]))
    answered(doors.http.post(path, content=content, headers={"content-type": kind}))


LINES = [
    b"GET /health HTTP/1.1\r\n", b"POST /v1/completions HTTP/1.1\r\n", b"Host: 127.0.0.1\r\n",
    b"content-length: 5\r\n", b"content-length: -1\r\n", b"transfer-encoding: chunked\r\n",
    b"expect: 100-continue\r\n", b"\r\n", b"5\r\nhello\r\n", b"ffffffffffffffffff\r\n",
    b"0\r\n\r\n", b"upgrade: h2c\r\nconnection: upgrade\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00", b"content-type: application/json\r\n", b'{"model": 1}', b"X" * 9000,
]  # fmt: skip


@given(st.lists(st.sampled_from(LINES) | st.binary(max_size=20), max_size=8).map(b"".join))
def test_bytes_that_may_be_no_http(doors: Doors, content: bytes) -> None:
    for port in (doors.server.http_port, doors.server.grpc_port):
        assert port is not None
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as stream:
            stream.sendall(content)
            stream.shutdown(socket.SHUT_WR)
            stream.settimeout(0.02)
            stream.recv(1 << 16)
    assert doors.http.get("/health").status_code == 200


def _generate() -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model="tiny",
        token_ids=pb.TokenIds(ids=[72, 105]),
        sampling=pb.SamplingParams(
            max_tokens=2, temperature=0.5, top_p=0.5, repetition_penalty=1.5, seed=3, stop=["a"]
        ),
    )


def _infer() -> v2.ModelInferRequest:
    request = v2.ModelInferRequest(model_name="tiny", id="a")
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    request.inputs[0].contents.bytes_contents.append(b"hi")
    request.parameters["max_tokens"].int64_param = 2
    return request


CALLS: dict[str, Any] = {
    "moeserve.v1.Inference/GenerateUnary": _generate(),
    "moeserve.v1.Inference/Tokenize": pb.TokenizeRequest(text="hi"),
    "moeserve.v1.Inference/Detokenize": pb.DetokenizeRequest(),
    "moeserve.v1.Inference/Abort": pb.AbortRequest(),
    "inference.GRPCInferenceService/ModelInfer": _infer(),
}


@pytest.mark.parametrize("name", CALLS)
@given(data=st.data())
def test_calls_with_other_bytes(name: str, data: st.DataObject, spoiled: Any, doors: Doors) -> None:
    content = spoiled(CALLS[name].SerializeToString(), data)
    call: Any = doors.channel.unary_unary(f"/{name}")
    try:
        call(content, timeout=PATIENCE_S)
    except grpc.RpcError as error:
        failed: Any = error
        said = failed.code(), failed.details()
    else:
        said = grpc.StatusCode.OK, ""
    assert said[0] not in OURS, said
    assert len(said[1]) < 2000


NUMBERS = st.floats() | st.sampled_from([0.0, 5e-324, -5e-324, 1e308, float("nan")])


@given(data=st.data())
def test_sampling_of_any_numbers(data: st.DataObject, doors: Doors) -> None:
    request = _generate()
    for field in pb.SamplingParams.DESCRIPTOR.fields:
        if field.cpp_type == field.CPPTYPE_DOUBLE and data.draw(st.booleans()):
            setattr(request.sampling, field.name, data.draw(NUMBERS))
    call: Any = doors.channel.unary_unary("/moeserve.v1.Inference/GenerateUnary")
    try:
        content = call(request.SerializeToString(), timeout=PATIENCE_S)
    except grpc.RpcError as error:
        failed: Any = error
        said = failed.code()
    else:
        said = grpc.StatusCode.OK
        assert pb.GenerateResponse.FromString(content).outputs[0].token_ids
    assert said in (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT)
