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

Line = OrderedDict[RequestId, SequenceState]


class WaitingQueue(Line):
    """By id, whoever is next first."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: dict[tuple[int, str], Line] = {}  # of each priority and tenant

    def heads(self) -> list[SequenceState]:
        """The first ones of each priority and tenant."""
        return [next(iter(line.values())) for line in self._lines.values()]

    def put(self, seq: SequenceState) -> None:
        """A request that comes."""
        if seq.output_ids and not seq.blocks:
            self.put_first(seq)
            return
        priority, with_kv = seq.request.priority, bool(seq.blocks)

        def goes_behind(other: SequenceState) -> bool:
            theirs = other.request.priority
            return theirs > priority or (theirs == priority and with_kv and _never_ran(other))

        for line in (self, self._line_of(seq)):
            behind = list(takewhile(goes_behind, reversed(line.values())))
            line[seq.request.id] = seq
            for other in reversed(behind):
                line.move_to_end(other.request.id)

    def put_first(self, seq: SequenceState) -> None:
        """One that was preempted, before all others of its priority."""
        priority = seq.request.priority
        before = list(takewhile(lambda other: other.request.priority < priority, self.values()))
        self[seq.request.id] = seq
        for other in (seq, *reversed(before)):
            self.move_to_end(other.request.id, last=False)
        line = self._line_of(seq)
        line[seq.request.id] = seq
        line.move_to_end(seq.request.id, last=False)

    def take(self, request_id: RequestId) -> SequenceState | None:
        """Out of the queue; None if it is not there."""
        seq = self.pop(request_id, None)
        if seq is not None:
            place = (seq.request.priority, seq.request.tenant)
            line = self._lines[place]
            del line[request_id]
            if not line:
                del self._lines[place]
        return seq

    def withdraw(self, count: int | None) -> list[SequenceState]:
        """Take out so many that may wait elsewhere as well, the first ones first; None is all."""
        movable = (request_id for request_id, seq in self.items() if not seq.stays)
        found = map(self.take, tuple(islice(movable, count)))
        return [seq for seq in found if seq is not None]

    def last_with_blocks(
        self,
        but: SequenceState | None = None,
        gains: Callable[[SequenceState], bool] = lambda seq: True,
    ) -> SequenceState | None:
        """The last one that has some, of those that ``gains`` is true of."""
        found = (s for s in reversed(self.values()) if s.blocks and s is not but and gains(s))
        return next(found, None)

    def _line_of(self, seq: SequenceState) -> Line:
        return self._lines.setdefault((seq.request.priority, seq.request.tenant), OrderedDict())


def _never_ran(seq: SequenceState) -> bool:
    """Neither here nor elsewhere."""
    return not (seq.blocks or seq.output_ids or seq.admissions)
