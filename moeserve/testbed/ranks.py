"""Run one command as every rank of a group on a bed's hosts, as a launcher would.

Each has torchrun's environment, its output comes line by line with its rank, and when one ends
badly the others are asked to end (SIGTERM) and soon made to (SIGKILL).
"""

from __future__ import annotations

import os
import select
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

from moeserve.errors import DeadlineError
from moeserve.process.child import GRACE_S, Process, end_all
from moeserve.testbed.network import Bed

MASTER_PORT = 29500

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
class GroupEnd:
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
) -> GroupEnd:
    """Until all have ended, or one has badly. DeadlineError names the ranks that still ran after
    ``timeout_s``."""
    started = start_ranks(
        bed, command, ranks_per_host, env,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    processes = [Process(f"rank {rank}", popen) for rank, popen in enumerate(started)]
    turn = threading.Lock()
    for rank, process in enumerate(processes):
        process.echo(partial(_write_in_turn, turn, write, rank))
    try:
        return wait_all(processes, timeout_s)
    finally:
        end_all(processes)


def wait_all(processes: Sequence[Process], timeout_s: float | None = None) -> GroupEnd:
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
                late = [rank for rank, process in enumerate(processes) if process.alive]
                raise DeadlineError(f"ranks {late} still ran after {timeout_s:g} s")
            for descriptor in ended:
                poll.unregister(descriptor)
                running.remove(descriptor)
                process = processes[watched[descriptor]]
                process.wait(GRACE_S)
                if process.status:
                    return GroupEnd(shell_status(process.status), watched[descriptor])
        return GroupEnd(0)
    finally:
        for descriptor in watched:
            os.close(descriptor)


def shell_status(returncode: int) -> int:
    """What a shell would report: 128 + n after signal n."""
    return returncode if returncode > 0 else 128 - returncode


def _write_in_turn(turn: threading.Lock, write: Write, rank: int, line: str) -> None:
    with turn:
        write(rank, line)
