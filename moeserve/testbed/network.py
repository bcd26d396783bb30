"""Hosts as namespaces (network, host name, mounts, IPC) on a bridge, with rate-limited links.

Host h has the address ``10.77.0.<h + 1>``, the name ``host<h>``, every host's name in its
``/etc/hosts`` and a ``/dev/shm`` of its own; processes, users and files are the machine's. Its link
is a veth pair: ``eth0`` on the host, ``port<h>`` on the switch, each limited by a token bucket, as
the two directions of a cable are. A link has a rate but no delay.

All of it is anonymous: a namespace lives as long as processes in it, first of all its keeper, which
ends when the owner's end of a pipe closes. So beds never collide, nothing in the machine's own
network changes, and an owner killed by SIGKILL leaves little: what it started dies with it, and
what that started is ended when the next bed is raised (``marks.sweep``).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from moeserve.errors import ConfigError, InternalError, UnavailableError
from moeserve.process.child import StartOptions, start
from moeserve.testbed import marks
from moeserve.testbed.links import (
    LinkCount,
    connect,
    entering,
    limit,
    read_count,
    set_port,
)

MOST_HOSTS = 250
START_S = 10.0
TOOLS = ("ip", "tc", "unshare", "nsenter", "setpriv", "mount")
NAMESPACES = ("--net", "--uts", "--ipc", "--mount")
CLONE_NEWNET = 0x40000000

# Without IPv6 links are silent, so that all that is counted is of the ranks.
SILENCE = "{ echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6; } 2>/dev/null\n"
KEEP_SWITCH = f"""{SILENCE}
ip link add name switch type bridge mcast_snooping 0 && ip link set switch up && echo ready && cat
"""
# $1 is the host's name, $2 its /etc/hosts, a mount that stays when its folder has gone.
KEEP_HOST = f"""{SILENCE}
hostname "$1" && ip link set lo up &&
mount -t tmpfs testbed /mnt && printf %s "$2" > /mnt/hosts &&
mount --bind /mnt/hosts /etc/hosts && umount -l /mnt &&
mount -t tmpfs -o mode=1777 testbed /dev/shm && echo ready && cat
"""
TRIAL = (
    "ip link add name port type veth peer name eth0 && ip link add name switch type bridge && "
    "ip link set port master switch && "
    "tc qdisc replace dev eth0 root tbf rate 1mbit burst 9100 limit 90000 && "
    "mount -t tmpfs testbed /dev/shm"
)


def refusal() -> str | None:
    """Why no bed can be raised here; None where it can."""
    if not sys.platform.startswith("linux"):
        return f"the test bed needs Linux, not {sys.platform}"
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent:
        return f"the test bed needs {', '.join(absent)} (Debian: iproute2, util-linux, mount)"
    done = subprocess.run(
        ["unshare", *NAMESPACES, "sh", "-c", TRIAL],
        capture_output=True, text=True, timeout=START_S, check=False,
    )  # fmt: skip
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no reason given"]
        return f"namespaces, veth or tc are not permitted here; root may: {said[-1]}"
    return None


class Bed:
    """So many hosts, up from construction to ``close``, which the context manager calls."""

    def __init__(self, hosts: int, rate: int | None = None) -> None:
        if not 1 <= hosts <= MOST_HOSTS:
            raise ConfigError(f"hosts={hosts}: must be 1 to {MOST_HOSTS}")
        reason = refusal()
        if reason is not None:
            raise UnavailableError(reason)
        marks.sweep()
        self.hosts = hosts
        self._mark = marks.new_mark()
        self._keepers: list[subprocess.Popen[str]] = []
        self._started: list[subprocess.Popen[Any]] = []
        try:
            self._raise(rate)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Bed:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def address(self, host: int) -> str:
        return f"10.77.0.{host + 1}"

    def name(self, host: int) -> str:
        return f"host{host}"

    def set_rate(self, rate: int | None, host: int | None = None) -> None:
        """Bits per second in each direction, None for no limit; of one host, or of all."""
        for h in range(self.hosts) if host is None else (host,):
            limit(self._pid(h), "eth0", rate)
            limit(self._switch, f"port{h}", rate)

    def cut(self, host: int) -> None:
        """Nothing passes any more, and nobody is told: as when a switch far away fails."""
        self._pid(host)
        set_port(self._switch, host, up=False)

    def mend(self, host: int) -> None:
        self._pid(host)
        set_port(self._switch, host, up=True)

    def count(self, host: int) -> LinkCount:
        """What crossed the host's link so far."""
        return read_count(self._pid(host))

    def start(
        self,
        host: int,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.Popen[Any]:
        """A process on a host, in a session of its own; ``env`` is added to ours, ``options`` are
        Popen's. It dies with the bed, and with the thread that called."""
        folder = os.path.abspath(options.pop("cwd", os.curdir))
        environ = {**os.environ, **(env or {}), marks.BED: self._mark, marks.HOST: str(host)}
        entered = [*entering(self._pid(host), folder), *command]
        process = start(entered, StartOptions(env=environ, tied=True), **options)
        self._started.append(process)
        return process

    @contextlib.contextmanager
    def inside(self, host: int) -> Iterator[None]:
        """Sockets that the calling thread opens meanwhile are on that host."""
        libc = ctypes.CDLL(None, use_errno=True)
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        away = os.open(f"/proc/{self._pid(host)}/ns/net", os.O_RDONLY)
        try:
            _enter_network(libc, away)
            yield
        finally:
            _enter_network(libc, home)
            os.close(away)
            os.close(home)

    def close(self) -> None:
        """End every process of the bed; the kernel takes the rest. May be called twice."""
        marks.end(self._mark)
        for process in (*self._started, *self._keepers):
            process.wait(START_S)
        for keeper in self._keepers:
            assert keeper.stdin is not None and keeper.stdout is not None
            keeper.stdin.close()
            keeper.stdout.close()
        self._started.clear()
        self._keepers.clear()

    def _raise(self, rate: int | None) -> None:
        known = "".join(f"{self.address(h)}\t{self.name(h)}\n" for h in range(self.hosts))
        names = f"127.0.0.1\tlocalhost\n{known}"
        self._keep(marks.SWITCH, ["unshare", "--net", "sh", "-c", KEEP_SWITCH])
        for host in range(self.hosts):
            script = ["sh", "-c", KEEP_HOST, "keeper", self.name(host), names]
            self._keep(str(host), ["unshare", *NAMESPACES, *script])
        for keeper in self._keepers:
            _await_ready(keeper)
        for host in range(self.hosts):
            connect(self._switch, host, self._pid(host), self.address(host))
        if rate is not None:
            self.set_rate(rate)

    def _keep(self, kept: str, command: Sequence[str]) -> None:
        self._keepers.append(
            start(
                command,
                StartOptions(env={**os.environ, marks.BED: self._mark, marks.KEEPER: kept}),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip

    @property
    def _switch(self) -> int:
        return self._keepers[0].pid

    def _pid(self, host: int) -> int:
        if not 0 <= host < self.hosts or not self._keepers:
            raise ConfigError(f"host {host}: the bed has hosts 0 to {self.hosts - 1}")
        return self._keepers[1 + host].pid


def _await_ready(keeper: subprocess.Popen[str]) -> None:
    assert keeper.stdout is not None
    said = ""
    if select.select([keeper.stdout], [], [], START_S)[0]:
        said = keeper.stdout.readline()
    if said != "ready\n":
        raise InternalError(f"test bed: a host did not come up: {said.strip() or 'no word'}")


def _enter_network(libc: ctypes.CDLL, namespace: int) -> None:
    if libc.setns(namespace, CLONE_NEWNET):
        code = ctypes.get_errno()
        raise InternalError(f"test bed: setns failed: {os.strerror(code)}")
