"""Strangers at every port of every rank, from the moment it listens: the run starts, and serves.

They find ports as anybody on the host can, and stay for as long as the run does.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

PATIENCE_S = 100.0
LOOPBACK = "127.0.0.1"
IDLE = 200
FLAGS = [
    *("serve", "--ep", "2", "--model", "demo", "--grpc-port", "none", "--http-port", "0"),
    *("--num-blocks", "256", "--threads", "1", "--ep-backend", "tcp", "--doors", "all"),
]
BODY = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 24, "temperature": 0}

# What each kind of port is told: hellos of mesh and exchange, HTTP/2, notes of TCPStore, TLS.
_PLACE = struct.pack("<III16s", 2**32 - 1, 2**32 - 1, 2**32 - 1, b"n" * 16)
_STORE = b"\0" + struct.pack("<I", 0x3C85F7CE)
WORDS = [
    b"GET / HTTP/1.1\r\nHost: somewhere.else\r\n\r\n",
    b"moemesh1" + _PLACE,
    b"moetcp01" + _PLACE,
    b"\xff" * 65536,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff\xff\xff\x04\x00\x00\x00\x00\x00" * 100,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    *(_STORE + bytes([kind]) + struct.pack("<QQ", 2**63 - 1, 2**63 - 1) for kind in range(18)),
    b"\x16\x03\x01\x40\x00" + b"\x01" * 100,
]

pytestmark = [pytest.mark.long, pytest.mark.timeout(240)]


def listening_ports(pids: set[int]) -> dict[int, int]:
    """Of these processes on loopback: port to process."""
    inodes: dict[str, int] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if found := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(fd)):
                        inodes.setdefault(found[1], pid)
    tables = [Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table.splitlines()[1:]]
    return {
        int(row[1].split(":")[1], 16): inodes[row[9]]
        for row in rows
        if row[3] == "0A" and row[9] in inodes
    }


def family(pid: int) -> set[int]:
    """A process and its children."""
    found = {pid}
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found.update(map(int, children.read_text().split()))
    return found


class Strangers:
    """Threads that attack each new port of a run, and hold on to what they have opened."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.attacked: set[int] = set()
        self._streams: list[socket.socket] = []
        self._dripping: list[socket.socket] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=t) for t in (self._watch, self._drip)]

    def __enter__(self) -> Strangers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        for stream in (*self._streams, *self._dripping):
            stream.close()

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            for port in listening_ports(family(self._pid)).keys() - self.attacked:
                self.attacked.add(port)
                attacking = threading.Thread(target=self.attack, args=(port,))
                self._threads.append(attacking)
                attacking.start()

    def attack(self, port: int) -> None:
        for _ in range(IDLE):
            self._reach(port)
        for data in WORDS:
            self._reach(port, data)
            if (half := self._reach(port, data[:20])) is not None:
                with contextlib.suppress(OSError):
                    half.shutdown(socket.SHUT_WR)
        for _ in range(3):
            if (slow := self._reach(port)) is not None:
                self._dripping.append(slow)

    def _reach(self, port: int, data: bytes = b"") -> socket.socket | None:
        """None where it has closed meanwhile."""
        stream = socket.socket()
        stream.settimeout(0.2)
        try:
            stream.connect((LOOPBACK, port))
            stream.sendall(data)
        except OSError:
            stream.close()
            return None
        self._streams.append(stream)
        return stream

    def _drip(self) -> None:
        number = 0
        while not self._over.wait(0.03):
            number += 1
            for stream in list(self._dripping):
                with contextlib.suppress(OSError):
                    stream.send(WORDS[1][number % 36 :][:1])


@contextlib.contextmanager
def starting(said: Path) -> Iterator[subprocess.Popen[str]]:
    """A run of two ranks, and what it logs."""
    with said.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "moeserve.cli", *FLAGS],
            stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(PATIENCE_S)
        assert process.stdout is not None
        process.stdout.close()


def ask(port: int) -> str:
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(BODY), headers)
        answer = connection.getresponse()
        content = answer.read()
        assert answer.status == 200, content
        return str(json.loads(content)["choices"][0]["text"])


def test_a_run_starts_and_serves_beside_strangers_at_all_its_ports(tmp_path: Path) -> None:
    said = tmp_path / "said.txt"
    with starting(said) as process, Strangers(process.pid) as strangers:
        assert process.stdout is not None
        ready = process.stdout.readline()
        found = re.search(r"http=http://\S+:(\d+)", ready)
        assert found is not None, said.read_text()
        port = int(found[1])
        answers = [ask(port)]
        for other in set(listening_ports(family(process.pid))) - {port}:
            strangers.attack(other)
            answers.append(ask(port))
        # The notes, and of each rank its server and its door; mesh and exchange listen too
        # shortly to be found each time (``test_connecting`` is about them).
        assert len(strangers.attacked) >= 5
    assert len(set(answers)) == 1
    assert answers[0]
    assert "Traceback" not in said.read_text()
