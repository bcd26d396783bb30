"""What a rank is doing at the moment: for ranks that wait for it, and for a timeline."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from moeserve.core import StepPlan
from moeserve.observe.choices import kind_of, said
from moeserve.observe.timeline import Timeline


class Progress:
    """Written by the thread that runs steps; any other may take ``str``, which is of one moment.
    As a context manager it completes the timeline in the end."""

    def __init__(self, timeline: Timeline | None = None) -> None:
        self._timeline = timeline
        # One tuple, replaced as a whole: (activity, layer or -1 for none, lane).
        self._now = ("nothing yet", -1, 0)

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
        activity, layer, lane = self._now
        return activity if layer < 0 else f"{activity} in layer {layer}, microbatch {lane}"

    def at(self, layer: int, lane: int) -> None:
        """Work on this layer of this microbatch begins or goes on."""
        self._now = (self._now[0], layer, lane)

    def begin(self, activity: str) -> None:
        """What the work is, from now on; what went on before has ended."""
        _, layer, lane = self._now
        self._now = (activity, layer, lane)
        if self._timeline is not None:
            self._timeline.begin(activity, layer, lane)

    def pause(self) -> None:
        """The work so far is done; another's may begin."""
        if self._timeline is not None:
            self._timeline.end()

    def rest(self) -> None:
        """The step is over."""
        self.pause()
        self._now = ("between steps", -1, self._now[2])

    @property
    def drawn(self) -> bool:
        """Whether there is a timeline."""
        return self._timeline is not None

    def on_step(self, plan: StepPlan, seconds: float) -> None:
        """One is over: it is drawn, with why it had its shape."""
        if self._timeline is not None:
            self._timeline.step(kind_of(plan.choice), seconds, said(plan.choice))
