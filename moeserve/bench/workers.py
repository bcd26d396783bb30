"""Processes that measure one thing each: started on cores of their own, asked, paused, ended.

A worker that is not asked is stopped (SIGSTOP), so that its threads cannot disturb the others.
Every wait has a deadline, and its error names the worker. None outlives whoever started it: each
is ended with its children, and by the kernel if we are killed.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import moeserve.bench.worker
import moeserve.process
from moeserve.errors import DeadlineError
from moeserve.process.ask import AnsweringProcess, receive_all
from moeserve.process.child import Process, StartOptions, start

# Where this package is not installed, its workers still find how to answer.
ANSWERING = os.pathsep.join([*moeserve.process.__path__, *moeserve.bench.worker.__path__])


class LoggedProcess(Process):
    """A program bound to ``cpus`` cores; what it prints goes to the file ``log``."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        cpus: int,
        log: Path,
        env: Mapping[str, str] | None = None,
    ) -> None:
        with log.open("wb") as file:
            popen = start(
                command, _bound(cpus, env), stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )
        super().__init__(name, popen, log)


class Worker(AnsweringProcess):
    """A process that answers as ``answer.Channel`` does, stopped between its requests."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        cpus: int,
        log: Path,
        env: Mapping[str, str] | None = None,
        deadline: float = 60.0,
    ) -> None:
        """Waits until it is ready: after ``ready_s`` seconds it sent ``ready_message``."""
        environ = {"PYTHONPATH": ANSWERING, **(env or {})}
        began = time.monotonic()
        with log.open("wb") as file:
            pipe = subprocess.PIPE
            popen = start(command, _bound(cpus, environ), stdin=pipe, stdout=pipe, stderr=file)
        super().__init__(name, popen, log)
        try:
            self.ready_message = receive_all([self], deadline)[0]
        except BaseException:  # also an interrupt: no process outlives its owner
            self.close()
            raise
        self.ready_s = time.monotonic() - began
        self.pause()

    def request(self, do: str, *, deadline: float, **arguments: Any) -> dict[str, Any]:
        """One request and its reply; a worker that is late is ended."""
        self.resume()
        try:
            answer = self.ask({"do": do, **arguments}, deadline)
        except DeadlineError:
            self.close()
            raise
        self.pause()
        return answer


def _bound(cpus: int, env: Mapping[str, str] | None) -> StartOptions:
    return StartOptions(env={**os.environ, **(env or {})}, cpus=cpus, tied=True)


def pids_of_session(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session:
            found.append(int(entry.name))
    return found


def session_peak_bytes(session: int) -> int:
    """The most memory each process of a session ever held, together."""
    return sum(peak_bytes(pid) for pid in pids_of_session(session))


def peak_bytes(pid: int) -> int:
    try:
        status = (Path("/proc") / str(pid) / "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    sizes = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return sum(int(kib) * 1024 for kib in sizes)
