"""Heartbeats: every rank knows that the others live and what they were last doing.

Each rank sends to rank 0, and rank 0 to all others what all are doing, on a thread of its own in
each process. A rank that is silent for too long, whose connection ends, or that reports trouble, is
an alarm on every rank: the one error that ``alarm`` returns from then on, naming who is to blame.
What an alarm leads to is decided by the subscriber (``subscribe``), which is called once.

Any thread may call any method. ``_lock`` guards the alarm, the end, the subscriber and sending.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from google.protobuf.message import DecodeError

from moeserve.comm.control.link import Link
from moeserve.comm.control.silence import SilenceDetector
from moeserve.errors import LateRankError
from moeserve.pb import ep_pb2 as pb

# Ten beats in a deadline, and silence for eight: the alarm is everywhere before it has passed.
BEATS = 10
SILENT_BEATS = 8
LONGEST_PERIOD_S = 0.5
SEND_S = 0.5


def _idle() -> str:
    return "starting"


class Heartbeat:
    """Owns the links ``link_of``: rank 0's to all others, or another rank's to rank 0.

    ``activity`` says in a few words what this rank is doing; it may be replaced at any time.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        link_of: Mapping[int, Link],
        deadline_s: float,
    ) -> None:
        self.activity: Callable[[], str] = _idle
        self._on_alarm: Callable[[LateRankError], None] | None = None
        self._on_stop: Callable[[], None] | None = None
        self._stop_asked = False
        self._rank = rank
        self._links = dict(link_of)
        self._activities = ["nothing yet"] * world
        self._limit_s = deadline_s * SILENT_BEATS / BEATS
        self._period_s = min(deadline_s / BEATS, LONGEST_PERIOD_S)
        self._silence = SilenceDetector.begin(
            link_of, time.monotonic(), self._limit_s, self._period_s
        )
        self._alarm: LateRankError | None = None
        self._alarmed = threading.Event()
        self._ended = False
        self._lock = threading.Lock()
        self._wake, self._waker = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="moeserve-heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def subscribe(
        self, on_alarm: Callable[[LateRankError], None], on_stop: Callable[[], None] | None = None
    ) -> None:
        """Call ``on_alarm`` once, when there is an alarm, and on rank 0 ``on_stop`` for every rank
        that asks to stop: on the heartbeat's thread, or at once for what has happened before."""
        with self._lock:
            self._on_alarm, self._on_stop = on_alarm, on_stop
            alarm, stop_asked = self._alarm, self._stop_asked
        if alarm is not None:
            on_alarm(alarm)
        if stop_asked and on_stop is not None:
            on_stop()

    def alarm(self) -> LateRankError | None:
        """Why the run cannot go on, if so: an ``exchange.Alarm``."""
        return self._alarm

    @property
    def ended(self) -> bool:
        """Rank 0 has ended the run."""
        return self._ended

    def activity_of(self, ranks: Sequence[int]) -> str:
        """What these ranks were doing by their last heartbeat."""
        return "; ".join(
            f"rank {rank} was last heard doing: {self._activities[rank]}" for rank in ranks
        )

    def blame(self, rank: int, reason: str) -> LateRankError:
        """The alarm; where there is none shortly, one that names ``rank``."""
        if not self._alarmed.wait(self._period_s):
            self._raise(f"rank {rank} {reason}; {self.activity_of([rank])}", [rank])
        assert self._alarm is not None
        return self._alarm

    def fail(self, reason: str, ranks: Sequence[int]) -> None:
        """This rank cannot go on: an alarm on all ranks."""
        self._raise(reason, ranks)

    def ask_to_stop(self) -> None:
        """This rank has to stop: rank 0 is to drain and end the run."""
        self._send_all(pb.Heartbeat(stop=pb.Stop()))

    def end(self) -> None:
        """On rank 0: the run is over, and nobody is to blame."""
        with self._lock:
            if self._alarm is not None:
                return
            self._ended = True
        self._send_all(pb.Heartbeat(end=pb.End()))

    def close(self) -> None:
        self._ended = True
        self._waker.close()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(SEND_S + 2 * self._period_s)
        self._wake.close()
        for link in self._links.values():
            link.close()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake, selectors.EVENT_READ, None)
            for rank, link in self._links.items():
                selector.register(link.socket, selectors.EVENT_READ, rank)
            beat_at = time.monotonic()
            while self._alarm is None and not self._ended:
                now = time.monotonic()
                if now >= beat_at:
                    self._beat()
                    beat_at = now + self._period_s
                for key, _ in selector.select(max(0.0, beat_at - now)):
                    if key.data is not None:
                        self._read(key.data)
                if self._alarm is None and not self._ended:
                    self._check_silence()

    def _beat(self) -> None:
        self._activities[self._rank] = self.activity()
        known = self._activities if self._rank == 0 else [self._activities[self._rank]]
        self._send_all(pb.Heartbeat(beat=pb.Beat(activity=known)))

    def _read(self, rank: int) -> None:
        link = self._links[rank]
        try:
            link.read_some()
            while (message := link.ready()) is not None:
                self._silence.record(rank, time.monotonic())
                self._handle(rank, pb.Heartbeat.FromString(message))
        except (OSError, DecodeError) as error:
            if not self._ended:
                self._raise(f"rank {rank} is gone ({error}); {self.activity_of([rank])}", [rank])

    def _handle(self, rank: int, heartbeat: pb.Heartbeat) -> None:
        if heartbeat.HasField("beat"):
            if rank == 0:
                self._activities[:] = list(heartbeat.beat.activity)
            else:
                self._activities[rank] = heartbeat.beat.activity[0]
        elif heartbeat.HasField("trouble"):
            self._raise(heartbeat.trouble.reason, heartbeat.trouble.ranks)
        elif heartbeat.HasField("end"):
            self._ended = True
        elif heartbeat.HasField("stop"):
            with self._lock:
                self._stop_asked = True
                on_stop = self._on_stop
            if on_stop is not None:
                on_stop()

    def _check_silence(self) -> None:
        for rank, silent_s in self._silence.late(time.monotonic()).items():
            activity = self.activity_of([rank])
            self._raise(f"rank {rank} has been silent for {silent_s:.1f} s; {activity}", [rank])

    def _raise(self, reason: str, ranks: Sequence[int]) -> None:
        """The first alarm is the one that counts; it goes to all ranks and to the subscriber."""
        with self._lock:
            if self._alarm is not None or self._ended:
                return
            self._alarm = LateRankError(reason, list(ranks))
            self._alarmed.set()
            on_alarm = self._on_alarm
        self._send_all(pb.Heartbeat(trouble=pb.Trouble(reason=reason, ranks=ranks)))
        if on_alarm is not None:
            on_alarm(self._alarm)

    def _send_all(self, heartbeat: pb.Heartbeat) -> None:
        """A link that fails here is met again by reading, or by silence."""
        message = heartbeat.SerializeToString()
        with self._lock:
            for link in self._links.values():
                with contextlib.suppress(OSError):
                    link.send(message, SEND_S)
