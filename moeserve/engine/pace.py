"""When the step loop has to run a step, and how it rests in between.

A process by itself steps while it has requests. A rank of several also steps when another rank has
some (``ranks.lock_step``), and may not leave while others need it.
"""

from __future__ import annotations

import threading
from typing import Protocol


class Pace(Protocol):
    """``wake`` may be called from any thread, the rest belongs to the engine's."""

    @property
    def due(self) -> bool:
        """Whether a step has to be run although this engine has no request for it."""
        ...

    def rest(self, timeout_s: float) -> None:
        """Wait until woken, or due, or for so long. Raises what ends the engine."""
        ...

    def wake(self) -> None:
        """End the rest that is under way, or else the next one."""
        ...

    def leave(self) -> bool:
        """This engine wants to end: whether it may. Until then its steps go on."""
        ...


class Alone:
    """The pace of a process by itself."""

    due = False

    def __init__(self) -> None:
        self._event = threading.Event()

    def rest(self, timeout_s: float) -> None:
        self._event.wait(timeout_s)
        self._event.clear()

    def wake(self) -> None:
        self._event.set()

    def leave(self) -> bool:
        return True
