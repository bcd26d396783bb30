"""Ranks as children of this process: started with a launcher's environment, each line of their
output prefixed with the rank, ended when this process ends.

A child that ends before ``end`` is called is an ``alarm``. It need not have failed itself: it may
know of another rank's failure.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO

from moeserve.comm.launch.environment import LOOPBACK
from moeserve.config.variables import LAUNCHER
from moeserve.errors import LateRankError

POLL_S = 0.01
TERMINATE_S = 2.0
KILL_S = 5.0


def child_environ(rank: int, world: int, port: int) -> dict[str, str]:
    """What ``launch.read_launch`` reads in a child; rank 0 keeps the notes at ``port``."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
        LAUNCHER: "moeserve",
        # Our own log says in one line that rank 0 has ended.
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }


class Children:
    """Owns the processes; ``environs`` by rank."""

    def __init__(
        self, command: Sequence[str], environs: Mapping[int, Mapping[str, str]], out: IO[str]
    ) -> None:
        self._out = out
        self._ending = False
        self._processes: dict[int, subprocess.Popen[str]] = {}
        self._readers: list[threading.Thread] = []
        for rank, environ in environs.items():
            process = subprocess.Popen(
                command,
                env=dict(environ),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            self._processes[rank] = process
            reader = threading.Thread(target=self._echo, args=(rank, process), daemon=True)
            reader.start()
            self._readers.append(reader)

    def alarm(self) -> LateRankError | None:
        """An ``exchange.Alarm``."""
        if self._ending:
            return None
        for rank, process in self._processes.items():
            status = process.poll()
            if status is not None:
                ended = f"by signal {-status}" if status < 0 else f"with status {status}"
                return LateRankError(f"rank {rank} has ended {ended}: its output says why", [rank])
        return None

    def end(self, grace_s: float) -> None:
        """Wait for them to end by themselves for so long, then see to it. Ends stopped ones too."""
        self._ending = True
        if not self._wait(grace_s):
            for process in self._processes.values():
                process.terminate()
            if not self._wait(TERMINATE_S):
                for process in self._processes.values():
                    process.kill()
                self._wait(KILL_S)
        for reader in self._readers:
            reader.join(KILL_S)

    def _wait(self, timeout_s: float) -> bool:
        give_up = time.monotonic() + timeout_s
        while any(process.poll() is None for process in self._processes.values()):
            if time.monotonic() > give_up:
                return False
            time.sleep(POLL_S)
        return True

    def _echo(self, rank: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                self._out.write(f"[rank {rank}] {line}")
                self._out.flush()


def worker_command() -> list[str]:
    return [sys.executable, "-m", "moeserve.worker"]
