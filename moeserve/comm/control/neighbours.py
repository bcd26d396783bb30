"""Connections from each rank to those 2^i ahead of it, whose both ends have proven who they are.

The address of every rank and a random token are left as notes, and read by those who dial it. Who
dials says which rank and which distance it is; then both ends prove, over nonces of both, that they
know the token of the rank that is dialled and the group's secret, if there is one (HMAC-SHA256).
That keeps others from joining; it neither hides nor signs what follows. Connections of others are
closed and logged.
"""

from __future__ import annotations

import hmac
import json
import logging
import secrets
import select
import socket
import struct
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from torch.distributed import DistError

from moeserve.comm.group import GIVE_UP_S, NOTICE_S, POLL_S, Group, named
from moeserve.errors import ConfigError, LateRankError, UnauthenticatedError

log = logging.getLogger(__name__)

_MAGIC = b"moemesh1"
_NONCE_BYTES = 16
_PROOF_BYTES = 32
_HELLO = struct.Struct(f"<8sIII{_NONCE_BYTES}s")
_PAIR = struct.Struct("<III")
_WELCOME = b"w"
# How long a stranger may stay silent, and how many may do so at once. Ranks answer late where very
# many of them share a few cores (1,024 on two did not within 5 s).
_HELLO_S = 5.0
_HELLO_S_PER_RANK = 0.03
_MOST_UNPROVEN = 64
_SLICE_S = 0.1

# Yields how many bytes it needs next; it has returned when the connection is proven.
Handshake = Generator[int, bytes, None]


@dataclass(frozen=True, slots=True)
class Neighbours:
    """``dialled[i]`` leads to rank + 2^i, ``accepted[i]`` to rank - 2^i, modulo the world."""

    dialled: tuple[socket.socket, ...]
    accepted: tuple[socket.socket, ...]


@dataclass(slots=True)
class _Unproven:
    """A connection within its handshake; ``rank`` is whom we dialled, None where we accepted."""

    stream: socket.socket
    handshake: Handshake
    needed: int
    give_up: float
    rank: int | None
    read: bytes = b""


def num_steps(world: int) -> int:
    """How many distances 1, 2, 4, ... are below ``world``: ceil(log2 world)."""
    return (world - 1).bit_length()


def connect_neighbours(
    group: Group,
    key: str,
    address: str | None,
    secret: bytes | None,
    timeout_s: float,
) -> Neighbours:
    """Collective. ``address`` is of the interface that peers reach; by default what the host's name
    means. LateRankError names who did not come; ConfigError who has another secret."""
    deadline = time.monotonic() + timeout_s
    host = address or socket.gethostbyname(socket.gethostname())
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with ExitStack() as stack:
        listening = stack.enter_context(socket.create_server((host, 0), family=family, backlog=512))
        listening.setblocking(False)
        token = secrets.token_hex(_PROOF_BYTES)
        note = json.dumps([host, listening.getsockname()[1], token])
        connector = NeighbourConnector(group, listening, bytes.fromhex(token), secret, deadline)
        stack.callback(connector.close)
        ahead = [(group.rank + (1 << step)) % group.world for step in range(num_steps(group.world))]
        notes = exchange_notes(group, f"{key}/address", note.encode(), ahead, timeout_s)
        for step, rank in enumerate(ahead):
            connector.dial(step, *json.loads(notes[rank]))
        found = connector.complete(timeout_s)
    for stream in (*found.dialled, *found.accepted):
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return found


def exchange_notes(
    group: Group, key: str, note: bytes, ranks: Sequence[int], timeout_s: float
) -> dict[int, bytes]:
    """Leave a note, and read those of ``ranks``: ``Group.all_gather`` for a few of many.

    LateRankError names the ranks that did not come or gave up.
    """
    notes: dict[int, bytes] = {}
    begun = time.monotonic()
    notice_at = begun + NOTICE_S
    try:
        group.store.set(f"{key}/{group.rank}", note)  # type: ignore[arg-type]
        while True:
            trouble = group.trouble()
            for rank in ranks:
                if rank not in notes and group.store.check([f"{key}/{rank}"]):
                    notes[rank] = bytes(group.store.get(f"{key}/{rank}"))
            missing = sorted({group.of_run(rank) for rank in ranks if rank not in notes})
            if not missing:
                return notes
            if trouble is not None:
                raise trouble
            now = time.monotonic()
            if now > begun + timeout_s:
                raise LateRankError(
                    f"{named(missing)} did not reach {key!r} within {timeout_s:g} s", missing
                )
            if now > notice_at:
                notice_at = now + (now - begun)  # ever less often
                group.notify(f"rank {group.rank}, {key}: waiting for {named(missing)}")
            time.sleep(POLL_S)
    except DistError as error:
        raise LateRankError(f"{key}: the rank that keeps the notes has ended", [0]) from error


