"""What ranks agree on at each step, and that they live: the interface of the meshes.

A round is an all-gather of one record of fixed size from every rank. On one rank ``post`` and
``collect`` follow one another strictly; a rank that has posted nothing is idle, and hears of the
round that another one begins (``wait_begun``). The first alarm is the one that counts, on every
rank; after the end of the run there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from moeserve.errors import LateRankError


@dataclass(frozen=True, slots=True)
class MeshStats:
    """Counted where it happens (law 8): complete rounds; messages that carried records and their
    bytes, headers included, as sent by this rank; all other messages (heartbeats, words that go to
    all)."""

    rounds: int = 0
    round_messages: int = 0
    round_bytes: int = 0
    other_messages: int = 0
    other_bytes: int = 0


class StepMesh(Protocol):
    """One rank's end. ``post``, ``collect`` and ``wait_begun`` belong to the thread that runs the
    steps; everything else may be called by any thread."""

    rank: int
    world: int
    record_bytes: int

    @property
    def stats(self) -> MeshStats: ...

    @property
    def ended(self) -> bool:
        """Some rank has said that the run is over: connections may end."""
        ...

    @property
    def stop_asked(self) -> bool:
        """Some rank has to stop."""
        ...

    def post(self, record: bytes) -> None:
        """This rank's record, ``record_bytes`` long, for its next round. Never blocks."""
        ...

    def collect(self, timeout_s: float) -> bytes:
        """The records of the posted round in order of ranks, ``world * record_bytes`` long.

        LateRankError names who has not posted it in time; the alarm, as soon as there is one.
        UnavailableError where this rank's end is closed.
        """
        ...

    def wait_begun(self, timeout_s: float) -> bool:
        """True as soon as another rank has begun the round that this one has not posted; False
        after so long, for every ``wake``, and at once where there is an alarm or the end."""
        ...

    def wake(self) -> None:
        """End a ``wait_begun`` of this rank: the one that waits, or the next one."""
        ...

    def set_activity(self, text: str) -> None:
        """What this rank is doing, in a few words: what others say of it if it is lost."""
        ...

    def alarm(self) -> LateRankError | None:
        """Why the run cannot go on, if so: an ``exchange.Alarm``."""
        ...

    def fail(self, reason: str, ranks: Sequence[int]) -> None:
        """This rank cannot go on: an alarm on all ranks, which blames ``ranks`` of the run."""
        ...

    def end(self) -> None:
        """The run is over, and nobody is to blame."""
        ...

    def ask_to_stop(self) -> None:
        """This rank has to stop: all ranks hear of it, this one included."""
        ...

    def subscribe(
        self, on_alarm: Callable[[LateRankError], None], on_stop: Callable[[], None] | None = None
    ) -> None:
        """Call each once, when there is an alarm and when a rank has to stop: on a thread of the
        mesh, or at once, on this thread, for what has happened before."""
        ...

    def close(self) -> None:
        """This rank leaves, which is an alarm on the others unless the run has ended."""
        ...
