"""Where threads that play ranks meet: twins of libraries between ranks exchange there what they
post. Every wait is bounded; InternalError names who came."""

from __future__ import annotations

import secrets
import threading
from typing import Any

from moeserve.errors import InternalError

MEETING_S = 60.0


class ThreadMeeting:
    """Of ``world`` threads, which call ``meet`` in the same order; ``name`` is no other's."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.name = secrets.token_hex(8)
        self._barrier = threading.Barrier(world)
        self._posted: dict[int, Any] = {}

    def meet(self, rank: int, post: Any) -> list[Any]:
        """What every rank posts, in their order."""
        self._posted[rank] = post
        try:
            self._barrier.wait(MEETING_S)
            found = [self._posted[r] for r in range(self.world)]
            self._barrier.wait(MEETING_S)
            del self._posted[rank]  # all have read it: what is left says who came to the next
        except threading.BrokenBarrierError as error:
            here = sorted(self._posted)
            raise InternalError(f"of {self.world} ranks only {here} called") from error
        return found

    def give_up(self) -> None:
        """Ranks that wait, now or later, get the error at once."""
        self._barrier.abort()
