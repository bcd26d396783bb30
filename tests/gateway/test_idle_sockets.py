"""A thousand silent sockets at a server that may open a thousand files: both doors go on."""

from __future__ import annotations

import os
import re
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import httpx
import pytest

from moeserve.pb import inference_pb2 as pb
from moeserve.pb.inference_pb2_grpc import InferenceStub

PATIENCE_S = 90
SERVE = [sys.executable, "-m", "moeserve.cli", "serve", "--grpc-port", "0", "--http-port", "0"]
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


@contextmanager
def few_files(model: Path, log: Path) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A server of ``FILES`` descriptors, and the addresses of its doors."""
    with log.open("w") as err:
        process = subprocess.Popen(
            [
                *("bash", "-c", f'ulimit -n {FILES}; exec "$@"', "-", *SERVE),
                *("--model", str(model), "--threads", "1", "--num-blocks", "512"),
            ],
            stdout=subprocess.PIPE,
            stderr=err,
            text=True,
        )
    try:
        assert process.stdout is not None
        ready = process.stdout.readline()
        found = re.fullmatch(r"ready: model=\S+ grpc=(\S+) http=http://(\S+)\n", ready)
        assert found is not None, ready
        yield process, found[1], found[2]
        process.terminate()
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait(PATIENCE_S)
        assert process.stdout is not None
        process.stdout.close()


def silent(stack: ExitStack, address: str) -> list[socket.socket]:
    """Sockets that never say anything, as many as can be had."""
    host, port = address.rsplit(":", 1)
    return [
        stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
        for _ in range(SOCKETS)
    ]


@pytest.mark.parametrize("door", ["http", "grpc"])
def test_silent_sockets_do_not_keep_clients_out(
    tiny: Path, tmp_path: Path, many_files: None, door: str
) -> None:
    log = tmp_path / "stderr"
    with few_files(tiny, log) as (process, grpc_address, http_address), ExitStack() as stack:
        url = f"http://{http_address}"
        before = httpx.post(f"{url}/v1/completions", json=COMPLETION, timeout=30)
        assert before.status_code == 200
        text = before.json()["choices"][0]["text"]
        files = len(os.listdir(f"/proc/{process.pid}/fd"))
        held = silent(stack, grpc_address if door == "grpc" else http_address)
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
    said = log.read_text()
    assert len(said) < 20_000, said[:2000]
    assert "Traceback" not in said
