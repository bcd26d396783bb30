"""What a scheduler asks others: who is admitted next, and how a sequence may go on. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from moeserve.core import Drafted, RequestId
from moeserve.engine.blocks import BlockPool
from moeserve.engine.sequence import SequenceState
from moeserve.engine.step_builder import StepBuilder
from moeserve.engine.waiting import WaitingQueue


class Admission(Protocol):
    """Chooses who is admitted next; None admits nobody in this step. ``spare`` blocks are to be
    left for each that runs when another one starts."""

    @property
    def spare(self) -> int: ...

    def begin(
        self,
        builder: StepBuilder,
        running: Collection[SequenceState],
        waiting: Mapping[RequestId, SequenceState],
        pool: BlockPool,
    ) -> None:
        """A step has its newest tokens, and nothing else yet: its budget may be lowered."""
        ...

    def pick(self, waiting: WaitingQueue, now: float) -> SequenceState | None: ...

    def victim(self, running: Collection[SequenceState]) -> SequenceState:
        """Which of those that run, in order of admission, gives up its blocks for the others: one
        of the least urgent; of the most urgent never the first, unless it is alone."""
        ...


class FirstComeFirstServed:
    """In order of arrival; preempted requests stand before those that never ran."""

    spare = 1

    def begin(
        self,
        builder: StepBuilder,
        running: Collection[SequenceState],
        waiting: Mapping[RequestId, SequenceState],
        pool: BlockPool,
    ) -> None: ...

    def pick(self, waiting: Mapping[RequestId, SequenceState], now: float) -> SequenceState | None:
        return next(iter(waiting.values()), None)

    def victim(self, running: Collection[SequenceState]) -> SequenceState:
        return last_admitted(running)


def last_admitted(running: Collection[SequenceState]) -> SequenceState:
    """Of the least urgent, the one that has waited for least time."""
    return max(reversed([*running]), key=lambda seq: seq.request.priority)


def most_tokens(seq: SequenceState, limit: int) -> int:
    """What an answer may have, where sequences end at ``limit``."""
    return min(seq.request.params.max_tokens, limit - len(seq.request.prompt_ids))


def room_of(running: Collection[SequenceState], pool: BlockPool) -> tuple[int, int]:
    """Blocks that those that run have or can have, and tokens of each that it shares: what several
    share is there once; blocks that are lent are in use by others."""
    named, used = sum(len(seq.blocks) for seq in running), pool.num_blocks - pool.num_free
    shared = max(0, named - used) * pool.block_size // max(1, len(running))
    return pool.num_free + min(named, used), shared


class Drafter(Protocol):
    """Guesses how sequences go on.

    Of a step that is to be run, ``to_make`` says how many guesses it shall make itself behind the
    tokens that it samples (``StepPlan.draft_next``); ``take`` gets them when it is over.
    """

    to_make: int = 0

    def awake(self, generating: int) -> bool:
        """Whether it is to be asked for the next step, in which so many generate; asked once for
        each. Where not, the step is one without drafts at no cost, and may be planned ahead."""
        return True

    def take(self, drafted: Sequence[Drafted], seconds: float) -> None:
        """A step is over; its guesses took so long. Called for each."""

    def propose(self, seqs: Sequence[SequenceState], beside: int) -> Sequence[Sequence[int]]:
        """For each that is generating: tokens that may follow its newest one, in order; any number
        of them. Nothing at all is fine too. ``beside`` tokens of prompts run in the same step."""
        ...
