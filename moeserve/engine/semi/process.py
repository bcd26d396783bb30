"""The process that computes prompts, seen from the one that decodes: started, asked, begun anew.

A thread of its own starts it, reads its replies, and when it has ended starts another one, after
``FIRST_WAIT_S`` and twice as long each time that one ended without having computed a step. That its
step is lost is told only when the kernel has taken the process away: then nothing of it writes to
KV any more. When this process ends, however it does, the other one's lifeline breaks, and it ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moeserve.core import StepPlan
from moeserve.engine.semi.messages import read_result, write_step
from moeserve.engine.semi.steps import LOST, Answer
from moeserve.engine.semi.worker import PromptsModel
from moeserve.errors import InternalError, MoeserveError, UnavailableError
from moeserve.kernels.shared_memory import SharedMemory
from moeserve.process.child import KILL_S, Process, StartOptions, end_all, start
from moeserve.process.frames import packed, read_frame
from moeserve.process.job_worker import python_path

# Until it has mapped its weights.
START_S = 300.0
# Until a step is with it, which only waits for frames.
SEND_S = 10
# To end by itself once its socket is closed, so that its own status is known.
ENDS_S = 0.5
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0
NAME = "the process that computes prompts"

log = logging.getLogger("moeserve.engine.semi")


@dataclass(slots=True)
class PromptsCounts:
    """Since the start. Of bytes, all that ever goes between the two processes; of ``tokens`` that
    were computed in the other one KV was copied by nobody. ``lost`` steps were computed again."""

    started: int = 0
    steps: int = 0
    tokens: int = 0
    failed: int = 0
    lost: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0


@dataclass(slots=True)
class _Running:
    process: Process
    connection: socket.socket
    lifeline: int


class PromptsProcess:
    """A ``PromptsExecutor``; owns the process. ``check`` is called when one is ready, and raises
    where what it has mapped may not be what this process has. ``start``, ``take``, ``ready``,
    ``kill``: one thread."""

    def __init__(
        self, model: PromptsModel, memory: SharedMemory, check: Callable[[], None]
    ) -> None:
        self.counts = PromptsCounts()
        self.wake: Callable[[], None] = lambda: None
        self._model = model
        self._memory = memory
        self._check = check
        self._lock = threading.Lock()  # of what is below
        self._running: _Running | None = None
        self._ready = False
        self._asked = 0  # tokens of the step that is with it; 0: none is
        self._answer: Answer | None = None
        self._problem: MoeserveError | None = None  # of the start, as long as none was ready
        self._closing = threading.Event()
        self._known = threading.Event()  # whether the first one gets ready
        self._thread = threading.Thread(target=self._live, name="moeserve-prompts", daemon=True)

    @property
    def ready(self) -> bool:
        return self._ready and not self._asked

    @property
    def pid(self) -> int | None:
        """None where there is none now."""
        running = self._running
        return None if running is None else running.process.pid

    def open(self) -> None:
        """Start it, and wait until it is ready; UnavailableError where that fails."""
        self._thread.start()
        self._known.wait(START_S + KILL_S)
        if not self._ready:
            problem = self._problem or UnavailableError(f"{NAME} is not ready after {START_S} s")
            self.close()
            raise problem

    def start(self, plan: StepPlan, threads: int) -> None:
        assert not self._asked, "one step at a time"
        try:
            message = packed(*write_step(plan, threads))
        except ValueError as error:  # it is larger than frames may be
            self._asked, self._answer = plan.num_tokens, InternalError(f"{NAME}: {error}")
            return
        with self._lock:
            self._asked = plan.num_tokens
            running = self._running if self._ready else None
            if running is None:
                self._answer = LOST
                self.counts.lost += 1
                return
        self.counts.sent_bytes += len(message)
        try:
            running.connection.sendall(message)
        except OSError:  # it has ended, or does not read: the thread will say so
            self.kill()

    def take(self) -> Answer | None:
        with self._lock:
            answer, self._answer = self._answer, None
            if answer is not None:
                self._asked = 0
        return answer

    def kill(self) -> None:
        with self._lock:
            if self._running is not None:
                self._running.process.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """It has ended then; may be called again."""
        self._closing.set()
        self.kill()
        if self._thread.ident is not None:
            self._thread.join(START_S)

    def _live(self) -> None:
        """From one process to the next."""
        wait_s = FIRST_WAIT_S
        while not self._closing.is_set():
            steps = self.counts.steps
            try:
                self._run_one()
            except MoeserveError as error:
                self._problem = error
                log.error("%s", error.message)
            except OSError as error:  # there are no descriptors left, for now
                self._problem = UnavailableError(f"{NAME} cannot be started: {error}")
                log.error("%s", self._problem.message)
            if not self._known.is_set():
                self._known.set()
                return
            if self._closing.is_set():
                return
            wait_s = FIRST_WAIT_S if self.counts.steps > steps else wait_s
            log.warning("%s is started anew in %.1f s", NAME, wait_s)
            self._closing.wait(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    def _run_one(self) -> None:
        """One process, from its start until the kernel has taken it away."""
        running = self._start()
        with running.connection:
            try:
                self._serve(running)
            finally:
                with self._lock:
                    self._ready, self._running = False, None
                _end(running)
                self._tell_lost()
        if not self._closing.is_set():
            raise running.process.gone()

    def _start(self) -> _Running:
        ours, theirs = socket.socketpair()
        end, lifeline = os.pipe()
        try:
            command = [sys.executable, "-P", "-m", "moeserve.engine.semi.worker"]
            popen = start(
                [*command, str(self._memory.fd), str(end)],
                StartOptions(env={**os.environ, "PYTHONPATH": python_path(os.environ)}),
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                pass_fds=(self._memory.fd, end),
            )
        except BaseException:
            ours.close()
            os.close(lifeline)
            raise
        finally:
            theirs.close()
            os.close(end)
        self.counts.started += 1
        running = _Running(Process(NAME, popen), ours, lifeline)
        with self._lock:
            self._running = running
        if self._closing.is_set():  # whoever closes has looked for it before it was there
            self.kill()
        return running

    def _serve(self, running: _Running) -> None:
        """Load, then read replies until there are none."""
        connection = running.connection
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_S, 0))
        late = threading.Timer(START_S, self.kill)
        late.daemon = True  # who ends meanwhile does not wait for it
        late.start()
        try:
            with connection.makefile("rb") as stream:
                with contextlib.suppress(OSError):
                    connection.sendall(packed(self._model.to_json()))
                ready = _next(stream)
                late.cancel()
                if ready is None:
                    return
                self._check()
                self._get_ready()
                while (reply := _next(stream)) is not None:
                    self._take_note(*reply)
        finally:
            late.cancel()

    def _get_ready(self) -> None:
        with self._lock:
            self._ready = True
        self._known.set()
        self.wake()

    def _take_note(self, head: dict[str, Any], payload: bytes) -> None:
        answer: Answer
        if "error" in head:
            self.counts.failed += 1
            answer = InternalError(f"{NAME}: {head['error']}")
        else:
            answer = read_result(payload)
            self.counts.steps += 1
            self.counts.tokens += self._asked
        self.counts.received_bytes += len(payload)
        with self._lock:
            self._answer = answer
        self.wake()

    def _tell_lost(self) -> None:
        with self._lock:
            if self._asked and self._answer is None:
                self._answer = LOST
                self.counts.lost += 1
        self.wake()


def _next(stream: Any) -> tuple[dict[str, Any], bytes] | None:
    """None where the other side has gone, or says what means nothing."""
    try:
        return read_frame(stream)
    except (OSError, ValueError):
        return None


def _end(running: _Running) -> None:
    """Until it is gone, and with it whatever it started."""
    running.process.wait(ENDS_S)
    running.process.send_signal(signal.SIGKILL)
    end_all([running.process], grace_s=0.0)
    while running.process.alive:  # the kernel has it: whoever waits for an answer has a deadline
        running.process.wait(KILL_S)
    os.close(running.lifeline)
