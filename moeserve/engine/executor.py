"""What runs a planned step: the seam between decisions and tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from moeserve.core import StepPlan, StepResult


class Executor(Protocol):
    """One process's model (``model_runner``), a rank's part of it (``ranks.lock_step``), or, to
    check a scheduler, no model at all (``null``)."""

    def run(self, plan: StepPlan) -> StepResult | None:
        """Compute every chunk and sample where asked. Plans come in the scheduler's order. None
        where it turned out that there was no step to run.

        UnavailableError where no further step can be run; any other error ends only the requests
        of this one.
        """
        ...


@runtime_checkable
class StartingExecutor(Executor, Protocol):
    """One that runs steps while its caller does other things, as a device does."""

    def start(self, plan: StepPlan) -> None:
        """Queue a step behind those that were started; returns at once. At most one may be under
        way, and then the plan is one made ``ahead``: its tokens are filled in here."""
        ...

    def finish(self) -> StepResult:
        """The result of the oldest step that was started, when it is there; raises as ``run``
        does, and then the next one is still to be finished."""
        ...


class RankExecutor(Protocol):
    """What runs one rank's part of a step; all ranks run theirs together."""

    def run(self, plan: StepPlan, microbatches: int) -> StepResult:
        """An error means that this rank is out of step with the others."""
        ...


def count_accepted(draft_ids: Sequence[int], sampled_ids: Sequence[int]) -> int:
    """How many of ``sampled_ids`` are the request's tokens: all up to the first that is not the
    draft which stood there, with this one. ``sampled_ids`` has one more entry than ``draft_ids``,
    or none: token i was sampled as if the first i drafts were right."""
    for i, (draft_id, sampled_id) in enumerate(zip(draft_ids, sampled_ids, strict=False)):
        if draft_id != sampled_id:
            return i + 1
    return len(sampled_ids)
