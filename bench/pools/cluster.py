"""A cluster of peers on this host, each a process that can be killed, stopped and started anew.

Benches and the chaos run start it themselves, instead of with ``moeserve up``, since they do to
single members what an operator never would. ``cores`` binds a member's process, so that pools do
not take one another's. On a test bed each part has a host of its own, from ``FIRST_HOST`` on;
whoever asks them is on another, in which ``started`` is called (``Bed.inside``, before gRPC has any
thread).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moeserve.testbed.network import Bed

# What parts on several hosts have in common.
SECRET = "known to all hosts of this cluster"
API_KEY = "of all clients of this cluster"
ASKING = (("authorization", f"Bearer {API_KEY}"),)
FIRST_HOST = 1
READY_S = 120.0
LEAVE_S = 30.0


def free_port() -> int:
    """One that nobody has now, and that is not given to outgoing connections either."""
    with contextlib.suppress(OSError):
        low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
        for _ in range(200):
            port = 10_000 + int.from_bytes(os.urandom(2), "little") % max(1, low - 10_000)
            with socket.socket() as tried, contextlib.suppress(OSError):
                tried.bind(("127.0.0.1", port))
                return port
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        return int(tried.getsockname()[1])


@dataclass(slots=True)
class Process:
    """One member or gateway: how it is started, and its life at the moment."""

    name: str
    words: tuple[str, ...]
    log: Path
    cores: str = ""
    bed: Bed | None = None
    host: int = 0
    running: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        prefix = ("taskset", "-c", self.cores) if self.cores else ()
        command = (*prefix, sys.executable, "-m", "moeserve.cli", *self.words)
        with self.log.open("ab") as out:
            if self.bed is not None:
                secrets = {"MOESERVE_CLUSTER_SECRET": SECRET}
                if self.words[0] == "gateway":
                    secrets["MOESERVE_API_KEY"] = API_KEY
                self.running = self.bed.start(
                    self.host, command, secrets, stdout=out, stderr=subprocess.STDOUT
                )
                return
            self.running = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def pid(self) -> int:
        assert self.running is not None, self.name
        return self.running.pid

    @property
    def alive(self) -> bool:
        return self.running is not None and self.running.poll() is None

    def signal(self, number: int) -> None:
        """To it and whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        assert self.running is not None
        self.running.wait(LEAVE_S)

    def ask_to_leave(self) -> None:
        assert self.running is not None
        self.signal(signal.SIGCONT)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)

    def leave(self) -> int:
        """After it was asked to; its exit status."""
        assert self.running is not None
        try:
            return self.running.wait(LEAVE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return -signal.SIGKILL

    def measures(self) -> dict[str, int]:
        """Resident kilobytes and descriptors, with all that it started."""
        rss = descriptors = 0
        for pid in _family(self.pid):
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{pid}/status").read_text()
                rss += int(status.partition("VmRSS:")[2].split()[0])
                descriptors += len(os.listdir(f"/proc/{pid}/fd"))
        return {"rss_kb": rss, "descriptors": descriptors}


@dataclass(slots=True)
class Cluster:
    """``gateways`` and ``peers`` by name; their logs lie in ``folder``."""

    folder: Path
    gateways: dict[str, Process] = field(default_factory=dict)
    peers: dict[str, Process] = field(default_factory=dict)
    http: dict[str, int] = field(default_factory=dict)
    grpc: dict[str, int] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)  # of gateways: where their doors are

    @property
    def all(self) -> dict[str, Process]:
        return {**self.gateways, **self.peers}

    def door(self, gateway: str, ports: dict[str, int]) -> str:
        return f"{self.places.get(gateway, '127.0.0.1')}:{ports[gateway]}"

    def ready(self, gateway: str, timeout_s: float = READY_S) -> None:
        """Until it would serve a request; AssertionError with the end of its log if it does not."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                at = f"http://{self.door(gateway, self.http)}/ready"
                with urllib.request.urlopen(at, timeout=2) as answer:
                    if answer.status == 200:
                        return
            dead = [name for name, p in self.all.items() if not p.alive]
            assert not dead, f"{dead}: {self._tail(dead[0])}"
            time.sleep(0.1)
        raise AssertionError(f"{gateway} is not ready: {self._tail(gateway)}")

    def joined(self, gateway: str, roles: Sequence[str], timeout_s: float = READY_S) -> None:
        """Until it knows all members."""
        deadline = time.monotonic() + timeout_s
        wanted = {f'moeserve_members{{role="{role}"}} {roles.count(role)}' for role in roles}
        while wanted - {line.removesuffix(".0") for line in self.metrics(gateway).splitlines()}:
            assert time.monotonic() < deadline, f"not all joined {gateway}: {self._tail(gateway)}"
            time.sleep(0.1)

    def leave(self) -> None:
        """Gateways first, for what they have needs members; says who did not leave as asked."""
        statuses = {}
        for group in (self.gateways, self.peers):
            alive = {name: process for name, process in group.items() if process.alive}
            for process in alive.values():
                process.ask_to_leave()
            statuses |= {name: process.leave() for name, process in alive.items()}
        if wrong := {name: status for name, status in statuses.items() if status}:
            print(f"did not leave as asked: {wrong}", file=sys.stderr)

    def metrics(self, gateway: str) -> str:
        at = f"http://{self.door(gateway, self.http)}/metrics"
        asked = urllib.request.Request(at, headers=dict(ASKING))
        with urllib.request.urlopen(asked, timeout=10) as answer:
            return str(answer.read().decode())

    def _tail(self, name: str) -> str:
        return self.all[name].log.read_text(errors="replace")[-3000:]


@contextlib.contextmanager
def started(
    roles: Sequence[str],
    *,
    gateways: int = 1,
    model: str = "demo",
    cores: Sequence[str] = (),
    gateway_cores: str = "",
    options: Sequence[str] = (),
    bed: Bed | None = None,
) -> Iterator[Cluster]:
    """A cluster with a peer for each of ``roles``, e.g. ``("prefill", "decode")``; ready.

    ``options`` go to every peer that computes. At the end all leave, whatever happened.
    """
    with tempfile.TemporaryDirectory(prefix="moeserve-cluster-") as name:
        cluster = Cluster(Path(name))
        join = ",".join(
            _add_gateway(cluster, i, model, gateway_cores, bed) for i in range(gateways)
        )
        for i, role in enumerate(roles):
            words = ("peer", "--role", role, "--join", join, "--name", f"{role}-{i}")
            if role != "cache":
                words = (*words, "--model", model, *options)
            bound = cores[i] if i < len(cores) else ""
            _add_peer(cluster, f"{role}-{i}", words, bound, bed)
        # A bench that is asked to end ends its cluster too.
        before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        try:
            for process in cluster.all.values():
                process.start()
            for gateway in cluster.gateways:
                cluster.ready(gateway)
                cluster.joined(gateway, roles)
            yield cluster
        finally:
            cluster.leave()
            signal.signal(signal.SIGTERM, before)


def _add_gateway(cluster: Cluster, number: int, model: str, cores: str, bed: Bed | None) -> str:
    """Where members join it."""
    at, http, grpc = (free_port() for _ in range(3))
    host, name = FIRST_HOST + number, f"gateway-{number}"
    place = "127.0.0.1" if bed is None else bed.address(host)
    words = (
        *("gateway", "--model", model, "--listen", f"{place}:{at}", "--host", place),
        *("--http-port", str(http), "--grpc-port", str(grpc)),
    )
    cluster.http[name], cluster.grpc[name], cluster.places[name] = http, grpc, place
    cluster.gateways[name] = process = _process(cluster, name, words, cores)
    process.bed, process.host = bed, host
    return f"{place}:{at}"


def _add_peer(
    cluster: Cluster, name: str, words: Sequence[str], cores: str, bed: Bed | None
) -> None:
    host = FIRST_HOST + len(cluster.all)
    place = "127.0.0.1" if bed is None else bed.address(host)
    cluster.peers[name] = process = _process(
        cluster, name, (*words, "--listen", f"{place}:0"), cores
    )
    process.bed, process.host = bed, host


@contextlib.contextmanager
def started_alone(model: str = "demo", options: Sequence[str] = ()) -> Iterator[int]:
    """``moeserve serve`` beside clusters: its port of gRPC."""
    http, grpc = free_port(), free_port()
    words = ("serve", model, "--http-port", str(http), "--grpc-port", str(grpc), *options)
    with started((), gateways=0) as alone:
        process = alone.gateways["serve"] = _process(alone, "serve", words, "")
        alone.http["serve"] = http
        process.start()
        alone.ready("serve")
        yield grpc


def _process(cluster: Cluster, name: str, words: Sequence[str], cores: str) -> Process:
    return Process(name, tuple(words), cluster.folder / f"{name}.log", cores)


def _family(pid: int) -> list[int]:
    found = [pid]
    for member in found:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{member}/task"):
                children = Path(f"/proc/{member}/task/{task}/children").read_text()
                found += [int(child) for child in children.split() if int(child) not in found]
    return found