class NeighbourConnector:
    """Owns the connections until all are proven; the listening socket, whose ``token`` is in the
    rank's note, is its caller's."""

    def __init__(
        self,
        group: Group,
        listening: socket.socket,
        token: bytes,
        secret: bytes | None,
        deadline: float,
    ) -> None:
        steps = num_steps(group.world)
        self._group = group
        self._listening = listening
        self._key = _key(secret, token)
        self._secret = secret
        self._deadline = deadline
        self._dialled: list[socket.socket | None] = [None] * steps
        self._accepted: list[socket.socket | None] = [None] * steps
        self._unproven: dict[int, _Unproven] = {}
        self._lost: dict[int, str] = {}
        self._lost_at = 0.0

    def dial(self, step: int, host: str, port: int, token: str) -> None:
        rank = self._group.rank
        there = (rank + (1 << step)) % self._group.world
        left = max(0.001, self._deadline - time.monotonic())
        try:
            stream = socket.create_connection((host, port), timeout=left)
        except OSError as error:
            self._lose(there, f"it cannot be reached at {host}:{port}: {error}")
            return
        pair = _PAIR.pack(rank, there, step)
        key = _key(self._secret, bytes.fromhex(token))

        def proven() -> None:
            self._dialled[step] = stream

        self._begin(stream, _dialling(stream, key, pair, proven), self._deadline, there)

    def complete(self, timeout_s: float) -> Neighbours:
        """Both handshakes of every distance; waits until the deadline."""
        notice_at = time.monotonic() + NOTICE_S
        trouble_at = 0.0
        while missing := self._missing():
            now = time.monotonic()
            if now >= trouble_at:
                trouble_at = now + _SLICE_S
                if (trouble := self._group.trouble()) is not None:
                    raise trouble
            if self._lost and now > min(self._deadline, self._lost_at + GIVE_UP_S):
                late = sorted(map(self._group.of_run, self._lost))
                why = next(iter(self._lost.values()))
                raise LateRankError(f"{named(late)} did not connect: {why}", late)
            if now > self._deadline:
                raise LateRankError(f"{named(missing)} did not connect in {timeout_s:g} s", missing)
            if now > notice_at:
                notice_at = now + NOTICE_S
                rank = self._group.of_run(self._group.rank)
                self._group.notify(f"rank {rank}: waiting for {named(missing)} to connect")
            self._move(now)
        found = Neighbours(tuple(filter(None, self._dialled)), tuple(filter(None, self._accepted)))
        self._dialled, self._accepted = [], []
        return found

    def close(self) -> None:
        """Whatever was not handed over."""
        for one in self._unproven.values():
            one.stream.close()
        for stream in filter(None, (*self._dialled, *self._accepted)):
            stream.close()

    def _missing(self) -> list[int]:
        """Ranks of the run that are not connected, ascending."""
        rank, world = self._group.rank, self._group.world
        ahead = {(rank + (1 << i)) % world for i, s in enumerate(self._dialled) if s is None}
        behind = {(rank - (1 << i)) % world for i, s in enumerate(self._accepted) if s is None}
        return sorted(map(self._group.of_run, ahead | behind))

    def _move(self, now: float) -> None:
        """Wait a moment for whatever comes, and go on with it."""
        poll = select.poll()
        for fd in self._unproven:
            poll.register(fd, select.POLLIN)
        if len(self._unproven) < _MOST_UNPROVEN:
            poll.register(self._listening, select.POLLIN)
        for fd, _ in poll.poll(_SLICE_S * 1000):
            if fd == self._listening.fileno():
                self._accept(now)
            else:
                self._read(self._unproven[fd])
        for one in [u for u in self._unproven.values() if u.give_up < now]:
            self._refuse(one, "it said nothing")

    def _accept(self, now: float) -> None:
        try:
            stream, _ = self._listening.accept()
        except OSError:  # it has gone again
            return
        give_up = now + _HELLO_S + self._group.world * _HELLO_S_PER_RANK
        self._begin(stream, self._accepting(stream), give_up, None)

    def _begin(
        self, stream: socket.socket, handshake: Handshake, give_up: float, rank: int | None
    ) -> None:
        stream.setblocking(False)
        one = _Unproven(stream, handshake, 0, give_up, rank)
        self._unproven[stream.fileno()] = one
        self._advance(one, None)

    def _read(self, one: _Unproven) -> None:
        try:
            data = one.stream.recv(one.needed - len(one.read))
        except BlockingIOError:
            return
        except OSError as error:
            self._refuse(one, str(error))
            return
        if not data:
            self._refuse(one, "it closed the connection")
            return
        one.read += data
        if len(one.read) == one.needed:
            whole, one.read = one.read, b""
            self._advance(one, whole)

    def _advance(self, one: _Unproven, received: bytes | None) -> None:
        try:
            one.needed = next(one.handshake) if received is None else one.handshake.send(received)
        except StopIteration:
            del self._unproven[one.stream.fileno()]
        except UnauthenticatedError as error:
            self._refuse(one, str(error))
            if one.rank is not None:
                ours, theirs = map(self._group.of_run, (self._group.rank, one.rank))
                raise ConfigError(
                    f"rank {ours} and rank {theirs} do not trust one another: {error}"
                ) from error
        except OSError as error:
            self._refuse(one, str(error))

    def _refuse(self, one: _Unproven, why: str) -> None:
        """A stranger goes; a rank that we dialled is lost."""
        del self._unproven[one.stream.fileno()]
        one.stream.close()
        if one.rank is None:
            log.warning("a connection to rank %d was refused: %s", self._group.rank, why)
        else:
            self._lose(one.rank, why)

    def _lose(self, rank: int, why: str) -> None:
        """It may have failed for another's sake, of which its note tells soon (``trouble``)."""
        self._lost[rank] = why
        self._lost_at = time.monotonic()

    def _accepting(self, stream: socket.socket) -> Handshake:
        """The other side of ``_dialling``."""
        hello = yield _HELLO.size
        magic, dialler, there, step, theirs = _HELLO.unpack(hello)
        rank, world = self._group.rank, self._group.world
        if magic != _MAGIC or there != rank or step >= len(self._accepted):
            raise ConnectionAbortedError("it is none of this run's ranks")
        if dialler != (rank - (1 << step)) % world or self._accepted[step] is not None:
            raise ConnectionAbortedError(f"rank {dialler} is none that is awaited")
        pair, nonce = _PAIR.pack(dialler, there, step), secrets.token_bytes(_NONCE_BYTES)
        _send(stream, nonce + _proof(self._key, b"accepts", pair, theirs, nonce))
        proof = yield _PROOF_BYTES
        _require(proof, _proof(self._key, b"dials", pair, theirs, nonce))
        if self._accepted[step] is not None:
            raise ConnectionAbortedError(f"rank {dialler} is connected already")
        _send(stream, _WELCOME)
        self._accepted[step] = stream


