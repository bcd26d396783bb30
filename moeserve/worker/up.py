"""``moeserve up``: a whole cluster on this host, each part a process of its own.

First gateways, then members that join all of them; what each prints is passed on behind its name.
Ranks share the host's cores evenly, and members its memory. A part that ends by itself is named and
started anew, at the same addresses, after a wait that grows, until it has ended too often
(``restarts``). The others go on, for as long as there are, or come again, a gateway and a member
that decodes. One SIGTERM or SIGINT drains and ends all, a second one at once; should this process
itself be killed, the kernel ends the others.
"""

from __future__ import annotations

import queue
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from moeserve.comm.launch.environment import LOOPBACK
from moeserve.config.cluster import (
    EMBEDDED,
    ETCD,
    CacheMemberOptions,
    GatewayConfig,
    MemberRankOptions,
    PeerConfig,
)
from moeserve.config.group import Options
from moeserve.config.sources import to_environ
from moeserve.errors import ConfigError, UnavailableError
from moeserve.host import read_cpu
from moeserve.pools.registry.etcd_server import etcd_command
from moeserve.process.child import Process, StartOptions, end_all, start, status_in_words
from moeserve.worker.restarts import Restarts

# What gateways and an etcd get until they can be joined.
START_S = 60.0
LOOK_S = 0.1
# Beyond the drain timeout, what parts get to end, and after a second signal.
STOP_S, HURRY_S = 15.0, 1.0
REGISTRY_LINE, READY_LINE = "registry: ", "ready: "
MOST_PARTS = 256
# What members that keep no KV of others are told.
NO_CACHE: Mapping[str, object] = {
    name: field.default for name, field in CacheMemberOptions.model_fields.items()
}
# What members that serve no model are told.
NO_WEIGHTS: Mapping[str, object] = {"weights": "disk", "weights_folder": None}


@dataclass(frozen=True, slots=True)
class ClusterPlan:
    """How many members of each role, each of ``ep`` ranks, and gateways. ConfigError where nobody
    could decode, or be asked."""

    prefill: int = 1
    decode: int = 1
    unified: int = 0
    cache: int = 0
    gateways: int = 1
    ep: int = 1
    etcd: bool = False

    def __post_init__(self) -> None:
        if self.decode + self.unified < 1 or self.gateways < 1:
            raise ConfigError(
                f"--decode {self.decode} --unified {self.unified} --gateways {self.gateways}: a "
                "cluster needs a member that decodes, and a gateway"
            )
        if self.gateways + sum(self.roles.values()) > MOST_PARTS:
            raise ConfigError(f"more than {MOST_PARTS} parts on one host: ask for fewer")

    @property
    def roles(self) -> dict[str, int]:
        return {
            "prefill": self.prefill,
            "decode": self.decode,
            "unified": self.unified,
            "cache": self.cache,
        }

    @property
    def ranks(self) -> int:
        """Processes that compute."""
        return self.ep * (self.prefill + self.decode + self.unified)

    def members(self) -> Iterator[tuple[str, str]]:
        """Name and role of each."""
        for role, count in self.roles.items():
            for number in range(count):
                yield f"{role}-{number}", role


@dataclass(slots=True)
class ClusterPart:
    """A process of the cluster; ``ready`` and ``registry`` are what it said of itself. One that has
    ended is started anew when it is ``due``, or is ``over``."""

    name: str
    role: str
    config: Options
    kind: type[Options]
    process: Process
    ready: str = ""
    registry: str = ""
    restarts: Restarts = field(default_factory=Restarts)
    due: float | None = None
    over: bool = False


