"""What runs a planned step: the seam between decisions and tensors."""

from __future__ import annotations

from typing import Protocol

from moeserve.core import StepPlan, StepResult


class Executor(Protocol):
    """Local, over ranks (``distributed``), simulated (``null``)."""

    def run(self, plan: StepPlan) -> StepResult:
        """Compute every chunk and sample where asked. Plans come in the scheduler's order.

        UnavailableError where no further step can be run; any other error ends only the requests
        of this one.
        """
        ...


class RankExecutor(Protocol):
    """What runs one rank's part of a step; all ranks run theirs together."""

    def run(self, plan: StepPlan, microbatches: int) -> StepResult:
        """An error means that this rank is out of step with the others."""
        ...
