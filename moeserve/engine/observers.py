"""Several observers of one engine as one."""

from __future__ import annotations

from collections.abc import Mapping

from moeserve.core import FinishReason, StepPlan, Timing
from moeserve.engine.loop import EngineObserver


class BothObservers:
    """Tells the first, then the second."""

    def __init__(self, first: EngineObserver, second: EngineObserver) -> None:
        self._pair = first, second

    def on_step(self, plan: StepPlan, seconds: float) -> None:
        for one in self._pair:
            one.on_step(plan, seconds)

    def on_gaps(self, gaps: Mapping[float, int]) -> None:
        for one in self._pair:
            one.on_gaps(gaps)

    def on_first_token(self, timing: Timing) -> None:
        for one in self._pair:
            one.on_first_token(timing)

    def on_finish(self, reason: FinishReason, timing: Timing) -> None:
        for one in self._pair:
            one.on_finish(reason, timing)


def beside(first: EngineObserver, second: EngineObserver | None) -> EngineObserver:
    """Both as one, or the first alone."""
    return first if second is None else BothObservers(first, second)
