"""A rank dies: both doors say so while the process still ends."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

if TYPE_CHECKING:
    from conftest import Serving

PATIENCE_S = 90

pytestmark = [pytest.mark.long, pytest.mark.timeout(180)]


class Watcher:
    """What gRPC's health says of a service, until the connection ends."""

    def __init__(self, channel: grpc.Channel, service: str) -> None:
        self.seen: list[int] = []
        request = health_pb2.HealthCheckRequest(service=service)
        self._stream = health_pb2_grpc.HealthStub(channel).Watch(request, timeout=PATIENCE_S)
        self.seen.append(next(self._stream).status)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        try:
            for answer in self._stream:
                self.seen.append(answer.status)
        except grpc.RpcError:
            pass

    def join(self) -> list[int]:
        self._thread.join(PATIENCE_S)
        return self.seen


def other_rank(pid: int) -> int:
    """The one process that was started to be a rank; others work on texts."""
    listed = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(word) for file in listed for word in file.read_text().split()]
    ranks = [c for c in children if b"moeserve.worker" in Path(f"/proc/{c}/cmdline").read_bytes()]
    assert len(ranks) == 1
    return ranks[0]


def test_both_doors_say_that_a_rank_is_gone(tiny: Path, serving: Serving) -> None:
    with (
        serving(tiny, "--ep", "2", num_blocks=64, errors=subprocess.DEVNULL) as server,
        grpc.insecure_channel(server.grpc) as channel,
        httpx.Client(base_url=server.http, timeout=10) as http,
    ):
        process = server.process
        watchers = [Watcher(channel, name) for name in ("", "moeserve.v1.Inference")]
        assert http.get("/ready").status_code == 200
        os.kill(other_rank(process.pid), signal.SIGKILL)
        statuses = []
        deadline = time.monotonic() + PATIENCE_S
        while process.poll() is None:
            assert time.monotonic() < deadline, "the server ends"
            try:
                statuses.append(http.get("/ready").status_code)
            except httpx.HTTPError:
                continue  # the door has closed
        assert 503 in statuses
        assert 200 not in statuses[statuses.index(503) :]
        health = health_pb2.HealthCheckResponse
        for watcher in watchers:
            assert watcher.join() == [health.SERVING, health.NOT_SERVING]
        assert process.wait(PATIENCE_S) == 1
