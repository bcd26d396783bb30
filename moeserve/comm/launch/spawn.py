"""Ranks as children of this process: started with a launcher's environment, each line of their
output prefixed with the rank, ended when this process ends.

A child that ends before ``end`` is called is an ``alarm``. It need not have failed itself: it may
know of another rank's failure.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from functools import partial
from typing import IO

from moeserve.comm.launch.environment import LOOPBACK
from moeserve.config.variables import LAUNCHER
from moeserve.errors import LateRankError
from moeserve.process.child import Process, StartOptions, end_all, start, status_in_words

TERMINATE_S = 2.0


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
    """Owns the processes; ``environs`` by rank, each a whole environment."""

    def __init__(
        self, command: Sequence[str], environs: Mapping[int, Mapping[str, str]], out: IO[str]
    ) -> None:
        self._ending = False
        self._processes: dict[int, Process] = {}
        for rank, environ in environs.items():
            # In our session: Ctrl-C at the terminal is for all ranks.
            popen = start(
                command,
                StartOptions(env=environ, own_session=False),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            self._processes[rank] = Process(f"rank {rank}", popen)
            self._processes[rank].echo(partial(_echo, out, rank))

    def alarm(self) -> LateRankError | None:
        """An ``exchange.Alarm``."""
        if self._ending:
            return None
        for rank, process in self._processes.items():
            status = process.status
            if status is not None:
                ended = status_in_words(status)
                return LateRankError(f"rank {rank} has ended {ended}: its output says why", [rank])
        return None

    def end(self, grace_s: float) -> None:
        """Wait for them to end by themselves for so long, then see to it. Ends stopped ones too."""
        self._ending = True
        end_all(list(self._processes.values()), wait_s=grace_s, grace_s=TERMINATE_S)


def _echo(out: IO[str], rank: int, line: str) -> None:
    """Names the rank; a line that is a JSON object does so itself."""
    out.write(line if line.startswith("{") else f"[rank {rank}] {line}")
    out.flush()
