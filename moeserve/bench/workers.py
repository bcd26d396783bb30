"""Processes that measure one thing each: started on cores of their own, asked, paused, ended.

A worker that is not asked is stopped (SIGSTOP), so that its threads cannot disturb the others.
Every wait has a deadline, and its error names the worker. None outlives whoever started it: each
is ended with its children, and by the kernel if we are killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from moeserve.errors import DeadlineError, UnavailableError

GRACE_S = 5.0
LAST_WORDS = 300  # characters of a dead worker's log that its error repeats


class Process:
    """A program with its children, in a session of their own; ``log`` hears what they print."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        cpus: int,
        log: Path,
        env: Mapping[str, str] | None = None,
        pipes: bool = False,
    ) -> None:
        self.name = name
        self._log = log
        self.started = time.monotonic()
        pipe = subprocess.PIPE if pipes else subprocess.DEVNULL
        tied = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        with log.open("wb") as said, bound_to(cpus):
            self._process = subprocess.Popen(
                [*tied, *command],
                stdin=pipe,
                stdout=pipe if pipes else said,
                stderr=said,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def peak_bytes(self) -> int:
        """The most memory each of its processes ever held, together."""
        return sum(peak_bytes(pid) for pid in pids_of_session(self.pid))

    def close(self) -> None:
        """Ends it with all its children; may be called again."""
        self.resume()
        self._signal(signal.SIGTERM)
        try:
            self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._signal(signal.SIGKILL)
            self._process.wait(GRACE_S)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def gone(self) -> UnavailableError:
        """Why it ended, as far as its log tells."""
        words = self._log.read_bytes()[-LAST_WORDS:].decode(errors="replace")
        last = next((line for line in reversed(words.splitlines()) if line.strip()), "no word")
        return UnavailableError(f"{self.name} ended: {last.strip()} (log: {self._log})")

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)


class Worker(Process):
    """A ``Process`` that speaks the protocol of ``worker.answer``."""

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
        """Waits until it is ready; ``said`` is what it then told, after ``ready_s`` seconds."""
        # Where this package is not installed, its workers still find how to answer.
        answering = {"PYTHONPATH": str(Path(__file__).parent / "worker")}
        super().__init__(
            name, command, cpus=cpus, log=log, env={**answering, **(env or {})}, pipes=True
        )
        self._unread = b""
        try:
            self.said = self._reply(deadline)
        except BaseException:  # also an interrupt: no process outlives its owner
            self.close()
            raise
        self.ready_s = time.monotonic() - self.started

    def ask(self, do: str, *, deadline: float, **arguments: Any) -> dict[str, Any]:
        """One request and its reply; a worker that is late is ended."""
        assert self._process.stdin is not None
        self.resume()
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self.gone() from error
        return self._reply(deadline)

    def _reply(self, deadline: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        end = time.monotonic() + deadline
        with selectors.DefaultSelector() as ready:
            ready.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not ready.select(max(0.0, end - time.monotonic())):
                    self.close()
                    raise DeadlineError(f"{self.name} has not answered for {deadline:.0f} s")
                data = os.read(self._process.stdout.fileno(), 1 << 20)
                if not data:
                    self._process.wait(GRACE_S)
                    raise self.gone()
                self._unread += data
        self.pause()
        line, _, self._unread = self._unread.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextlib.contextmanager
def bound_to(cpus: int) -> Iterator[None]:
    """What is started inside may run on the first ``cpus`` of our cores."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:cpus])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


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


def peak_bytes(pid: int) -> int:
    try:
        status = (Path("/proc") / str(pid) / "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    sizes = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return sum(int(kib) * 1024 for kib in sizes)
