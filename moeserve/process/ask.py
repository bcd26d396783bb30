"""The parent's side of a conversation: requests and replies are lines of JSON, with deadlines.

``ask_once`` starts a child for one request and ends it; ``ask_all`` asks several at the same time.
A child that is late is a DeadlineError that names it; one that has ended is an UnavailableError
with its status and the last line of its log.
"""

from __future__ import annotations

import json
import os
import select
import selectors
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moeserve.errors import DeadlineError
from moeserve.process.child import Process, StartOptions, start

# At once: for more, memory would be mapped and given back each time.
READ_BYTES = 1 << 16


class AnsweringProcess(Process):
    """A ``Process`` with pipes in and out that answers as ``answer.Channel`` does."""

    def __init__(self, name: str, popen: subprocess.Popen[Any], log: Path | None = None) -> None:
        super().__init__(name, popen, log)
        assert popen.stdin is not None and popen.stdout is not None, f"{name} has no pipes"
        self._stdin, self.reply_pipe = popen.stdin, popen.stdout
        for pipe in (self._stdin, self.reply_pipe):
            os.set_blocking(pipe.fileno(), False)
        self.unread = bytearray()

    def ask(self, message: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """One request and its reply, within ``timeout_s`` together."""
        return ask_all([self], [message], timeout_s)[0]

    def send(self, message: Mapping[str, Any], timeout_s: float) -> None:
        left = memoryview(json.dumps(message).encode() + b"\n")
        end = time.monotonic() + timeout_s
        left = self._write(left)
        if not left:
            return  # as nearly always: no selector is made
        with selectors.DefaultSelector() as writable:
            writable.register(self._stdin, selectors.EVENT_WRITE)
            while left:
                if not writable.select(max(0.0, end - time.monotonic())):
                    raise late([self], timeout_s)
                left = self._write(left)

    def _write(self, left: memoryview) -> memoryview:
        """As much as there is room for now; the rest."""
        try:
            return left[os.write(self._stdin.fileno(), left) :]
        except BlockingIOError:
            return left
        except BrokenPipeError as error:
            raise self.gone() from error

    def end_requests(self) -> None:
        """Nothing more is asked: ``Channel.serve`` returns."""
        self._stdin.close()

    def take_reply(self) -> dict[str, Any]:
        """The first whole line of ``unread``."""
        line, _, rest = self.unread.partition(b"\n")
        self.unread = rest
        answer: dict[str, Any] = json.loads(line) if line != b"{}" else {}
        return answer


def ask_all(
    processes: Sequence[AnsweringProcess], messages: Sequence[Mapping[str, Any]], timeout_s: float
) -> list[dict[str, Any]]:
    """One request each and all replies, in the order of ``processes``."""
    end = time.monotonic() + timeout_s
    for process, message in zip(processes, messages, strict=True):
        process.send(message, timeout_s)
    return receive_all(processes, timeout_s, end)


def receive_all(
    processes: Sequence[AnsweringProcess], timeout_s: float, end: float | None = None
) -> list[dict[str, Any]]:
    """A reply of each; until ``end`` of the monotonic clock, where the wait began earlier."""
    end = time.monotonic() + timeout_s if end is None else end
    if len(processes) == 1:
        return [_receive(processes[0], timeout_s, end)]
    with selectors.DefaultSelector() as readable:
        for process in processes:
            if b"\n" not in process.unread:
                readable.register(process.reply_pipe, selectors.EVENT_READ, process)
        while waiting := [key.data for key in readable.get_map().values()]:
            ready = readable.select(max(0.0, end - time.monotonic()))
            if not ready:
                raise late(waiting, timeout_s)
            for key, _ in ready:
                data = os.read(key.fd, READ_BYTES)
                if not data:
                    raise key.data.gone()
                key.data.unread += data
                if b"\n" in data:
                    readable.unregister(key.fileobj)
    return [process.take_reply() for process in processes]


def _receive(process: AnsweringProcess, timeout_s: float, end: float) -> dict[str, Any]:
    """Of one. What has come already is read without asking whether it has."""
    pipe, poll = process.reply_pipe.fileno(), None
    while b"\n" not in process.unread:
        try:
            data = os.read(pipe, READ_BYTES)
        except BlockingIOError:
            if poll is None:
                poll = select.poll()
                poll.register(pipe, select.POLLIN)
            if not poll.poll(1e3 * max(0.0, end - time.monotonic())):
                raise late([process], timeout_s) from None
            continue
        if not data:
            raise process.gone()
        process.unread += data
    return process.take_reply()


def late(processes: Sequence[Process], timeout_s: float) -> DeadlineError:
    names = ", ".join(sorted(process.name for process in processes))
    verb = "has" if len(processes) == 1 else "have"
    return DeadlineError(f"{names} {verb} not answered for {timeout_s:.3g} s")


def ask_once(
    name: str,
    command: Sequence[str],
    message: Mapping[str, Any],
    *,
    timeout_s: float,
    niceness: int = 0,
) -> dict[str, Any]:
    """Start a child, ask it once, end it with all that it started."""
    options = StartOptions(niceness=niceness, tied=True)
    with tempfile.NamedTemporaryFile(prefix="moeserve-", suffix=".log") as log:
        popen = start(command, options, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        with AnsweringProcess(name, popen, Path(log.name)) as process:
            return process.ask(message, timeout_s)
