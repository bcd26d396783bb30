"""Which ranks are late, where the medium does not say: ranks that wait for long report it.

A report is ``[receives, blamed of each rank...]``: how many rounds its sender has begun to wait
for, or ``LEAVING``, and whom it blames then. A rank that waits is not late, even if it waits for a
round before or behind: some ranks have got what a rank sent before it fell silent, others have not.

Knows nothing of how reports travel.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

LEAVING = -1
# The part of a deadline after which a wait is long.
REPORT_AFTER = 0.1


class StragglerDetector:
    """What ``rank`` of ``world`` knows of the others, which may be a round of every lane apart.

    Not thread-safe: who has several threads guards it (``torch.ReportChannel`` does).
    """

    def __init__(self, rank: int, world: int, lanes: int) -> None:
        self._others = [r for r in range(world) if r != rank]
        self._world = world
        self._lanes = lanes
        self._receives = dict.fromkeys(self._others, -lanes - 1)
        self._disconnected: set[int] = set()
        self._left: set[int] = set()
        self._blamed: set[int] = set()

    def report(self, receives: int, blamed: Collection[int] = ()) -> list[int]:
        """What this rank sends to all others."""
        return [receives, *(int(r in blamed) for r in range(self._world))]

    def record(self, source: int, report: Sequence[int]) -> None:
        """The report of ``source`` has come."""
        if report[0] == LEAVING:
            self._left.add(source)
            self._blamed.update(r for r, blamed in enumerate(report[1:]) if blamed)
        else:
            self._receives[source] = max(self._receives[source], report[0])

    def disconnected(self, source: int) -> None:
        """The connection of ``source`` has ended, which is no failure where it left before."""
        if source not in self._left:
            self._disconnected.add(source)

    def missing_ranks(self, receives: int) -> list[int]:
        """Whom to blame, ascending: ranks that are disconnected, or blamed by ranks that left; else
        those that do not wait themselves; all others, if all wait and yet nothing comes."""
        known = (self._disconnected | self._blamed) & set(self._others)
        silent = [r for r in self._others if self._receives[r] < receives - self._lanes]
        return sorted(known) or silent or self._others
