"""A limit of the kernel on what a process and its children take, page cache included.

A control group of version 1, which takes root; elsewhere there is no cap, and ``MemoryCap.open``
says so with None. Swap is off in the group, where the kernel can tell it apart.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

CONTROLLER = Path("/sys/fs/cgroup/memory")


class MemoryCap:
    """Owns one group; gone when closed, after its processes have ended."""

    def __init__(self, group: Path) -> None:
        self._group = group

    @classmethod
    def open(cls, nbytes: int, name: str) -> Self | None:
        group = CONTROLLER / f"moeserve-{name}-{os.getpid()}"
        try:
            group.mkdir()
            (group / "memory.limit_in_bytes").write_text(str(nbytes))
        except OSError:
            with suppress(OSError):
                group.rmdir()
            return None
        with suppress(OSError):  # a kernel that does not count swap
            (group / "memory.memsw.limit_in_bytes").write_text(str(nbytes))
        return cls(group)

    def command(self, words: Sequence[str]) -> tuple[str, ...]:
        """The same command, which joins the group before it runs."""
        join = f'echo $$ > "{self._group}/cgroup.procs" && exec "$@"'
        return ("/bin/sh", "-c", join, "sh", *words)

    @property
    def peak(self) -> int:
        """The most bytes that were charged at once."""
        return int((self._group / "memory.max_usage_in_bytes").read_text())

    @property
    def reclaims(self) -> int:
        """How often the limit was met, so that the kernel took pages back."""
        return int((self._group / "memory.failcnt").read_text())

    @property
    def killed(self) -> int:
        """Processes that were ended for want of memory."""
        lines = (self._group / "memory.oom_control").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))

    def stat(self) -> dict[str, int]:
        """Bytes now, of anonymous memory, of page cache, and of swap."""
        lines = (self._group / "memory.stat").read_text().splitlines()
        found = {key: int(value) for key, value in (line.split() for line in lines)}
        return {key: found.get(key, 0) for key in ("rss", "cache", "swap")}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        with suppress(OSError):
            self._group.rmdir()
