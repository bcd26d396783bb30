"""Requests that wait for their first step, or for their next one after a preemption, in order.

The lower a request's priority is, the earlier it stands. Of those with the same, first come those
that were preempted or have run elsewhere, the newest of them first; then those that came with their
KV, as they came; then those that never ran, as they came. Pure.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import islice, takewhile

from moeserve.core import RequestId
from moeserve.engine.sequence import SequenceState


class WaitingQueue(OrderedDict[RequestId, SequenceState]):
    """By id, whoever is next first."""

    def put(self, seq: SequenceState) -> None:
        """A request that comes."""
        if seq.output_ids and not seq.blocks:
            self.put_first(seq)
            return
        priority, with_kv = seq.request.priority, bool(seq.blocks)

        def goes_behind(other: SequenceState) -> bool:
            theirs = other.request.priority
            return theirs > priority or (theirs == priority and with_kv and _never_ran(other))

        behind = list(takewhile(goes_behind, reversed(self.values())))
        self[seq.request.id] = seq
        for other in reversed(behind):
            self.move_to_end(other.request.id)

    def put_first(self, seq: SequenceState) -> None:
        """One that was preempted, before all others of its priority."""
        priority = seq.request.priority
        before = list(takewhile(lambda other: other.request.priority < priority, self.values()))
        self[seq.request.id] = seq
        for other in (seq, *reversed(before)):
            self.move_to_end(other.request.id, last=False)

    def withdraw(self, count: int | None) -> list[SequenceState]:
        """Take out so many that may wait elsewhere as well, the first ones first; None is all."""
        movable = (request_id for request_id, seq in self.items() if not seq.stays)
        return [self.pop(request_id) for request_id in tuple(islice(movable, count))]

    def last_with_blocks(
        self,
        but: SequenceState | None = None,
        gains: Callable[[SequenceState], bool] = lambda seq: True,
    ) -> SequenceState | None:
        """The last one that has some, of those that ``gains`` is true of."""
        found = (s for s in reversed(self.values()) if s.blocks and s is not but and gains(s))
        return next(found, None)


def _never_ran(seq: SequenceState) -> bool:
    """Neither here nor elsewhere."""
    return not (seq.blocks or seq.output_ids or seq.admissions)
