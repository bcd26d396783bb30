"""Files that are read again when they change, while what they say is in use."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from moeserve.errors import ConfigError

log = logging.getLogger(__name__)

LOOK_S = 1.0

_Stamp = tuple[tuple[int, int, int] | None, ...]


class FileWatch:
    """Calls ``reread`` when one of ``files`` is another than it was. Where that raises ConfigError
    the log says so, once for each change, and what was read before stays in use."""

    def __init__(self, files: Sequence[Path], reread: Callable[[], None]) -> None:
        self._files = tuple(files)
        self._reread = reread
        self._stamp = self._look()

    async def watch(self) -> None:
        """Looks until it is cancelled; on threads, since files may lie on other machines."""
        while True:
            await asyncio.sleep(LOOK_S)
            await asyncio.to_thread(self.look)

    def look(self) -> None:
        stamp = self._look()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        names = ", ".join(str(file) for file in self._files)
        try:
            self._reread()
        except ConfigError as error:
            log.error("%s changed, and what was read before stays in use: %s", names, error.message)
        else:
            log.info("read again: %s", names)

    def _look(self) -> _Stamp:
        return tuple(_stamp_of(file) for file in self._files)


def _stamp_of(file: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
