"""A thousand silent sockets at a server that may open a thousand files: both doors go on."""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import httpx
import pytest

from moeserve.pb import inference_pb2 as pb
from moeserve.pb.inference_pb2_grpc import InferenceStub

if TYPE_CHECKING:
    from conftest import Serving

PATIENCE_S = 90
FILES = 1024
SOCKETS = 1400
REQUEST = pb.GenerateRequest(
    token_ids=pb.TokenIds(ids=[72, 105]), sampling=pb.SamplingParams(max_tokens=4, temperature=0)
)
COMPLETION = {"prompt": [72, 105], "max_tokens": 4, "temperature": 0}

pytestmark = [pytest.mark.long, pytest.mark.timeout(180)]


@pytest.fixture
def many_files() -> Iterator[None]:
    """This process may open as many as the test has sockets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < SOCKETS + 200:
        pytest.fail(f"this test needs {SOCKETS + 200} descriptors, the hard limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, SOCKETS + 200), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def silent(stack: ExitStack, address: str) -> list[socket.socket]:
    """Sockets that never say anything, as many as can be had."""
    host, port = address.rsplit(":", 1)
    return [
        stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
        for _ in range(SOCKETS)
    ]


@pytest.mark.parametrize("door", ["http", "grpc"])
def test_silent_sockets_do_not_keep_clients_out(
    tiny: Path, tmp_path: Path, many_files: None, serving: Serving, door: str
) -> None:
    log = tmp_path / "stderr"
    with ExitStack() as stack:
        errors = stack.enter_context(log.open("w"))
        server = stack.enter_context(serving(tiny, errors=errors, files=FILES))
        process, grpc_address, url = server.process, server.grpc, server.http
        before = httpx.post(f"{url}/v1/completions", json=COMPLETION, timeout=30)
        assert before.status_code == 200
        text = before.json()["choices"][0]["text"]
        files = len(os.listdir(f"/proc/{process.pid}/fd"))
        held = silent(stack, grpc_address if door == "grpc" else url.removeprefix("http://"))
        for _ in range(3):
            assert httpx.get(f"{url}/health", timeout=10).status_code == 200
            answer = httpx.post(f"{url}/v1/completions", json=COMPLETION, timeout=30)
            assert answer.json()["choices"][0]["text"] == text
            with grpc.insecure_channel(grpc_address) as channel:
                made = InferenceStub(channel).GenerateUnary(
                    REQUEST, timeout=30, wait_for_ready=True
                )
            assert len(made.outputs[0].token_ids) == 4
        assert process.poll() is None
        assert len(os.listdir(f"/proc/{process.pid}/fd")) < FILES - 64
        for connection in held:
            connection.close()
        deadline = time.monotonic() + 30
        while len(os.listdir(f"/proc/{process.pid}/fd")) > files + 8:
            assert time.monotonic() < deadline, "descriptors are given back"
            time.sleep(0.1)
        process.terminate()
        assert process.wait(PATIENCE_S) == 0
    said = log.read_text()
    assert len(said) < 20_000, said[:2000]
    assert "Traceback" not in said
