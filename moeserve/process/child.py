"""A child process and all that it starts: started, watched, ended, with nothing left behind.

``start`` chooses environment, session, cores and priority. A ``Process`` owns what was started,
says in words how it ended, and ends it within a deadline: SIGTERM, then SIGKILL, to its whole
session. ``end_all`` does so for several at once.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from moeserve.errors import DeadlineError, UnavailableError

GRACE_S = 5.0  # from SIGTERM to SIGKILL
KILL_S = 5.0  # from SIGKILL until the kernel has taken a process away
SHOWN_LOG = 300  # bytes of a log's end in which an error looks for the last line
SHOWN_COMMAND = 120  # characters


@dataclass(frozen=True, slots=True)
class StartOptions:
    """``env`` is the whole environment, None for ours. ``cpus``: only the first so many of our
    cores. ``tied``: the kernel ends it when the thread that started it ends, where `setpriv` is
    installed. Without ``own_session`` it shares our terminal's signals, such as Ctrl-C."""

    env: Mapping[str, str] | None = None
    cpus: int | None = None
    niceness: int = 0
    tied: bool = False
    own_session: bool = True


DEFAULTS = StartOptions()


def start(
    command: Sequence[str], options: StartOptions = DEFAULTS, **streams: Any
) -> subprocess.Popen[Any]:
    """``streams`` are Popen's own: ``stdin``, ``stdout``, ``stderr``, ``text`` ..."""
    tied = ["setpriv", "--pdeathsig", "KILL"] if options.tied and shutil.which("setpriv") else []
    try:
        with bound_to(options.cpus):
            popen: subprocess.Popen[Any] = subprocess.Popen(
                [*tied, *command],
                env=None if options.env is None else dict(options.env),
                start_new_session=options.own_session,
                **streams,
            )
    except OSError as error:
        raise UnavailableError(f"cannot start {shown(command)}: {error.strerror}") from error
    if options.niceness:
        with contextlib.suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, popen.pid, options.niceness)
    return popen


@contextlib.contextmanager
def bound_to(cpus: int | None) -> Iterator[None]:
    """What is started inside may run on the first ``cpus`` of our cores; None changes nothing."""
    if cpus is None:
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:cpus])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def shown(command: Sequence[str] | str) -> str:
    """A command as a shell would take it, cut short."""
    text = command if isinstance(command, str) else shlex.join(map(str, command))
    return text if len(text) <= SHOWN_COMMAND else text[:SHOWN_COMMAND] + " ..."


def status_in_words(status: int) -> str:
    """How a process ended, by Popen's return code."""
    return f"by signal {-status}" if status < 0 else f"with status {status}"


class Process:
    """Owns one started process, its pipes, and its session where it leads one.

    ``name`` is what errors call it; ``log`` the file that its standard error goes to, if any.
    """

    def __init__(self, name: str, popen: subprocess.Popen[Any], log: Path | None = None) -> None:
        self.name = name
        self.started = time.monotonic()
        self._popen = popen
        self._log = log
        self._reader: threading.Thread | None = None
        self._leads_session = False
        with contextlib.suppress(ProcessLookupError):
            self._leads_session = os.getsid(popen.pid) == popen.pid

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
        return self._popen.pid

    @property
    def alive(self) -> bool:
        return self._popen.poll() is None

    @property
    def status(self) -> int | None:
        """Popen's return code; None while it runs."""
        return self._popen.poll()

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended within so many seconds."""
        try:
            self._popen.wait(max(0.0, timeout_s))
        except subprocess.TimeoutExpired:
            return False
        return True

    def send_signal(self, number: int) -> None:
        """To its whole session, also after it has ended itself; else to it alone. Nothing
        happens where nobody is left."""
        if not self._leads_session:
            self._popen.send_signal(number)
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def pause(self) -> None:
        self.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.send_signal(signal.SIGCONT)

    def echo(self, write: Callable[[str], object]) -> None:
        """Pass each line of its standard output, a pipe, to ``write``, from a thread of ours."""
        self._reader = threading.Thread(target=self._pass_on, args=(write,), daemon=True)
        self._reader.start()

    def read_line(self, timeout_s: float) -> str:
        """The next line of its standard output, a pipe that nothing else reads; "" at its end."""
        assert self._popen.stdout is not None
        pipe, line = self._popen.stdout.fileno(), b""
        end = time.monotonic() + timeout_s
        while not line.endswith(b"\n"):
            if not select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
                raise DeadlineError(f"{self.name} has printed no line for {timeout_s:.3g} s")
            byte = os.read(pipe, 1)  # and no more: a line of ours is short, the rest is not ours
            if not byte:
                break
            line += byte
        return line.decode(errors="replace")

    def close(self) -> None:
        """End it with all that it started; may be called again."""
        end_all([self])

    def release(self) -> None:
        """After the end: wait for the last of its output, close its pipes."""
        if self._reader is not None:
            self._reader.join(KILL_S)
        for pipe in (self._popen.stdin, self._popen.stdout):
            if pipe is not None and self._reader is None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def gone(self) -> UnavailableError:
        """Why it ended, or closed its output, as far as status and log tell."""
        self.wait(GRACE_S)
        status = self.status
        ended = "still runs" if status is None else status_in_words(status)
        where = "" if self._log is None else f"; log: {self._log}"
        command = shown(self._popen.args)  # type: ignore[arg-type]
        return UnavailableError(
            f"{self.name} ended: {self.last_line()} ({ended}{where}; {command})"
        )

    def last_line(self) -> str:
        """Of its log, as far as there is one."""
        if self._log is None or not self._log.exists():
            return "no log"
        end = self._log.read_bytes()[-SHOWN_LOG:].decode(errors="replace")
        lines = [line.strip() for line in end.splitlines() if line.strip()]
        return lines[-1] if lines else "it printed nothing"

    def _pass_on(self, write: Callable[[str], object]) -> None:
        assert self._popen.stdout is not None
        with io.TextIOWrapper(self._popen.stdout, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                write(line if line.endswith("\n") else line + "\n")


def end_all(processes: Sequence[Process], *, wait_s: float = 0.0, grace_s: float = GRACE_S) -> None:
    """Wait ``wait_s`` for them to end by themselves; then SIGTERM, and after ``grace_s`` SIGKILL,
    to each and to all that it started. Stopped ones end too. May be called again."""
    if not _wait_all(processes, wait_s):
        for process in processes:
            if process.alive:
                process.send_signal(signal.SIGTERM)
                process.resume()
        _wait_all(processes, grace_s)
    for process in processes:
        process.send_signal(signal.SIGKILL)  # also to what one left behind that ended by itself
    _wait_all(processes, KILL_S)
    for process in processes:
        process.release()


def _wait_all(processes: Sequence[Process], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    return all(process.wait(deadline - time.monotonic()) for process in processes)
