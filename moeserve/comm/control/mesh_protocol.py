"""What a rank of the mesh does with a message: the rounds, the words that go to all, the questions.

No thread and no clock: ``mesh_twin`` reads and writes the streams. Bruck's algorithm and why two
sets of records suffice are explained in ``comm/mesh.cc``.
"""

from __future__ import annotations

import socket
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from moeserve.comm.control.mesh_messages import (
    ANSWER,
    HEADER,
    LONGEST_REASON,
    MOST_BLAMED,
    QUESTION,
    Kind,
    ProtocolError,
    shortened,
)


@dataclass(slots=True, eq=False)
class Stream:
    socket: socket.socket
    rank: int
    step: int
    dialled: bool
    open: bool = True
    activity: bytes = b"nothing yet"
    out: bytearray = field(default_factory=bytearray)
    read: bytearray = field(default_factory=bytearray)
    round: int = 0
    begun: int = 0


@dataclass(slots=True)
class _Round:
    record_R: list[bytes]
    came: set[int] = field(default_factory=set)
    sent: int = 0
    done: bool = False


@dataclass(slots=True)
class Inquiry:
    sequence: int = 0
    asked: bool = False
    absent: set[int] = field(default_factory=set)


class MeshProtocol(ABC):
    """One rank's state. ``_streams`` are, for each step, the dialled one and the accepted one;
    whoever holds ``_changed`` may call anything."""

    def __init__(self, rank: int, names: Sequence[int], record_bytes: int) -> None:
        self._rank, self._world, self._names = rank, len(names), list(names)
        self._record_bytes = record_bytes
        self._streams: list[Stream] = []
        self._steps = (self._world - 1).bit_length()
        self._rounds = [self._new_round(), self._new_round()]
        self._posted = self._collected = self._first = self._begun = self._told = 0
        self._was_idle = False
        self._tell_at: float | None = None
        self._alarm: tuple[bytes, list[int]] | None = None
        self._ended = self._stop_asked = False
        self._inquiries: dict[int, Inquiry] = {}
        self._counters = [0] * 5
        self._changed = threading.Condition()

    @abstractmethod
    def _tell_news(self) -> None:
        """There is an alarm, or a rank has to stop."""

    def _new_round(self) -> _Round:
        return _Round([b""] * self._world)

    def _back(self, distance: int) -> int:
        return (self._rank - distance) % self._world

    def _count(self, step: int) -> int:
        return min(1 << step, self._world - (1 << step))

    def _carried(self, step: int) -> list[int]:
        """Whose records come in a step."""
        return [self._back((1 << step) + j) for j in range(self._count(step))]

    def _put(self, stream: Stream, kind: Kind, number: int, body: bytes) -> None:
        if not stream.open:
            return
        stream.out += HEADER.pack(kind, len(body), number) + body
        at = 1 if kind == Kind.ROUND else 3
        self._counters[at] += 1
        self._counters[at + 1] += HEADER.size + len(body)

    def _flood(
        self, kind: Kind, number: int = 0, body: bytes = b"", origin: Stream | None = None
    ) -> None:
        for stream in self._streams:
            if stream is not origin:
                self._put(stream, kind, number, body)

    def _advance(self) -> None:
        round_ = self._rounds[self._posted & 1]
        if self._posted == self._collected or round_.done:
            return
        while round_.sent < self._steps and all(s in round_.came for s in range(round_.sent)):
            step, round_.sent = round_.sent, round_.sent + 1
            body = b"".join(round_.record_R[self._back(j)] for j in range(self._count(step)))
            self._put(self._streams[2 * step], Kind.ROUND, self._posted, body)
        if len(round_.came) == self._steps:
            round_.done = True
            self._tell_at = None
            self._counters[0] += 1
            self._changed.notify_all()

    def _take_step(self, stream: Stream, number: int, body: bytes) -> None:
        stream.round = number
        round_, size = self._rounds[number & 1], self._record_bytes
        for j, rank in enumerate(self._carried(stream.step)):
            round_.record_R[rank] = body[j * size : (j + 1) * size]
        round_.came.add(stream.step)
        self._hear_of(stream, number)
        self._advance()

    def _hear_of(self, stream: Stream, number: int) -> None:
        stream.begun = max(stream.begun, number)
        if number > self._begun:
            self._begun = number
            self._changed.notify_all()

    def _tell_of(self, number: int) -> None:
        if self._told < number:
            self._told = number
            for stream in self._streams:
                if stream.begun < number:
                    self._put(stream, Kind.BEGUN, number, b"")

    def _cut_off(self) -> bool:
        came = self._rounds[self._posted & 1].came
        lost = [s for s in self._streams if not (s.dialled or s.open or s.step in came)]
        return self._ended and bool(lost)

    def _raise(self, reason: bytes, ranks: Sequence[int], origin: Stream | None = None) -> None:
        if self._alarm is not None or self._ended:
            return
        reason, blamed = shortened(reason, LONGEST_REASON), list(ranks)[:MOST_BLAMED]
        self._alarm = reason, blamed
        count = len(blamed)
        body = struct.pack(f"<I{count}I", count, *blamed) + reason
        self._flood(Kind.ALARM, 0, body, origin)
        self._changed.notify_all()
        self._tell_news()

    def _conclude(self, origin: Stream | None) -> None:
        if not self._ended:
            self._ended = True
            self._flood(Kind.END, origin=origin)
            self._changed.notify_all()

    def _stop(self, origin: Stream | None) -> None:
        if not self._stop_asked:
            self._stop_asked = True
            self._flood(Kind.STOP, origin=origin)
            self._tell_news()

    def _blame(self, rank: int, what: str) -> None:
        doing = b"nothing yet"
        for stream in self._streams:
            if stream.rank == rank and stream.activity != b"nothing yet":
                doing = stream.activity
        name = f"rank {self._names[rank]}"
        reason = f"{name} {what}; {name} was last heard doing: ".encode() + doing
        self._raise(reason, [self._names[rank]])

    def _handle(self, stream: Stream, kind: Kind, number: int, body: bytes) -> None:
        if kind == Kind.ROUND:
            self._take_step(stream, number, body)
        elif kind == Kind.BEGUN:
            self._hear_of(stream, number)
            if number > self._posted:
                self._tell_of(number)
        elif kind == Kind.BEAT:
            stream.activity = body
        elif kind == Kind.ALARM:
            (count,) = struct.unpack_from("<I", body)
            if count > MOST_BLAMED or 4 + 4 * count > len(body):
                raise ProtocolError(f"an alarm about {count} ranks")
            ranks = struct.unpack_from(f"<{count}I", body, 4)
            self._raise(body[4 + 4 * count :], ranks, stream)
        elif kind == Kind.END:
            self._conclude(stream)
        elif kind == Kind.STOP:
            self._stop(stream)
        elif kind == Kind.ASK:
            self._handle_question(stream, number, body)
        else:
            self._handle_answer(stream, number, body)

    def _handle_question(self, stream: Stream, number: int, body: bytes) -> None:
        asker, sequence = QUESTION.unpack(body)
        if asker >= self._world:
            raise ProtocolError(f"a question of rank {asker}")
        inquiry = self._newest(asker, sequence)
        if inquiry is None or inquiry.asked:
            return
        inquiry.asked = True
        self._flood(Kind.ASK, number, body, stream)
        if self._posted < number:
            inquiry.absent.add(self._rank)
            self._flood(Kind.ABSENT, number, ANSWER.pack(asker, sequence, self._rank))

    def _handle_answer(self, stream: Stream, number: int, body: bytes) -> None:
        asker, sequence, rank = ANSWER.unpack(body)
        if asker >= self._world or rank >= self._world:
            raise ProtocolError(f"an answer of rank {rank}")
        inquiry = self._newest(asker, sequence)
        if inquiry is None or rank in inquiry.absent:
            return
        inquiry.absent.add(rank)
        if asker != self._rank:
            self._flood(Kind.ABSENT, number, body, stream)

    def _newest(self, asker: int, sequence: int) -> Inquiry | None:
        inquiry = self._inquiries.setdefault(asker, Inquiry())
        if sequence > inquiry.sequence:
            inquiry = self._inquiries[asker] = Inquiry(sequence)
        return inquiry if sequence == inquiry.sequence else None