@dataclass(slots=True)
class LocalCluster:
    """Owns the processes. ``out`` gets lines for whoever started it, ``log`` what parts print."""

    plan: ClusterPlan
    peer: PeerConfig
    gateway: GatewayConfig
    environ: Mapping[str, str]
    out: IO[str] = field(default_factory=lambda: sys.stdout)
    log: IO[str] = field(default_factory=lambda: sys.stderr)
    parts: list[ClusterPart] = field(default_factory=list)
    _lines: queue.SimpleQueue[tuple[str, str]] = field(default_factory=queue.SimpleQueue)

    def run(self, stopped: Callable[[], int]) -> int:
        """Until ``stopped`` counts a signal, or too few are left; the exit status."""
        with ExitStack() as held:
            status = 1
            try:
                registry = held.enter_context(etcd_server(self.environ)) if self.plan.etcd else ""
                status = self._serve(registry or self.peer.registry, stopped)
            finally:
                self._end(stopped)
            return status

    def _serve(self, registry: str, stopped: Callable[[], int]) -> int:
        for number in range(self.plan.gateways):
            self._start_gateway(number, registry)
        if not self._wait(lambda: all(part.registry for part in self.parts), stopped, START_S):
            return 0
        join = None if registry != EMBEDDED else ",".join(p.registry for p in self.parts)
        for name, role in self.plan.members():
            self._start_member(name, role, registry, join)
        if self._wait(lambda: all(part.ready or part.over for part in self.parts), stopped, None):
            self._tell_topology()
            self._wait(lambda: False, stopped, None)
        return 0 if stopped() else 1

    def _wait(
        self, enough: Callable[[], bool], stopped: Callable[[], int], timeout_s: float | None
    ) -> bool:
        """Until it is ``enough``; False where it was stopped, or too few are left.
        UnavailableError after ``timeout_s``."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while not stopped():
            self._hear()
            if enough():
                return True
            if not self._look():
                return False
            if end is not None and time.monotonic() > end:
                raise UnavailableError(f"gateways were not there within {timeout_s:.0f} s")
        return False

    def _hear(self) -> None:
        """What parts have said meanwhile; waits a moment for it."""
        try:
            name, line = self._lines.get(timeout=LOOK_S)
        except queue.Empty:
            return
        part = next(part for part in self.parts if part.name == name)
        if line.startswith(REGISTRY_LINE):
            part.registry = line.removeprefix(REGISTRY_LINE)
        elif line.startswith(READY_LINE):
            part.ready = line.removeprefix(READY_LINE)
            self._say(f"{name} (process {part.process.pid}): {part.ready}")

    def _look(self) -> bool:
        """Names those that have ended, and starts anew what is due; whether enough are left."""
        for part in self.parts:
            self._look_at(part, time.monotonic())
        alive = [part.role for part in self.parts if not part.over]
        members = any(part.role != "gateway" for part in self.parts)
        decodes = not members or "decode" in alive or "unified" in alive
        if "gateway" in alive and decodes:
            return True
        self._say("ended: a cluster needs a gateway, and a member that decodes")
        return False

    def _look_at(self, part: ClusterPart, now: float) -> None:
        status = part.process.status
        if status is None or part.over:
            return
        if part.due is None:
            wait_s = part.restarts.wait_s(status, now)
            part.over = wait_s is None
            part.due = None if wait_s is None else now + wait_s
            then = part.restarts.why_not(status) if wait_s is None else ""
            then = then or f"it is started anew in {wait_s:g} s"
            self._say(f"{part.name}: ended {status_in_words(status)}; {then}")
        elif now >= part.due:
            part.due = None
            part.process.close()
            part.config = at_same_places(part)
            part.process = self._begin(part.name, part.role, part.config, part.kind)

    def _tell_topology(self) -> None:
        doors = "; ".join(part.ready for part in self.parts if part.role == "gateway")
        ranks = f" of {self.plan.ep} ranks" if self.plan.ep > 1 else ""
        roles = self.plan.roles.items()
        count = ", ".join(f"{n} {r}{'' if r == 'cache' else ranks}" for r, n in roles if n)
        self._say(f"{READY_LINE}{count}; {doors}")

    def _start_gateway(self, number: int, registry: str) -> None:
        ports = {"grpc_port": self.gateway.grpc_port, "http_port": self.gateway.http_port}
        moved = {name: port + number for name, port in ports.items() if port}
        config = self.gateway.model_copy(
            update=moved | {"registry": registry, "listen": f"{LOOPBACK}:0", "join": None}
        )
        self._start(f"gateway-{number}", "gateway", config, GatewayConfig)

    def _start_member(self, name: str, role: str, registry: str, join: str | None) -> None:
        threads = self.peer.threads or max(1, read_cpu().usable // max(1, self.plan.ranks))
        update: dict[str, object] = {"role": role, "name": name, "registry": registry, "join": join}
        update |= _of_cache(self.peer, name) if role == "cache" else NO_CACHE
        update |= shared_memory(self.peer, self.plan)
        config = self.peer.model_copy(
            update=update | {"listen": f"{LOOPBACK}:0", "threads": threads}
        )
        self._start(name, role, config, MemberRankOptions)

    def _start(self, name: str, role: str, config: Options, kind: type[Options]) -> None:
        process = self._begin(name, role, config, kind)
        self.parts.append(ClusterPart(name, role, config, kind, process))

    def _begin(self, name: str, role: str, config: Options, kind: type[Options]) -> Process:
        environ = to_environ(config, self.environ, kind)
        what = "gateway" if role == "gateway" else "peer"
        popen = start(
            [sys.executable, "-m", "moeserve.worker.cluster_command", what],
            StartOptions(env=environ, tied=True),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        process = Process(name, popen)

        def pass_on(line: str) -> None:
            if line.startswith((REGISTRY_LINE, READY_LINE)):
                self._lines.put((name, line.strip()))
            self.log.write(line if line.startswith("{") else f"[{name}] {line}")
            self.log.flush()

        process.echo(pass_on)
        return process

    def _say(self, line: str) -> None:
        self.out.write(line + "\n")
        self.out.flush()

    def _end(self, stopped: Callable[[], int]) -> None:
        """Gateways first, for what they have needs members; each within the drain timeout, and all
        at once after a second signal."""
        gateways = [part.process for part in self.parts if part.role == "gateway"]
        members = [part.process for part in self.parts if part.role != "gateway"]
        for processes in (gateways, members):
            for process in processes:
                if process.alive:
                    process.send_signal(signal.SIGTERM)
            end = time.monotonic() + self.gateway.drain_timeout_s + STOP_S
            while any(process.alive for process in processes) and time.monotonic() < end:
                if stopped() > 1:
                    break
                time.sleep(LOOK_S)
        end_all([*gateways, *members], grace_s=HURRY_S)


def at_same_places(part: ClusterPart) -> Options:
    """Its settings, with the addresses that it said it had: members join a gateway, and clients
    connect to it, where it was. Of members others hear anew."""
    if part.role != "gateway" or not part.registry:
        return part.config
    update: dict[str, object] = {"listen": part.registry}
    for door in ("grpc", "http"):
        if found := re.search(rf"\b{door}=\S*:(\d+)", part.ready):
            update[f"{door}_port"] = int(found[1])
    return part.config.model_copy(update=update)


def shared_memory(config: PeerConfig, plan: ClusterPlan) -> dict[str, object]:
    """Members size their KV all at once, and none sees what others will take: where no size is
    given, each counts with its share of the host's memory."""
    if config.num_blocks is not None or config.kv_memory is not None:
        return {}
    computing = sum(count for role, count in plan.roles.items() if role != "cache")
    return {"host_share": config.host_share / computing}


