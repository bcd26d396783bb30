"""Progress of loading, through which loading is also interrupted: by an alarm, or by a listener."""

from __future__ import annotations

from moeserve.comm.exchange.base import Alarm
from moeserve.errors import MoeserveError
from moeserve.observe.loading import ProgressCallback


class LoadProgress:
    """Called with bytes read and bytes in all, which it passes on. Raises what ``alarm`` gives, and
    whatever ``listener`` raises to stop the loading."""

    def __init__(self, listener: ProgressCallback, alarm: Alarm | None = None) -> None:
        self.over = False
        self.alarm = alarm
        self._listener = listener
        self._last = (0, 1)

    def __call__(self, done: int, total: int) -> None:
        if self.alarm is not None and (error := self.alarm()) is not None:
            raise error
        self._last = (done, total)
        self._listener(done, total)

    def checked(self, alarm: Alarm | None) -> MoeserveError | None:
        """What ``alarm`` gives, for whoever waits meanwhile; until loading is over it also asks the
        listener, who may raise."""
        if not self.over:
            self._listener(*self._last)
        return None if alarm is None else alarm()
