"""What ranks publish of their load with every step, and what follows from it on every rank alike.

Each rank's row describes it as it is once a step is planned: requests that this plan admitted run,
those it had no room for wait. All ranks and all doors get the same table, so whatever is a function
of it needs no further talk: how much room a rank has, and which ranks give waiting requests back to
their doors because another rank is free (``surplus``).

Letters at the end of names are shapes: R ranks. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeserve.engine.bounds import SchedulerConfig

I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RankLoads:
    """The loads of all ranks when they had planned step ``step``.

    Of each rank: requests that run, where those may be left out that are sure to end with this step
    (their last token is under way), and requests that wait there (never begun, or preempted);
    ``held`` tokens of the running ones, computed or not; ``foreseen`` tokens that they will have in
    the step after, as far as can be told; blocks that nobody holds. ``queued`` requests wait at the
    door in that rank's process, if it has one, and have no home yet.
    """

    step: int
    running_R: I64
    waiting_R: I64
    held_R: I64
    foreseen_R: I64
    free_blocks_R: I64
    queued_R: I64

    @classmethod
    def idle(cls, free_blocks_R: I64) -> RankLoads:
        """Before the first step."""
        nothing = (np.zeros(len(free_blocks_R), np.int64) for _ in range(5))
        running, waiting, held, foreseen, queued = nothing
        return cls(0, running, waiting, held, foreseen, free_blocks_R, queued)


# A round's table, made when it is asked for: most rounds nobody does.
LoadsOfRound = Callable[[], RankLoads]


@dataclass(frozen=True, slots=True)
class Room:
    """What ranks have left, as far as a table shows.

    ``slots`` more requests may run. ``budget`` is what running requests leave of the tokens of a
    step. ``blocks`` are free beyond the one that each running request may need to grow. A rank
    takes a request where its blocks fit and the other two are positive (``Scheduler.has_room``).
    """

    slots_R: I64
    budget_R: I64
    blocks_R: I64

    @property
    def free_R(self) -> I64:
        """Slots that can be taken in the next step."""
        return np.where((self.budget_R > 0) & (self.blocks_R > 0), np.maximum(self.slots_R, 0), 0)


def room_of(loads: RankLoads, config: SchedulerConfig) -> Room:
    """Requests that wait at a rank go before any that is sent there: they count as running."""
    present_R = loads.running_R + loads.waiting_R
    return Room(
        config.max_num_seqs - present_R,
        config.max_num_batched_tokens - loads.foreseen_R - loads.waiting_R,
        loads.free_blocks_R - present_R,
    )


def surplus(loads: RankLoads, config: SchedulerConfig) -> I64:
    """How many of its waiting requests each rank is to give back to their doors, first those that
    wait there longest.

    As many in all as there are slots free on ranks where nobody waits, for they came before those
    that have no home yet; ranks give in order of their numbers.
    """
    if not loads.waiting_R.any():
        return np.zeros_like(loads.waiting_R)
    free_R = np.where(loads.waiting_R > 0, 0, room_of(loads, config).free_R)
    before_R = np.cumsum(loads.waiting_R) - loads.waiting_R
    give_R: I64 = np.clip(free_R.sum() - before_R, 0, loads.waiting_R)
    return give_R
