"""The mesh of a run's ranks: rounds of records, wake-ups, heartbeats and alarms.

Each rank is connected to those 2^i ahead of it and 2^i behind it, so that a round costs ceil(log2
R) messages a rank, and a heartbeat a constant number of them. All of it moves on a native thread
(``comm/mesh.cc``, which says how), which needs no interpreter: a rank whose interpreter is frozen
does not look dead, and a round overlaps whatever Python and kernels do meanwhile. Where there is no
native half its twin in Python does the same (``mesh_twin``).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence

from moeserve.comm.control.local_mesh import local_meshes
from moeserve.comm.control.mesh_twin import PythonMesh
from moeserve.comm.control.neighbours import Neighbours, connect_neighbours
from moeserve.comm.control.step_mesh import MeshStats, StepMesh
from moeserve.comm.control.subscribers import Subscribers
from moeserve.comm.group import GIVE_UP_S, START_S, Group, named
from moeserve.comm.native import native_half
from moeserve.errors import LateRankError, UnavailableError

# Ten beats in a deadline, and silence for eight: the alarm is everywhere before it has passed.
BEATS = 10
SILENT_BEATS = 8
LONGEST_PERIOD_S = 0.5
# How long a rank that does anything at all may take to answer.
_GRACE_S = 0.2
_LONGEST_S = 1e9
_SLICE_S = 0.25


class Mesh:
    """A ``StepMesh``. ``half`` moves the messages, on a thread of its own: ``_comm.Mesh`` or its
    twin. Owns it with its sockets, and a thread that calls subscribers."""

    def __init__(
        self,
        group: Group,
        neighbours: Neighbours,
        record_bytes: int,
        deadline_s: float,
        half: type[PythonMesh],
    ) -> None:
        self.rank = group.rank
        self.world = group.world
        self.record_bytes = record_bytes
        self._of_run = group.of_run
        self._alarm: LateRankError | None = None
        self._subscribers = Subscribers()
        self._listener: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._news, news = os.pipe()
        self._half = half(
            group.rank,
            [group.of_run(r) for r in range(group.world)],
            record_bytes,
            [stream.fileno() for stream in neighbours.dialled],
            [stream.fileno() for stream in neighbours.accepted],
            deadline_s * SILENT_BEATS / BEATS,
            min(deadline_s / BEATS, LONGEST_PERIOD_S),
            news,
        )
        os.close(news)  # of which the mesh has a copy
        for stream in (*neighbours.dialled, *neighbours.accepted):
            stream.detach()

    def meet(self, group: Group, timeout_s: float) -> None:
        """Wait until all ranks have come, by a round that is not counted; from then on silence is
        an alarm. Why another rank failed to come is asked of the notes first: those it leaves see
        only that it is gone."""
        deadline = time.monotonic() + timeout_s
        self._half.post(bytes(self.record_bytes))
        while self._half.collect(_ns(_SLICE_S)) is None:
            if (trouble := group.trouble()) is not None:
                raise trouble
            now = time.monotonic()
            if (alarm := self.alarm()) is not None:
                deadline = min(deadline, now + GIVE_UP_S)
                time.sleep(_SLICE_S)
            if now > deadline:
                late = list(map(self._of_run, self._half.missing()))
                raise alarm or LateRankError(
                    f"{named(late)} did not come within {timeout_s:g} s", late
                )
        self._half.watch()

    @property
    def stats(self) -> MeshStats:
        return MeshStats(*self._half.counters())

    @property
    def ended(self) -> bool:
        return bool(self._half.ended())

    @property
    def stop_asked(self) -> bool:
        return bool(self._half.stop_asked())

    def post(self, record: bytes) -> None:
        self._half.post(record)

    def collect(self, timeout_s: float) -> bytes:
        records: bytes | None = self._half.collect(_ns(timeout_s))
        if records is not None:
            return records
        absent: list[int] = []
        if self.alarm() is None and not self.ended:
            absent = self._half.absent(_ns(_GRACE_S))
            records = self._half.collect(0)
        if records is None:
            raise self._incomplete(absent, timeout_s)
        return records

    def _incomplete(self, absent: Sequence[int], timeout_s: float) -> UnavailableError:
        if (alarm := self.alarm()) is not None:
            return alarm
        number = self._half.posted()
        if self._closed:
            return UnavailableError(f"the mesh was closed while round {number} was open")
        late = list(map(self._of_run, absent or self._half.missing()))
        if self.ended:
            return LateRankError(f"the run ended before {named(late)} posted round {number}", late)
        return LateRankError(
            f"{named(late)} did not post round {number} within {timeout_s:g} s", late
        )

    def wait_begun(self, timeout_s: float) -> bool:
        return bool(self._half.wait_begun(_ns(timeout_s)))

    def wake(self) -> None:
        self._half.wake()

    def set_activity(self, text: str) -> None:
        self._half.set_activity(text)

    def alarm(self) -> LateRankError | None:
        if self._alarm is None and (found := self._half.alarm()) is not None:
            reason, ranks = found
            with self._lock:
                self._alarm = self._alarm or LateRankError(reason.decode(errors="replace"), ranks)
        return self._alarm

    def fail(self, reason: str, ranks: Sequence[int]) -> None:
        self._half.fail(reason, list(ranks))

    def end(self) -> None:
        self._half.end()

    def ask_to_stop(self) -> None:
        self._half.ask_to_stop()

    def subscribe(
        self, on_alarm: Callable[[LateRankError], None], on_stop: Callable[[], None] | None = None
    ) -> None:
        self._subscribers.add(on_alarm, on_stop)
        with self._lock:
            if self._listener is None and not self._closed:
                self._listener = threading.Thread(
                    target=self._listen, name="moeserve-alarm", daemon=True
                )
                self._listener.start()
        self._tell()

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._half.close()  # which writes to the pipe of news
        if self._listener not in (None, threading.current_thread()):
            self._listener.join()
        os.close(self._news)

    def _listen(self) -> None:
        while not self._closed:
            os.read(self._news, 64)
            self._tell()

    def _tell(self) -> None:
        self._subscribers.tell(self.alarm(), self.stop_asked)


def _ns(seconds: float) -> int:
    return int(min(max(seconds, 0.0), _LONGEST_S) * 1e9)


def open_mesh(
    group: Group,
    record_bytes: int,
    deadline_s: float,
    *,
    address: str | None = None,
    secret: bytes | None = None,
    key: str = "mesh",
    timeout_s: float = START_S,
) -> StepMesh:
    """Collective: every rank of the group opens its end at the same time.

    ``address`` is of the interface that peers reach; by default what the host's name means. A rank
    that is silent for most of ``deadline_s`` is an alarm. A rank that is alone needs no thread and
    no socket. ConfigError where another rank has another ``secret``; LateRankError names who did
    not come within ``timeout_s``. Ranks that fail say so to the others (``Group.give_up``), as
    everywhere while a run starts.
    """
    if group.world == 1:
        return local_meshes(1, record_bytes, deadline_s)[0]
    neighbours = connect_neighbours(group, key, address, secret, timeout_s)
    native, _ = native_half()
    half = getattr(native, "Mesh", PythonMesh)
    mesh = Mesh(group, neighbours, record_bytes, deadline_s, half)
    try:
        mesh.meet(group, timeout_s)
    except BaseException:  # goes on up; the thread must not stay
        mesh.close()
        raise
    return mesh
