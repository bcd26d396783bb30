"""The slow twin of ``comm/mesh.cc``, which explains the messages: the same ones, moved by Python.

It is the oracle of the native one, and stands in for it where there is no compiler; ranks of both
kinds may be of one run. A frozen interpreter, however, looks like a dead rank here.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence

from moeserve.comm.control.mesh_messages import (
    HEADER,
    LONGEST_ACTIVITY,
    QUESTION,
    Kind,
    ProtocolError,
    check_header,
    shortened,
)
from moeserve.comm.control.mesh_protocol import Inquiry, MeshProtocol, Stream
from moeserve.comm.control.silence import SilenceDetector

_TELL_AFTER_S = 0.001
_LINGER_S = 0.5
_CHUNK = 1 << 16


class PythonMesh(MeshProtocol):
    """As ``_comm.Mesh``, method for method. ``_changed`` guards everything of the protocol."""

    def __init__(
        self,
        rank: int,
        names: Sequence[int],
        record_bytes: int,
        dialled: Sequence[int],
        accepted: Sequence[int],
        limit_s: float,
        period_s: float,
        news: int,
    ) -> None:
        super().__init__(rank, names, record_bytes)
        self._limit_s, self._period_s = limit_s, period_s
        self._news = os.dup(news)
        for step, (ahead, behind) in enumerate(zip(dialled, accepted, strict=True)):
            for fd, distance in ((ahead, -(1 << step)), (behind, 1 << step)):
                stream = socket.socket(fileno=fd)
                stream.setblocking(False)
                self._streams.append(Stream(stream, self._back(distance), step, fd == ahead))
        self._woken = self._closing = False
        self._activity = b"starting"
        self._silence: SilenceDetector | None = None
        self._beat_at = self._close_by = 0.0
        self._event, self._kicker = socket.socketpair()
        for end in (self._event, self._kicker):
            end.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="moeserve-mesh", daemon=True)
        self._thread.start()

    def watch(self) -> None:
        with self._changed:
            self._first = self._posted
            self._counters = [0] * 5
            ranks = [stream.rank for stream in self._streams]
            self._silence = SilenceDetector.begin(
                ranks, time.monotonic(), self._limit_s, self._period_s
            )

    def post(self, record: bytes) -> None:
        if len(record) != self._record_bytes:
            raise ValueError("a record of another size")
        with self._changed:
            if self._posted != self._collected:
                raise RuntimeError("the last round was not collected")
            self._rounds[self._posted & 1] = self._new_round()  # for the round after this one
            self._posted += 1
            self._rounds[self._posted & 1].record_R[self._rank] = bytes(record)
            self._tell_at = time.monotonic() + (0.0 if self._was_idle else _TELL_AFTER_S)
            self._was_idle = False
            self._advance()
            self._kick()

    def collect(self, ns: int) -> bytes | None:
        with self._changed:
            if self._posted == self._collected:
                raise RuntimeError("no round was posted")
            round_ = self._rounds[self._posted & 1]
            self._wait(ns, lambda: round_.done or self._over() or self._cut_off())
            if not round_.done:
                return None
            self._collected = self._posted
            return b"".join(round_.record_R)

    def missing(self) -> list[int]:
        with self._changed:
            came = self._rounds[self._posted & 1].came
            steps = [step for step in range(self._steps) if step not in came]
            return sorted(rank for step in steps for rank in self._carried(step))

    def absent(self, ns: int) -> list[int]:
        with self._changed:
            sequence = self._inquiries.get(self._rank, Inquiry()).sequence + 1
            inquiry = self._inquiries[self._rank] = Inquiry(sequence, asked=True)
            self._flood(Kind.ASK, self._posted, QUESTION.pack(self._rank, sequence))
            self._kick()
            round_ = self._rounds[self._posted & 1]
            self._wait(ns, lambda: round_.done or self._over())
            return sorted(inquiry.absent)

    def wait_begun(self, ns: int) -> bool:
        with self._changed:
            self._was_idle = True
            self._wait(
                ns,
                lambda: self._begun > self._posted or self._woken or self._over() or self._ended,
            )
            if self._begun > self._posted and self._alarm is None:
                return True
            self._woken = False
            return False

    def wake(self) -> None:
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def set_activity(self, text: str) -> None:
        self._activity = shortened(text.encode(), LONGEST_ACTIVITY)

    def fail(self, reason: str, ranks: Sequence[int]) -> None:
        with self._changed:
            self._raise(reason.encode(), ranks)
            self._kick()

    def end(self) -> None:
        with self._changed:
            if self._alarm is None:
                self._conclude(None)
                self._kick()

    def ask_to_stop(self) -> None:
        with self._changed:
            self._stop(None)
            self._kick()

    def alarm(self) -> tuple[bytes, list[int]] | None:
        return self._alarm

    def ended(self) -> bool:
        return self._ended

    def stop_asked(self) -> bool:
        return self._stop_asked

    def posted(self) -> int:
        return self._posted - self._first

    def counters(self) -> list[int]:
        with self._changed:
            return list(self._counters)

    def close(self) -> None:
        with self._changed:
            if self._closing:
                return
            self._closing = True
            self._close_by = time.monotonic() + _LINGER_S
            self._changed.notify_all()
            self._tell_news()
            self._kick()
        self._thread.join()
        with self._changed:
            os.close(self._news)
            self._event.close()
            self._kicker.close()

    def _over(self) -> bool:
        return self._alarm is not None or self._closing

    def _wait(self, ns: int, ready: Callable[[], bool]) -> None:
        self._changed.wait_for(ready, min(ns / 1e9, threading.TIMEOUT_MAX))

    def _kick(self) -> None:
        with contextlib.suppress(OSError):  # full: it is raised already; closed: nobody is there
            self._kicker.send(b"k")

    def _tell_news(self) -> None:
        if self._thread.is_alive():
            os.write(self._news, b"n")

    def _run(self) -> None:
        while True:
            with self._changed:
                now = time.monotonic()
                due = self._tick(now)
                for stream in self._streams:
                    self._write(stream)
                waiting = [s for s in self._streams if s.open and s.out]
                if self._closing and (not waiting or now >= self._close_by):
                    break
                listening = [s for s in self._streams if s.open]
                timeout_s = max(0.0, min(due, self._close_by or due) - now)
            poll = select.poll()
            poll.register(self._event, select.POLLIN)
            for stream in listening:
                wanted = select.POLLIN | (select.POLLOUT if stream in waiting else 0)
                poll.register(stream.socket, wanted)
            ready = {fd for fd, found in poll.poll(timeout_s * 1000) if found != select.POLLOUT}
            with self._changed:
                with contextlib.suppress(BlockingIOError):
                    self._event.recv(_CHUNK)
                read = [(s, self._read(s)) for s in listening if s.socket.fileno() in ready]
                for stream, failure in read:
                    if failure:
                        self._lose(stream, failure)
        for stream in self._streams:
            with contextlib.suppress(OSError):
                stream.socket.shutdown(socket.SHUT_WR)
                stream.socket.recv(_CHUNK)  # what is unread would turn the end into a reset
            stream.socket.close()

    def _tick(self, now: float) -> float:
        """Whatever is due; when something will be next."""
        if now >= self._beat_at:
            self._beat_at = now + self._period_s
            for stream in self._streams:
                if not stream.out:
                    self._put(stream, Kind.BEAT, 0, self._activity)
        if self._silence is not None and not (self._ended or self._closing):
            for rank, silent_s in self._silence.late(now).items():
                self._blame(rank, f"has been silent for {silent_s:.1f} s")
        if self._tell_at is not None and now >= self._tell_at:
            self._tell_at = None
            self._tell_of(self._posted)
        return self._beat_at if self._tell_at is None else min(self._beat_at, self._tell_at)

    def _write(self, stream: Stream) -> None:
        while stream.open and stream.out:
            try:
                del stream.out[: stream.socket.send(stream.out)]
            except BlockingIOError:
                return
            except OSError:  # reading will tell why, after the last words
                stream.out.clear()

    def _read(self, stream: Stream) -> str:
        """Everything that has come; why the stream has ended, if it has."""
        failure = ""
        try:
            while data := stream.socket.recv(_CHUNK):
                stream.read += data
            failure = "the connection was closed"
        except BlockingIOError:
            pass
        except OSError as error:
            failure = error.strerror or str(error)
        if stream.read and self._silence is not None:
            self._silence.record(stream.rank, time.monotonic())
        try:
            while len(stream.read) >= HEADER.size:
                kind, length, number = HEADER.unpack_from(stream.read)
                if kind == Kind.ROUND and stream.dialled:
                    raise ProtocolError("records on a stream that has none")
                most = self._count(stream.step) * self._record_bytes
                check_header(kind, length, number, most, stream.round, self._posted)
                end = HEADER.size + length
                if len(stream.read) < end:
                    break
                body = bytes(stream.read[HEADER.size : end])
                del stream.read[:end]
                self._handle(stream, Kind(kind), number, body)
        except ProtocolError as error:
            failure = f"it sent {error}"
        return failure

    def _lose(self, stream: Stream, failure: str) -> None:
        stream.open = False
        stream.out.clear()
        with contextlib.suppress(OSError):
            stream.socket.shutdown(socket.SHUT_RDWR)
        if not self._closing:
            self._blame(stream.rank, f"is gone ({failure})")
        self._changed.notify_all()
