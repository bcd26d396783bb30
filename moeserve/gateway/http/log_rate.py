"""A bound on how often the same thing is logged: what strangers cause must not fill a disk."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from moeserve.observe.log_bound import LogBound

BURST = 10
PERIOD_S = 60.0
MAX_KINDS = 256


class LogRate(logging.Filter):
    """Lets ``BURST`` messages of a kind (logger, level and text before its values) through in each
    ``PERIOD_S``; the first of the next period says how many were left out. On the loggers named
    between ``open`` and ``close``."""

    def __init__(self, loggers: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._loggers = [logging.getLogger(name) for name in loggers]
        self._clock = clock
        self._kinds: dict[tuple[str, int, str], LogBound] = {}

    def open(self) -> None:
        for logger in self._loggers:
            logger.addFilter(self)

    def close(self) -> None:
        for logger in self._loggers:
            logger.removeFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        key = (record.name, record.levelno, str(record.msg)[:100])
        bound = self._kinds.get(key)
        if bound is None:
            if len(self._kinds) >= MAX_KINDS:
                self._kinds.clear()
            bound = self._kinds[key] = LogBound(BURST, PERIOD_S, self._clock)
        if not bound.admits():
            return False
        if left_out := bound.take_left_out():
            record.msg = f"{record.msg} (and {left_out} times before, not logged)"
        return True
