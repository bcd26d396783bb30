"""The worker's side of a ``WorkerPool``: one job after the other, each inside its limits.

Memory is bounded by the address space, processor time by the kernel, and files cannot be written.
A job that fails with an error of ours ends with it; one that needs more memory than there is, too,
and so does the worker, as nobody knows what is left of it. The standard library only, so that a
worker starts fast.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from moeserve.errors import MoeserveError
from moeserve.process.frames import Head, packed, read_frame

Reply = tuple[Head, bytes]
# Takes head and payload of a job.
Handler = Callable[[Mapping[str, Any], bytes], Reply]
Handlers = Mapping[str, Handler]

_SHOWN_BUG = 4000  # characters
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class JobLimits:
    """What a worker may take for one job: bytes beyond what it holds, seconds of processor."""

    memory_bytes: int
    cpu_s: int


class JobServer:
    """Owns what was standard input and output; what libraries print goes to standard error."""

    def __init__(self) -> None:
        self._cpu_s = 0
        self._in: BinaryIO = os.fdopen(os.dup(0), "rb")
        self._out: BinaryIO = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    def confine(self, limits: JobLimits) -> None:
        """For all jobs from here on."""
        self._cpu_s = limits.cpu_s
        if used := _statm(0):
            _, hard = resource.getrlimit(resource.RLIMIT_AS)
            wanted = used + limits.memory_bytes
            soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

    def answer(self, head: Mapping[str, Any], payload: bytes, handlers: Handlers) -> bool:
        """Does one job and replies; whether another may follow."""
        self._allow_cpu()
        sound = True
        try:
            reply, content = handlers[head["do"]](head, payload)
        except MoeserveError as error:
            reply, content = error_head(error), b""
        except MemoryError:
            reply, content, sound = {"out_of_memory": True}, b"", False
        except Exception:  # noqa: BLE001 - a bug of ours: whoever asked has a log
            reply, content = {"bug": traceback.format_exc()[-_SHOWN_BUG:]}, b""
        self.reply(reply, content)
        return sound

    def serve(self, handlers: Handlers) -> None:
        """Until the other side closes, or a job has left nothing to trust."""
        while (job := read_frame(self._in)) is not None:
            if not self.answer(*job, handlers):
                return

    def reply(self, head: Head, payload: bytes = b"") -> None:
        """``rss`` of the reply is what the process holds, in bytes."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._out.write(packed({**head, "rss": _statm(1)}, payload))
            self._out.flush()

    def _allow_cpu(self) -> None:
        """The kernel ends the process where it takes longer; counted in whole seconds."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        soft = int(used.ru_utime + used.ru_stime) + 1 + self._cpu_s
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        if hard != resource.RLIM_INFINITY:
            soft = min(soft, hard)
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def error_head(error: MoeserveError) -> Head:
    """As ``pool`` makes it an error again."""
    return {"error": type(error).__name__, "message": error.message, "param": error.param}


def run_worker(
    prepare: Callable[[], tuple[Handlers, Head]], preparing: JobLimits, limits: JobLimits
) -> None:
    """The whole life of a worker: ``prepare`` within limits of its own, one reply that says whether
    it went well, then jobs."""
    server = JobServer()
    server.confine(preparing)
    handlers: Handlers = {}

    def first(_: Mapping[str, Any], __: bytes) -> Reply:
        nonlocal handlers
        handlers, said = prepare()
        return said, b""

    sound = server.answer({"do": "prepare"}, b"", {"prepare": first})
    if not sound or not handlers:
        sys.exit(1)
    server.confine(limits)
    server.serve(handlers)


def _statm(field: int) -> int:
    """Bytes of address space (0) or resident (1); 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[field]) * _PAGE
    except OSError:
        return 0
