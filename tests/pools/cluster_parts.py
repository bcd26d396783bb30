"""The processes of a cluster as tests start, harm and ask them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from moeserve.pools.registry.etcd_server import etcd_command
from moeserve.process.child import Process, StartOptions, end_all, start
from moeserve.worker.up import wait_for_port

Begin = Callable[..., "subprocess.Popen[Any]"]

PATIENCE_S = 120.0
SETTINGS = {
    "MOESERVE_MODEL": "demo",
    "MOESERVE_THREADS": "1",
    "MOESERVE_NUM_BLOCKS": "512",
    "MOESERVE_GRPC_PORT": "0",
    "MOESERVE_HTTP_PORT": "0",
    "MOESERVE_MAX_MODEL_LEN": "512",
}
STORY = "Once upon a time, there was a little girl named Lily. One day, she found a small box"


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


@contextmanager
def started_etcd(folder: Path) -> Iterator[tuple[str, Process]]:
    """The setting ``registry`` for an etcd that may be harmed, and its process."""
    port = free_port()
    with (folder / "etcd.log").open("wb") as log:
        popen = start(
            etcd_command(folder / "etcd", port, free_port()),
            StartOptions(env=dict(os.environ), tied=True),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        with Process("etcd", popen, folder / "etcd.log") as process:
            wait_for_port(process, port)
            yield f"etcd://127.0.0.1:{port}", process


def start_here(command: list[str], env: dict[str, str], **options: Any) -> subprocess.Popen[Any]:
    """On this host; a test bed's hosts have a way of their own."""
    return start(command, StartOptions(env=env, tied=True), **options)


class Part:
    """A process of ours and what it prints."""

    def __init__(
        self, name: str, command: list[str], begin: Begin | None = None, /, **settings: str
    ) -> None:
        ours = {f"MOESERVE_{key.upper()}": value for key, value in settings.items()}
        environ = {k: v for k, v in os.environ.items() if not k.startswith("MOESERVE_")}
        popen = (begin or start_here)(
            [sys.executable, "-m", *command],
            environ | SETTINGS | ours,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.name = name
        self.lines: list[str] = []
        self.paused = False
        self.process = Process(name, popen)
        self.process.echo(self.lines.append)

    def said(self, beginning: str) -> str:
        """The line that begins so, without it; waits for it."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            for line in list(self.lines):
                if line.startswith(beginning):
                    return line.removeprefix(beginning).strip()
            assert self.process.alive, f"{self.name} ended: {''.join(self.lines)}"
            time.sleep(0.02)
        raise AssertionError(f"{self.name} has not said {beginning!r}: {''.join(self.lines)}")

    def send(self, number: signal.Signals) -> None:
        self.paused = number is signal.SIGSTOP
        self.process.send_signal(number)

    @property
    def url(self) -> str:
        """Of its HTTP door; a member says first that it is one."""
        until(lambda: any(" http=" in line for line in list(self.lines)), f"a door of {self.name}")
        line = next(line for line in list(self.lines) if " http=" in line)
        return next(w for w in line.split() if w.startswith("http="))[5:]

    @property
    def grpc(self) -> str:
        return next(w for w in self.said("ready: ").split() if w.startswith("grpc="))[5:]


@dataclass
class Parts:
    """A cluster, part by part."""

    parts: dict[str, Part] = field(default_factory=dict)
    gateways: list[str] = field(default_factory=list)
    registry: str = "embedded"

    def __getitem__(self, name: str) -> Part:
        return self.parts[name]

    def gateway(
        self,
        name: str,
        listen: str = "127.0.0.1:0",
        begin: Begin | None = None,
        /,
        **settings: str,
    ) -> None:
        command = ["moeserve.worker.cluster_command", "gateway"]
        where = {"listen": listen, "registry": self.registry}
        self.parts[name] = Part(name, command, begin, **where, **settings)
        address = self.parts[name].said("registry: ")
        if address not in self.gateways:
            self.gateways.append(address)

    def peer(self, name: str, role: str, begin: Begin | None = None, /, **settings: str) -> None:
        command = ["moeserve.worker.cluster_command", "peer"]
        where = {"registry": self.registry}
        if self.registry == "embedded":
            where["join"] = ",".join(self.gateways)
        self.parts[name] = Part(name, command, begin, role=role, name=name, **where, **settings)

    def ready(self) -> None:
        for part in self.parts.values():
            part.said("ready: ")

    def close(self) -> None:
        end_all([part.process for part in self.parts.values()], grace_s=10.0)


def body(number: int, **fields: Any) -> dict[str, Any]:
    """One of many requests: half of them sampled."""
    text = f"{STORY} {number}" if number % 3 else f"{number} + {number * 7} ="
    drawn = {"temperature": 0.8, "seed": number, "top_p": 0.95} if number % 2 else {}
    return {"prompt": text, "max_tokens": 24, "temperature": 0} | drawn | fields


def ask(url: str, fields: dict[str, Any]) -> list[Any]:
    answer = httpx.post(f"{url}/v1/completions", json=fields, timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    choices: list[Any] = answer.json()["choices"]
    return choices


def ask_all(urls: list[str], bodies: list[dict[str, Any]]) -> list[list[Any]]:
    with ThreadPoolExecutor(8) as pool:
        turns = [urls[i % len(urls)] for i in range(len(bodies))]
        return list(pool.map(ask, turns, bodies))


class Streams:
    """Long answers under way, each on a thread of its own; ``texts`` as far as they have come."""

    def __init__(self, url: str, bodies: list[dict[str, Any]]) -> None:
        self.texts = ["" for _ in bodies]
        self.errors: list[str] = []
        self._threads = [
            threading.Thread(target=self._read, args=(url, i, one)) for i, one in enumerate(bodies)
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, url: str, index: int, fields: dict[str, Any]) -> None:
        with httpx.stream(
            "POST", f"{url}/v1/completions", json=fields | {"stream": True}, timeout=PATIENCE_S
        ) as answer:
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                data = json.loads(line.removeprefix("data: "))
                if "error" in data:
                    self.errors.append(line)
                for choice in data.get("choices", ()):
                    self.texts[index] += choice["text"]

    def begun(self) -> None:
        until(lambda: all(self.texts), "all answers have begun")

    def join(self) -> list[str]:
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), "a stream did not end"
        assert not self.errors
        return self.texts


def until(holds: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end, f"not in time: {what}"
        time.sleep(0.01)


def long_bodies(count: int) -> list[dict[str, Any]]:
    return [body(i, max_tokens=300, ignore_eos=True) for i in range(count)]


def shown(gateway: Part, metric: str) -> float:
    """Of the page of metrics."""
    page = httpx.get(f"{gateway.url}/metrics", timeout=PATIENCE_S).text
    (line,) = (line for line in page.splitlines() if line.startswith(f"moeserve_{metric}"))
    return float(line.rpartition(" ")[2])


def members(gateway: Part, role: str, count: int) -> None:
    """Waits until the gateway knows so many."""
    metric = f'members{{role="{role}"}}'
    until(lambda: shown(gateway, metric) == count, f"{count} members that {role}")


def blocks_are_free(gateway: Part) -> None:
    """Waits until members say that nobody holds a block of theirs."""
    for role in ("prefill", "decode", "unified"):
        total, free = (f'members_kv_blocks{of}{{role="{role}"}}' for of in ("", "_free"))
        until(lambda t=total, f=free: shown(gateway, t) == shown(gateway, f), f"{role} holds none")
