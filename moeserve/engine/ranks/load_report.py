"""What this rank's scheduler puts into the rank's records: its load, and what it foresees."""

from __future__ import annotations

from collections.abc import Callable

from moeserve.engine.loop import EngineLock
from moeserve.engine.ranks.records import RankReport
from moeserve.engine.scheduler import Scheduler


class SchedulerLoad:
    """A ``lock_step.RankLoad``; ``queued`` is how many requests wait at this process's door.

    A rank that is to have no requests (``has_requests`` False) has no free blocks to show.
    """

    def __init__(
        self, scheduler: Scheduler, lock: EngineLock, *, has_requests: bool = True
    ) -> None:
        self._has_requests = has_requests
        self.queued: Callable[[], int] = lambda: 0
        self._scheduler = scheduler
        self._lock = lock

    def report(self) -> RankReport:
        scheduler, queued = self._scheduler, self.queued()
        with self._lock:
            foreseen = scheduler.foresee()
            return RankReport(
                # Who waits at the door needs the loads of another round.
                work=foreseen.tokens > 0 or queued > 0,
                decode=foreseen.decode_only,
                tokens=foreseen.tokens,
                running=scheduler.num_running,
                waiting=scheduler.num_waiting,
                held=scheduler.num_tokens,
                foreseen=scheduler.num_foreseen,
                free_blocks=scheduler.pool.num_free if self._has_requests else 0,
                queued=queued,
            )
