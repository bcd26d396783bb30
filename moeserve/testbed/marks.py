"""Which processes belong to which bed: each carries its bed's mark in its environment.

A mark names the owner by process id and start time, so that it is known whether it still lives
though ids return; nothing is written anywhere.
"""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from moeserve.errors import InternalError

# Not MOESERVE_...: those are settings, and unknown ones are refused.
BED = "MOETESTBED"
HOST = "MOETESTBED_HOST"
KEEPER = "MOETESTBED_KEEPER"
SWITCH = "switch"
END_S = 10.0


@dataclass(frozen=True, slots=True)
class Marked:
    """``keeps`` is what the process keeps alive, a host's number or "switch"; else empty."""

    pid: int
    bed: str
    keeps: str


def new_mark() -> str:
    return f"{os.getpid()}.{_start_of(os.getpid())}.{secrets.token_hex(4)}"


def owner_of(bed: str) -> int:
    return int(bed.split(".")[0])


def is_owned(bed: str) -> bool:
    """Whether the process that raised it still lives."""
    pid, start, _ = bed.split(".")
    return _start_of(int(pid)) == start


def marked() -> Iterator[Marked]:
    """Every process with a mark that we may read."""
    for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                words = file.read().decode(errors="replace").split("\0")
        except OSError:  # it has ended, or is another user's
            continue
        found = dict(word.split("=", 1) for word in words if word.startswith(BED))
        if found.get(BED, "").count(".") == 2:
            yield Marked(pid, found[BED], found.get(KEEPER, ""))


def end(bed: str) -> None:
    """SIGKILL to every process of a bed, until none is left."""
    _end_where(lambda one: one.bed == bed)


def sweep() -> None:
    """The same to those whose owner is gone."""
    _end_where(lambda one: not is_owned(one.bed))


def _end_where(belongs: Callable[[Marked], bool]) -> None:
    deadline = time.monotonic() + END_S
    while ours := [one.pid for one in marked() if belongs(one)]:
        for pid in ours:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if time.monotonic() > deadline:
            raise InternalError(f"processes {ours} of a test bed outlive SIGKILL")
        time.sleep(0.005)


def _start_of(pid: int) -> str:
    """In clock ticks since boot; empty where it is gone or a zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
