"""Who wants to hear of an alarm and of a wish to stop, each of them once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from moeserve.errors import LateRankError


@dataclass(slots=True)
class _Subscription:
    on_alarm: Callable[[LateRankError], None] | None
    on_stop: Callable[[], None] | None


class Subscribers:
    """Callers of ``tell`` are the threads that handlers run on; no lock is held meanwhile."""

    def __init__(self) -> None:
        self._subscriptions: list[_Subscription] = []
        self._lock = threading.Lock()

    def add(
        self, on_alarm: Callable[[LateRankError], None], on_stop: Callable[[], None] | None
    ) -> None:
        with self._lock:
            self._subscriptions.append(_Subscription(on_alarm, on_stop))

    def tell(self, alarm: LateRankError | None, stop_asked: bool) -> None:
        """What there is to know now; whoever has heard it before is left alone."""
        due: list[Callable[[], None]] = []
        with self._lock:
            for one in self._subscriptions:
                if alarm is not None and one.on_alarm is not None:
                    due.append(partial(one.on_alarm, alarm))
                    one.on_alarm = None
                if stop_asked and one.on_stop is not None:
                    due.append(one.on_stop)
                    one.on_stop = None
        for call in due:
            call()
