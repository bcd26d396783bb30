"""What a rank is doing, said while it does it: for ranks that wait for it, and for a timeline."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from moeserve.observe.timeline import Timeline


class Progress:
    """Written by the thread that runs steps; ``str`` may be read by any other. ``with`` it to have
    the timeline complete in the end."""

    def __init__(self, timeline: Timeline | None = None) -> None:
        self._timeline = timeline
        self._layer = -1
        self._lane = 0
        self._doing = "nothing yet"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._timeline is not None:
            self._timeline.close()

    def __str__(self) -> str:
        if self._layer < 0:
            return self._doing
        return f"{self._doing} in layer {self._layer}, microbatch {self._lane}"

    def at(self, layer: int, lane: int) -> None:
        """Whose work begins or goes on."""
        self._layer, self._lane = layer, lane

    def begin(self, doing: str) -> None:
        self._doing = doing
        if self._timeline is not None:
            self._timeline.begin(doing, self._layer, self._lane)

    def pause(self) -> None:
        """The work so far is done; another's may begin."""
        if self._timeline is not None:
            self._timeline.end()

    def rest(self) -> None:
        """The step is over."""
        self.pause()
        self._layer, self._doing = -1, "between steps"
