"""Who is late, where the medium does not say: ranks that wait for long greet one another.

A greeting is ``[receives, blamed of each rank...]``: how many rounds the sender has begun to wait
for, -1 when it leaves, and whom it blames then. Whoever waits is not late, even if it waits for a
round before or behind: some ranks have got what a rank sent before it fell silent, others have not.

Knows nothing of how greetings travel.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

LEAVING = -1
# The part of a deadline after which a wait is long.
GREET_AFTER = 0.1


class StragglerDetector:
    """What a rank of ``world`` has heard of others, which may be a round of every lane apart."""

    def __init__(self, rank: int, world: int, lanes: int) -> None:
        self._others = [r for r in range(world) if r != rank]
        self._world = world
        self._lanes = lanes
        self._heard = dict.fromkeys(self._others, -lanes - 1)
        self._gone: set[int] = set()
        self._left: set[int] = set()
        self._blamed: set[int] = set()

    def greeting(self, receives: int, blamed: Collection[int] = ()) -> list[int]:
        return [receives, *(int(r in blamed) for r in range(self._world))]

    def receive_greeting(self, source: int, greeting: Sequence[int]) -> None:
        if greeting[0] == LEAVING:
            self._left.add(source)
            self._blamed.update(r for r, blamed in enumerate(greeting[1:]) if blamed)
        else:
            self._heard[source] = max(self._heard[source], greeting[0])

    def disconnected(self, source: int) -> None:
        """Its connection is gone; for one that left this is no news."""
        if source not in self._left:
            self._gone.add(source)

    def missing_ranks(self, receives: int) -> list[int]:
        """Whom to blame: gone, or blamed by those who left; else who does not wait, too. All
        others, if all wait and yet nothing comes."""
        known = (self._gone | self._blamed) & set(self._others)
        silent = [r for r in self._others if self._heard[r] < receives - self._lanes]
        return sorted(known) or silent or self._others