def _dialling(
    stream: socket.socket, key: bytes, pair: bytes, proven: Callable[[], None]
) -> Handshake:
    nonce = secrets.token_bytes(_NONCE_BYTES)
    _send(stream, _MAGIC + pair + nonce)
    challenge = yield _NONCE_BYTES + _PROOF_BYTES
    theirs, proof = challenge[:_NONCE_BYTES], challenge[_NONCE_BYTES:]
    _require(proof, _proof(key, b"accepts", pair, nonce, theirs))
    _send(stream, _proof(key, b"dials", pair, nonce, theirs))
    if (yield len(_WELCOME)) != _WELCOME:
        raise ConnectionAbortedError("it sent no welcome")
    proven()


def _send(stream: socket.socket, data: bytes) -> None:
    """A few bytes into a new socket, which always has room for them."""
    if stream.send(data) != len(data):
        raise ConnectionAbortedError("it takes no data")


def _key(secret: bytes | None, token: bytes) -> bytes:
    """What both ends of a connection know: the group's secret and the token of who is dialled."""
    return hmac.digest(secret or b"", token, "sha256")


def _proof(key: bytes, side: bytes, pair: bytes, dialler: bytes, acceptor: bytes) -> bytes:
    # Everything after the side has a fixed width, so no two sets of values are the same text.
    return hmac.digest(key, side + pair + dialler + acceptor, "sha256")


def _require(proof: bytes, expected: bytes) -> None:
    if not hmac.compare_digest(proof, expected):
        raise UnauthenticatedError(
            "the other end does not know this group's secret: give all ranks the same ep_secret"
        )
