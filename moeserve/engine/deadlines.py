"""When the earliest of many deadlines comes, so that nobody is looked at before. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable

from moeserve.engine.sequence import SequenceState


class Deadlines:
    """Of the requests that were noted; nobody's is before ``earliest``."""

    def __init__(self) -> None:
        self.earliest = math.inf

    def note(self, seq: SequenceState) -> None:
        if seq.request.deadline is not None:
            self.earliest = min(self.earliest, seq.request.deadline)

    def take_late(self, seqs: Iterable[SequenceState], now: float) -> list[SequenceState]:
        """Those of all requests whose deadline has come; the others are noted anew."""
        late: list[SequenceState] = []
        self.earliest = math.inf
        for seq in seqs:
            if seq.late(now):
                late.append(seq)
            else:
                self.note(seq)
        return late