def _of_cache(config: PeerConfig, name: str) -> dict[str, object]:
    """Each member that keeps KV has a folder of its own."""
    folder = config.cache_folder
    return {**NO_WEIGHTS, "cache_folder": None if folder is None else folder / name}


@contextmanager
def etcd_server(environ: Mapping[str, str]) -> Iterator[str]:
    """An etcd of this host's own, whose data is gone with it, as a ``registry`` setting."""
    with tempfile.TemporaryDirectory(prefix="moeserve-etcd-") as folder:
        port = free_port()
        command = etcd_command(Path(folder) / "data", port, free_port())
        with (Path(folder) / "log").open("wb") as log:
            popen = start(
                command,
                StartOptions(env=environ, tied=True),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
            with Process("etcd", popen, Path(folder) / "log") as process:
                wait_for_port(process, port)
                yield f"{ETCD}{LOOPBACK}:{port}"


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind((LOOPBACK, 0))
        return int(bound.getsockname()[1])


def wait_for_port(process: Process, port: int) -> None:
    """Until it listens there; UnavailableError if it does not within ``START_S``, or ends."""
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if not process.alive:
            break
        with socket.socket() as tried:
            tried.settimeout(1.0)
            if tried.connect_ex((LOOPBACK, port)) == 0:
                return
        time.sleep(LOOK_S)
    raise process.gone()


@contextmanager
def counted_signals() -> Iterator[Callable[[], int]]:
    """How many SIGTERM and SIGINT have come."""
    came: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda n, frame: came.append(n)) for number in numbers]
    try:
        yield lambda: len(came)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
