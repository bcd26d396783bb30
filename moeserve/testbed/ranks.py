"""Run one command as every rank of a group on a bed's hosts, as a launcher would.

Each has torchrun's environment, its output comes line by line with its rank, and when one ends
badly the others are asked to end (SIGTERM) and soon made to (SIGKILL).
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from moeserve.errors import DeadlineError
from moeserve.testbed.network import Bed

MASTER_PORT = 29500
GRACE_S = 5.0

# Called with a rank and a line of its output, newline included; by several threads in turn.
Write = Callable[[int, str], None]


@dataclass(frozen=True, slots=True)
class RankSpec:
    rank: int
    world: int
    host: int
    local_rank: int
    local_world: int

    def env(self, bed: Bed) -> dict[str, str]:
        """Rank 0 keeps the store; it is on host 0."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world),
            "GROUP_RANK": str(self.host),
            "MASTER_ADDR": bed.address(0),
            "MASTER_PORT": str(MASTER_PORT),
            "GLOO_SOCKET_IFNAME": "eth0",
        }


@dataclass(frozen=True, slots=True)
class End:
    """``status`` 0 when all ended well, else that of ``rank``: 128 + n after signal n."""

    status: int
    rank: int = 0


def ranks_of(hosts: int, ranks_per_host: int) -> list[RankSpec]:
    return [
        RankSpec(host * ranks_per_host + local, hosts * ranks_per_host, host, local, ranks_per_host)
        for host in range(hosts)
        for local in range(ranks_per_host)
    ]


def start_ranks(
    bed: Bed,
    command: Sequence[str],
    ranks_per_host: int = 1,
    env: Mapping[str, str] | None = None,
    errors_to: Sequence[IO[bytes]] | None = None,
    **options: Any,
) -> list[subprocess.Popen[Any]]:
    """A process per rank, in their order; ``errors_to`` takes the standard error of each,
    ``options`` are Popen's."""
    if errors_to is None:
        each: list[dict[str, Any]] = [{}] * (bed.hosts * ranks_per_host)
    else:
        each = [{"stderr": file} for file in errors_to]
    return [
        bed.start(one.host, command, {**(env or {}), **one.env(bed)}, **own, **options)
        for one, own in zip(ranks_of(bed.hosts, ranks_per_host), each, strict=True)
    ]


def run_ranks(
    bed: Bed,
    command: Sequence[str],
    write: Write,
    ranks_per_host: int = 1,
    env: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
) -> End:
    """Until all have ended, or one has badly. DeadlineError names the ranks that still ran after
    ``timeout_s``."""
    processes = start_ranks(
        bed, command, ranks_per_host, env,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", bufsize=1,
    )  # fmt: skip
    turn = threading.Lock()
    pumps = [
        threading.Thread(target=_pump, args=(rank, process, write, turn), daemon=True)
        for rank, process in enumerate(processes)
    ]
    for pump in pumps:
        pump.start()
    try:
        return wait_all(processes, timeout_s)
    finally:
        end_all(processes)
        for pump in pumps:
            pump.join(GRACE_S)


def wait_all(processes: Sequence[subprocess.Popen[Any]], timeout_s: float | None = None) -> End:
    """Until all have ended, or one has badly."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    poll = select.poll()
    watched: dict[int, int] = {}
    try:
        for rank, process in enumerate(processes):
            descriptor = os.pidfd_open(process.pid)
            watched[descriptor] = rank
            poll.register(descriptor, select.POLLIN)
        running = set(watched)
        while running:
            left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1e3
            ended = [descriptor for descriptor, _ in poll.poll(left)]
            if not ended:
                late = [i for i, p in enumerate(processes) if p.poll() is None]
                raise DeadlineError(f"ranks {late} still ran after {timeout_s:g} s")
            for descriptor in ended:
                poll.unregister(descriptor)
                running.remove(descriptor)
                status = processes[watched[descriptor]].wait()
                if status:
                    return End(status if status > 0 else 128 - status, watched[descriptor])
        return End(0)
    finally:
        for descriptor in watched:
            os.close(descriptor)


def end_all(processes: Sequence[subprocess.Popen[Any]], grace_s: float = GRACE_S) -> None:
    """SIGTERM to each and to what it started, SIGKILL to what is left after ``grace_s``."""
    deadline = time.monotonic() + grace_s
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _pump(rank: int, process: subprocess.Popen[str], write: Write, turn: threading.Lock) -> None:
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            with turn:
                write(rank, line if line.endswith("\n") else line + "\n")
