"""One worker process as those see it who give it jobs: started, asked over a socket, ended.

What it may do is its own side's business (``serve_jobs``); here is what becomes of a job whose
worker failed, as an error of ours. A worker gets of the environment only what a Python needs, none
of the server's secrets.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moeserve
from moeserve.errors import (
    CheckpointError,
    ConfigError,
    DeadlineError,
    ExhaustedError,
    InternalError,
    InvalidRequestError,
    MoeserveError,
    TokenizerError,
)
from moeserve.process.child import Process, StartOptions, end_all, start
from moeserve.process.frames import LENGTHS, Head, head_of, lengths_of, packed

_ERRORS: Mapping[str, type[MoeserveError]] = {
    kind.__name__: kind
    for kind in (CheckpointError, ConfigError, ExhaustedError, InvalidRequestError, TokenizerError)
}
_KEPT = ("PATH", "HOME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
_PIECE = 1 << 18


@dataclass(frozen=True, slots=True)
class WorkerProgram:
    """``module`` is run with ``arguments``; ``name`` is what errors call its work."""

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    niceness: int = 0

    def start(self) -> tuple[Process, socket.socket]:
        """The process, and the end of the socket that talks to it. UnavailableError."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                popen = start(
                    [sys.executable, "-P", "-m", self.module, *self.arguments],
                    StartOptions(env=worker_environ(os.environ), niceness=self.niceness),
                    stdin=theirs,
                    stdout=theirs,
                    stderr=subprocess.DEVNULL,
                )
            except BaseException:
                ours.close()
                raise
        return Process(self.name, popen), ours


def worker_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """One thread each, and this very package also where it is not installed."""
    kept = {k: v for k, v in environ.items() if k in _KEPT or k.startswith("LC_")}
    return kept | {
        "PYTHONPATH": python_path(environ),
        "TOKENIZERS_PARALLELISM": "false",
        "RAYON_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
    }


def python_path(environ: Mapping[str, str]) -> str:
    """For a child that imports this very package, also where it is not installed."""
    paths = [str(Path(str(moeserve.__file__)).parents[1]), environ.get("PYTHONPATH", "")]
    return os.pathsep.join(filter(None, paths))


class JobWorker:
    """Owns a process and the socket to it; used by one job at a time, from one event loop."""

    def __init__(self, process: Process, connection: socket.socket) -> None:
        self.process = process
        self.ready_rss = 0  # bytes, when it began
        self.rss = 0  # bytes, after its last job
        self._socket = connection
        self._socket.setblocking(False)

    @property
    def pid(self) -> int:
        return self.process.pid

    async def ask(self, head: Head, payload: bytes) -> tuple[dict[str, Any], bytes]:
        """One job. Callers bound the time; after any error but the job's own it must be ended."""
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_sendall(self._socket, packed(head, payload))
            return await self.receive()
        except OSError as error:
            raise await asyncio.to_thread(self._gone) from error

    async def receive(self) -> tuple[dict[str, Any], bytes]:
        """The next reply."""
        try:
            head_bytes, payload_bytes = lengths_of(await self._read(LENGTHS.size))
            head = head_of(await self._read(head_bytes))
            payload = await self._read(payload_bytes)
        except (EOFError, OSError) as error:
            raise await asyncio.to_thread(self._gone) from error
        self.rss = int(head.get("rss", 0))
        self.ready_rss = self.ready_rss or self.rss
        return head, payload

    def end(self) -> None:
        """At once, whatever it does; may be called again."""
        self._socket.close()
        self.process.send_signal(signal.SIGKILL)
        end_all([self.process], grace_s=0.0)

    async def _read(self, size: int) -> bytes:
        loop = asyncio.get_running_loop()
        found = bytearray()
        while len(found) < size:
            piece = await loop.sock_recv(self._socket, min(_PIECE, size - len(found)))
            if not piece:
                raise EOFError
            found += piece
        return bytes(found)

    def _gone(self) -> MoeserveError:
        """Why it closed its end; it has ended, or is about to."""
        name = self.process.name
        if not self.process.wait(1.0):
            return InternalError(f"{name}: its process closed its end")
        match -(self.process.status or 0):
            case signal.SIGXCPU:
                return too_long(name)
            case signal.SIGABRT | signal.SIGSEGV | signal.SIGBUS:
                return too_much(name)
        return ExhaustedError(f"{name}: its process ended, status {self.process.status}: try again")


def too_long(name: str) -> DeadlineError:
    return DeadlineError(f"{name} took too long and was ended: send less, or something simpler")


def too_much(name: str) -> ExhaustedError:
    return ExhaustedError(f"{name} took too much memory and was ended: send less")


def raise_failed(name: str, head: Mapping[str, Any]) -> None:
    """The error that a reply tells of, if it does."""
    if "error" in head:
        kind = _ERRORS.get(str(head["error"]), InternalError)
        raise kind(str(head["message"]), param=head.get("param"))
    if head.get("out_of_memory"):
        raise too_much(name)
    if "bug" in head:
        raise InternalError(f"{name}: {head['bug']}")


def end_workers(workers: Sequence[JobWorker]) -> None:
    """All of them; blocks for the moment that the kernel takes."""
    for worker in workers:
        worker.end()
