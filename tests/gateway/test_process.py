"""``moeserve serve`` as a process of its own: signals, exit statuses, nothing left behind."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from moeserve.config.options import DoorOptions
from moeserve.pb import inference_pb2 as pb
from moeserve.pb.inference_pb2_grpc import InferenceStub

if TYPE_CHECKING:
    from conftest import Serving

PATIENCE_S = 90
SERVE = [sys.executable, "-m", "moeserve.cli", "serve", "--grpc-port", "0", "--http-port", "0"]
REQUEST = pb.GenerateRequest(
    token_ids=pb.TokenIds(ids=[72, 105]),
    sampling=pb.SamplingParams(max_tokens=480, temperature=0, ignore_eos=True),
    n=16,
)

pytestmark = [pytest.mark.long, pytest.mark.timeout(180)]


def nobody_left(group: int) -> bool:
    """Whether the process group, which held the server and all it started, is empty."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def test_sigterm_lets_a_running_stream_finish_and_exits_0(tiny: Path, serving: Serving) -> None:
    flags = ["--drain-timeout-s", "60"]
    with serving(tiny, *flags) as server, grpc.insecure_channel(server.grpc) as channel:
        process = server.process
        stream = iter(InferenceStub(channel).Generate(REQUEST, timeout=PATIENCE_S))
        made = len(next(stream).token_ids)
        process.send_signal(signal.SIGTERM)
        made += sum(len(chunk.token_ids) for chunk in stream)
        assert made == 16 * 480
        assert process.wait(PATIENCE_S) == 0
        assert nobody_left(process.pid)


@pytest.mark.parametrize(
    ("drain_s", "signals"),
    [("0.1", [signal.SIGINT]), ("3600", [signal.SIGTERM, signal.SIGTERM])],
    ids=["too long", "hurried"],
)
def test_streams_that_may_not_finish_end_with_unavailable(
    tiny: Path, serving: Serving, drain_s: str, signals: list[signal.Signals]
) -> None:
    flags = ["--drain-timeout-s", drain_s]
    with serving(tiny, *flags) as server, grpc.insecure_channel(server.grpc) as channel:
        process = server.process
        stream = iter(InferenceStub(channel).Generate(REQUEST, timeout=PATIENCE_S))
        next(stream)
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        process.send_signal(signals[0])
        # Two signals of a kind at once are one: the second waits until the first has worked.
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        for number in signals[1:]:
            process.send_signal(number)
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert process.wait(PATIENCE_S) == 0
        assert nobody_left(process.pid)


def test_start_up_failures_are_one_line_and_a_status(tiny: Path, tmp_path: Path) -> None:
    truncated = tmp_path / "truncated"
    shutil.copytree(tiny, truncated)
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    malformed = tmp_path / "malformed"
    shutil.copytree(tiny, malformed)
    (malformed / "config.json").write_text("[]")
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = str(holder.getsockname()[1])
        cases: list[tuple[list[str], int, str]] = [
            (["--model", str(truncated)], 1, "model.safetensors"),
            (["--model", str(malformed)], 1, "config.json"),
            (["--model", str(tmp_path / "nowhere")], 1, "nowhere"),
            (["--model", str(tiny), "--http-port", port], 2, f"http_port={port}"),
            (["--model", str(tiny), "--host", "0.0.0.0"], 2, "set api_key_file"),
        ]
        started = [
            subprocess.Popen(
                [*SERVE, *flags],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            for flags, _, _ in cases
        ]
        said = [process.communicate(timeout=PATIENCE_S) for process in started]
    for process, (out, err), (_, status, says) in zip(started, said, cases, strict=True):
        assert process.returncode == status, err
        assert out == ""
        assert err.splitlines()[-1].startswith("moeserve: ")
        assert says in err.splitlines()[-1]
        assert "Traceback" not in err
        assert nobody_left(process.pid)


def children_of(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in listed for child in file.read_text().split()]


def test_ranks_that_serve_starts_get_only_the_settings_that_they_use(
    tiny: Path, serving: Serving
) -> None:
    """The key of clients above all: neither their environment nor their command line has it."""
    key = "key of the clients"
    flags = ("--ep", "2", "--api-key", key, "--served-model-name", "tiny", "--max-queue", "77")
    with serving(tiny, *flags) as server:
        process = server.process
        (child,) = children_of(process.pid)
        environ = Path(f"/proc/{child}/environ").read_text().split("\0")
        command = Path(f"/proc/{child}/cmdline").read_text()
        settings = dict(
            line.removeprefix("MOESERVE_").split("=", 1)
            for line in environ
            if line.startswith("MOESERVE_")
        )
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
        assert nobody_left(process.pid)
    assert key not in command
    assert not any(key in line for line in environ)
    assert not {name.upper() for name in DoorOptions.model_fields} & settings.keys()
    assert settings["MAX_QUEUE"] == "77"  # each rank has a queue
    assert settings["SERVED_MODEL_NAME"] == "tiny"
    assert (settings["EP"], settings["MODEL"], settings["NUM_BLOCKS"]) == ("2", str(tiny), "512")
    assert len(settings["EP_SECRET"]) >= 16
