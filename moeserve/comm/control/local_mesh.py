"""Ranks that are threads of one process: what ``mesh`` is, without sockets.

Nothing is sent: what ranks have said lies in one place under one lock. A thread cannot be dead or
silent, so that only ``fail`` and a rank that leaves before the end are alarms.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from moeserve.comm.control.step_mesh import MeshStats
from moeserve.comm.control.subscribers import Subscribers
from moeserve.comm.group import named
from moeserve.errors import LateRankError, UnavailableError


@dataclass(slots=True)
class _Common:
    """What all ranks know; guarded by ``changed``."""

    world: int
    changed: threading.Condition = field(default_factory=threading.Condition)
    # By round, those that are not complete on every rank: records by rank.
    records_of: dict[int, dict[int, bytes]] = field(default_factory=dict)
    posted_R: list[int] = field(default_factory=list)
    collected_R: list[int] = field(default_factory=list)
    activity_R: list[str] = field(default_factory=list)
    closed_R: list[bool] = field(default_factory=list)
    alarm: LateRankError | None = None
    ended: bool = False
    stop_asked: bool = False


def local_meshes(world: int, record_bytes: int, deadline_s: float) -> list[LocalMesh]:
    """One for each rank. ``deadline_s`` is for the signature's sake: no thread falls silent."""
    del deadline_s
    common = _Common(
        world,
        posted_R=[0] * world,
        collected_R=[0] * world,
        activity_R=["starting"] * world,
        closed_R=[False] * world,
    )
    return [LocalMesh(rank, record_bytes, common) for rank in range(world)]


class LocalMesh:
    """A ``StepMesh``; ``local_meshes`` makes those of all ranks."""

    def __init__(self, rank: int, record_bytes: int, common: _Common) -> None:
        self.rank = rank
        self.world = common.world
        self.record_bytes = record_bytes
        self._common = common
        self._woken = False
        self._heard = (False, False)
        self._subscribers = Subscribers()
        self._listener: threading.Thread | None = None

    @property
    def stats(self) -> MeshStats:
        """Rounds alone: no message is sent."""
        with self._common.changed:
            return MeshStats(rounds=self._common.collected_R[self.rank])

    @property
    def ended(self) -> bool:
        return self._common.ended

    @property
    def stop_asked(self) -> bool:
        return self._common.stop_asked

    def post(self, record: bytes) -> None:
        common = self._common
        assert len(record) == self.record_bytes, "a record of another size"
        with common.changed:
            number = common.posted_R[self.rank] + 1
            assert common.collected_R[self.rank] == number - 1, "the last round was not collected"
            common.posted_R[self.rank] = number
            common.records_of.setdefault(number, {})[self.rank] = record
            common.changed.notify_all()

    def collect(self, timeout_s: float) -> bytes:
        common = self._common
        with common.changed:
            number = common.posted_R[self.rank]
            assert common.collected_R[self.rank] == number - 1, "no round was posted"
            records = common.records_of[number]

            def decided() -> bool:
                complete = len(records) == self.world
                return complete or common.alarm is not None or self._closed or cut_off()

            def cut_off() -> bool:
                left = [r for r in range(self.world) if common.closed_R[r]]
                return common.ended and any(r not in records for r in left)

            common.changed.wait_for(decided, timeout_s)
            if len(records) < self.world:
                raise self._incomplete(number, timeout_s)
            common.collected_R[self.rank] = number
            if min(common.collected_R) >= number:
                del common.records_of[number]
            return b"".join(records[rank] for rank in range(self.world))

    def _incomplete(self, number: int, timeout_s: float) -> UnavailableError:
        common = self._common
        if common.alarm is not None:
            return common.alarm
        if self._closed:
            return UnavailableError(f"the mesh was closed while round {number} was open")
        late = [rank for rank, posted in enumerate(common.posted_R) if posted < number]
        if common.ended:
            return LateRankError(f"the run ended before {named(late)} posted round {number}", late)
        return LateRankError(
            f"{named(late)} did not post round {number} within {timeout_s:g} s", late
        )

    def wait_begun(self, timeout_s: float) -> bool:
        common = self._common

        def begun() -> bool:
            return max(common.posted_R) > common.posted_R[self.rank]

        def decided() -> bool:
            over = common.alarm is not None or common.ended or self._closed
            return begun() or self._woken or over

        with common.changed:
            common.changed.wait_for(decided, timeout_s)
            if begun() and common.alarm is None:
                return True
            self._woken = False
            return False

    def wake(self) -> None:
        with self._common.changed:
            self._woken = True
            self._common.changed.notify_all()

    def set_activity(self, text: str) -> None:
        self._common.activity_R[self.rank] = text

    def alarm(self) -> LateRankError | None:
        return self._common.alarm

    def fail(self, reason: str, ranks: Sequence[int]) -> None:
        with self._common.changed:
            if self._common.alarm is None and not self._common.ended:
                self._common.alarm = LateRankError(reason, ranks)
                self._common.changed.notify_all()

    def end(self) -> None:
        with self._common.changed:
            if self._common.alarm is None:
                self._common.ended = True
                self._common.changed.notify_all()

    def ask_to_stop(self) -> None:
        with self._common.changed:
            self._common.stop_asked = True
            self._common.changed.notify_all()

    def subscribe(
        self, on_alarm: Callable[[LateRankError], None], on_stop: Callable[[], None] | None = None
    ) -> None:
        self._subscribers.add(on_alarm, on_stop)
        with self._common.changed:
            if self._listener is None and not self._closed:
                self._listener = threading.Thread(
                    target=self._listen, name="moeserve-alarm", daemon=True
                )
                self._listener.start()
        self._tell()

    def close(self) -> None:
        common, rank = self._common, self.rank
        if not self._closed:
            doing = f"rank {rank} was last heard doing: {common.activity_R[rank]}"
            self.fail(f"rank {rank} is gone (it left); {doing}", [rank])
        with common.changed:
            common.closed_R[rank] = True
            common.changed.notify_all()
        if self._listener not in (None, threading.current_thread()):
            self._listener.join()

    @property
    def _closed(self) -> bool:
        return self._common.closed_R[self.rank]

    def _news(self) -> tuple[bool, bool]:
        return self._common.alarm is not None, self._common.stop_asked

    def _listen(self) -> None:
        changed = self._common.changed
        while not self._closed:
            with changed:
                changed.wait_for(lambda: self._closed or self._news() != self._heard)
                self._heard = self._news()
            self._tell()

    def _tell(self) -> None:
        self._subscribers.tell(self.alarm(), self.stop_asked)
