"""A bound on how often the same thing is logged: what strangers cause must not fill a disk."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

BURST = 10
PERIOD_S = 60.0
MAX_KINDS = 256


@dataclass(slots=True)
class _Kind:
    """What came of one kind since ``began``."""

    began: float
    count: int = 0
    left_out: int = 0


class LogRate(logging.Filter):
    """Lets ``BURST`` messages of a kind (logger, level and text before its values) through in each
    ``PERIOD_S``; the first of the next period says how many were left out. On the loggers named
    between ``open`` and ``close``."""

    def __init__(self, loggers: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._loggers = [logging.getLogger(name) for name in loggers]
        self._clock = clock
        self._kinds: dict[tuple[str, int, str], _Kind] = {}

    def open(self) -> None:
        for logger in self._loggers:
            logger.addFilter(self)

    def close(self) -> None:
        for logger in self._loggers:
            logger.removeFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        now = self._clock()
        key = (record.name, record.levelno, str(record.msg)[:100])
        kind = self._kinds.get(key)
        if kind is None or now - kind.began >= PERIOD_S:
            if kind is None and len(self._kinds) >= MAX_KINDS:
                self._kinds.clear()
            left_out = 0 if kind is None else kind.left_out
            kind = self._kinds[key] = _Kind(now)
            if left_out:
                record.msg = f"{record.msg} (and {left_out} times before, not logged)"
        kind.count += 1
        if kind.count <= BURST:
            return True
        kind.left_out += 1
        return False
