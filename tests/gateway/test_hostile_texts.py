"""One after the other, strangers' texts against ``moeserve serve --ep 2``: each is refused, streams
beside them get their tokens, no rank is lost, and afterwards all is as before."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.long, pytest.mark.timeout(200)]

PATIENCE_S = 90.0
SERVE = [
    *(sys.executable, "-m", "moeserve.cli", "serve", "--ep", "2", "--model", "demo"),
    *("--grpc-port", "none", "--http-port", "0", "--threads", "1", "--num-blocks", "256"),
    *("--ep-deadline", "2", "--drain-timeout-s", "60"),
]
STORY = {"prompt": "Once upon a time", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
ATTACKS: list[tuple[str, int, dict[str, Any] | bytes]] = [
    ("/v1/completions", 400, {"prompt": "a" * (4 << 20)}),
    ("/tokenize", 400, {"prompt": "a" * (1 << 20)}),
    ("/v1/completions", 400, b'{"metadata": [' + b"[]," * 500_000 + b"[]]}"),
    ("/v1/completions", 400, {"prompt": [1] * 1_500_000}),
    ("/v1/chat/completions", 400, {"messages": [{"role": "user", "content": "a " * 200_000}]}),
]


@dataclass
class Serving:
    process: subprocess.Popen[str]
    port: int

    def ask(self, path: str, body: dict[str, Any] | bytes | None = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            kind = {"content-type": "application/json"}
            connection.request("GET" if body is None else "POST", path, content, kind)
            answer = connection.getresponse()
            said = answer.read()
            json_said = answer.headers.get_content_type() == "application/json"
            return answer.status, json.loads(said) if json_said else said.decode()
        finally:
            connection.close()

    def story(self) -> str:
        status, said = self.ask("/v1/completions", STORY)
        assert status == 200, said
        return str(said["choices"][0]["text"])

    def resident_mib(self) -> float:
        found = re.search(r"VmRSS:\s+(\d+)", self._proc("status").read_text())
        assert found is not None
        return int(found[1]) / 1024

    def descriptors(self) -> int:
        return len(list(self._proc("fd").iterdir()))

    def used_blocks(self) -> float:
        """Of all blocks; those kept for equal beginnings are free."""
        page = self.ask("/metrics")[1]
        found = re.search(r"^moeserve\S*kv_cache_usage_ratio\S* (\S+)$", page, re.MULTILINE)
        assert found is not None, page
        return float(found[1])

    def _proc(self, name: str) -> Path:
        return Path(f"/proc/{self.process.pid}/{name}")


@contextmanager
def serving() -> Iterator[Serving]:
    process = subprocess.Popen(SERVE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        found = re.search(r"http=http://\S+:(\d+)", process.stdout.readline())
        assert found is not None
        yield Serving(process, int(found[1]))
        process.terminate()
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait(PATIENCE_S)
        assert process.stdout is not None
        process.stdout.close()


def test_strangers_texts_stop_nobody() -> None:
    with serving() as server:
        story = server.story()
        # What the first of each kind takes stays: workers are started, libraries warmed.
        assert server.ask("/tokenize", {"prompt": "some words " * 4000})[0] == 200
        before = (server.resident_mib(), server.descriptors(), server.used_blocks())
        stories: list[str] = []
        done = threading.Event()

        def tell() -> None:
            while not done.is_set():
                stories.append(server.story())

        telling = threading.Thread(target=tell)
        telling.start()
        try:
            for path, status, body in ATTACKS:
                told = len(stories)
                found, said = server.ask(path, body)
                assert found == status, said
                assert set(said) == {"error"}
                assert server.ask("/health")[0] == 200
                give_up = time.monotonic() + PATIENCE_S
                while len(stories) < told + 1 and time.monotonic() < give_up:
                    time.sleep(0.01)
                assert len(stories) >= told + 1, "streams go on"
        finally:
            done.set()
            telling.join(PATIENCE_S)
        assert set(stories) == {story}
        assert server.story() == story
        resident_mib, descriptors, used_blocks = before
        assert server.resident_mib() < resident_mib + 150
        assert server.descriptors() <= descriptors + 4
        assert server.used_blocks() == used_blocks == 0
