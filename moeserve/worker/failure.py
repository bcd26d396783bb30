"""What the loss of a rank leads to, decided in one place; and how a process leaves that failed."""

from __future__ import annotations

import logging
import os
import sys
import threading
from typing import NoReturn

from moeserve.errors import LateRankError

log = logging.getLogger("moeserve.worker")

# What a process gets to end by itself once the run has broken, beyond the deadline.
LAST_S = 15.0


class FailurePolicy:
    """Now: the run ends on all ranks, requests with UNAVAILABLE, every process with status 1.

    Whatever waits sees the same alarm by itself (exchange, orders, engine) and unwinds; should that
    get stuck, the process ends all the same.
    """

    def __init__(self, deadline_s: float) -> None:
        self.error: LateRankError | None = None
        self._limit_s = deadline_s + LAST_S

    def decide(self, error: LateRankError) -> None:
        """Called once, by the heartbeat that found the rank lost."""
        self.error = error
        log.critical("the run ends: %s", error.message)
        last = threading.Timer(self._limit_s, os._exit, (1,))
        last.daemon = True
        last.start()


def leave(status: int) -> NoReturn:
    """After a failure nothing is run at exit: MPI would wait there for ranks that are gone."""
    if status:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
