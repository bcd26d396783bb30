"""What runs a planned step: the seam between decisions and tensors."""

from __future__ import annotations

from typing import Protocol

from moeserve.core import StepPlan, StepResult


class Executor(Protocol):
    """Local, simulated (``null``), later distributed."""

    def run(self, plan: StepPlan) -> StepResult:
        """Compute every chunk and sample where asked. Plans come in the scheduler's order."""
        ...
