"""Requests that wait for their first step, or for their next one after a preemption, in order.

First those that were preempted or have run elsewhere, the newest of them first; then those that
came with their KV, as they came; then those that never ran, as they came. Pure.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice, takewhile

from moeserve.core import RequestId
from moeserve.engine.sequence import SequenceState


class WaitingQueue(OrderedDict[RequestId, SequenceState]):
    """By id, whoever is next first."""

    def put(self, seq: SequenceState) -> None:
        """A request that comes."""
        never_ran = list(takewhile(_never_ran, reversed(self.values()))) if seq.blocks else []
        self[seq.request.id] = seq
        for other in reversed(never_ran):
            self.move_to_end(other.request.id)
        if seq.output_ids and not seq.blocks:
            self.move_to_end(seq.request.id, last=False)

    def put_first(self, seq: SequenceState) -> None:
        """One that was preempted."""
        self[seq.request.id] = seq
        self.move_to_end(seq.request.id, last=False)

    def withdraw(self, count: int | None) -> list[SequenceState]:
        """Take out so many that may wait elsewhere as well, the first ones first; None is all."""
        movable = (request_id for request_id, seq in self.items() if not seq.stays)
        return [self.pop(request_id) for request_id in tuple(islice(movable, count))]

    def last_with_blocks(self, but: SequenceState | None = None) -> SequenceState | None:
        """The last one that has some."""
        found = (s for s in reversed(self.values()) if s.blocks and s is not but)
        return next(found, None)


def _never_ran(seq: SequenceState) -> bool:
    """Neither here nor elsewhere."""
    return not (seq.blocks or seq.output_ids or seq.admissions)
