"""How far a model is loaded: a bar on a terminal, lines in the log elsewhere."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import Progress

log = logging.getLogger("moeserve.loading")

ProgressCallback = Callable[[int, int], None]

# A line when so much more is read, but not sooner than this.
STEP = 0.1
EVERY_S = 2.0


class LoadLog:
    """Called with bytes read and bytes in all; says how far it is, and when all is read."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._said = 0.0  # of 1
        self._said_at = clock()
        self._complete = False

    def __call__(self, done: int, total: int) -> None:
        now, share = self._clock(), done / max(1, total)
        complete = done >= total > 0
        due = share - self._said >= STEP and now - self._said_at >= EVERY_S
        if self._complete or not (due or complete):
            return
        self._said, self._said_at, self._complete = share, now, complete
        log.info("loaded %.1f of %.1f MB (%d %%)", done / 1e6, total / 1e6, int(100 * share))


@contextlib.contextmanager
def shown_progress() -> Iterator[ProgressCallback]:
    """What to call as loading goes on. Both ways leave standard output free."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield LoadLog()
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("loading")
        yield lambda done, total: bar.update(task, completed=done, total=total)
