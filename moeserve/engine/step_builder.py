"""A step under construction: chunks of requests within a budget of tokens.

The scheduler decides who gets a chunk, in which order; what a chunk holds is decided here. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable

from moeserve.core import Chunk, RequestId, StepPlan
from moeserve.engine.sequence import SequenceState


class StepBuilder:
    """``budget`` tokens are left of the step; ``rank`` is the home of all that run in it.

    ``expired`` hit their deadline when the step began, ``preempted`` gave up their blocks for it.
    """

    def __init__(self, budget: int, rank: int, expired: Iterable[RequestId] = ()) -> None:
        self.budget = budget
        self.chunks: list[tuple[SequenceState, Chunk]] = []
        self.expired = tuple(expired)
        self.preempted: list[RequestId] = []
        self._rank = rank

    def add(self, seq: SequenceState, draft_ids: tuple[int, ...] = ()) -> None:
        """The sequence's next tokens, as many as the budget has room for.

        ``draft_ids`` follow the newest token, which must then be the only one to be computed.
        """
        length = len(seq)
        stop = min(length, seq.computed + self.budget)
        token_ids = seq.tokens(seq.computed, stop)
        if draft_ids:
            assert seq.generating, seq.request.id
            token_ids += draft_ids
        chunk = Chunk(
            request=seq.request,
            token_ids=token_ids,
            start=seq.computed,
            blocks=tuple(seq.blocks),
            samples=1 + len(draft_ids) if stop == length else 0,
            output_ids=seq.output_ids,
            rank=self._rank,
            reached=seq.reached,
        )
        self.chunks.append((seq, chunk))
        self.budget -= len(token_ids)
        assert self.budget >= 0, self.budget

    def plan(self, ended: tuple[RequestId, ...]) -> StepPlan:
        """The step as it will run."""
        chunks = tuple(chunk for _, chunk in self.chunks)
        return StepPlan(chunks, self.expired, tuple(self.preempted), ended)
