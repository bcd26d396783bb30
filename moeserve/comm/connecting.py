"""Connections between ranks, whose handshakes (``proofs``) all run side by side.

A stranger can find the port. What it sends raises nothing and holds up nobody: each connection has
a deadline of its own for all of its handshake, there are at most so many at a time, and whoever
comes when all places are taken gets the place of another: of one that has said nothing, before one
that has, and of the oldest first. So silent, slow and wrong ones are dropped, and a rank, which
says its hello at once, gets in beside any number of them. Refusals are logged, the first ones.
"""

from __future__ import annotations

import errno
import json
import logging
import select
import socket
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from moeserve.comm.group import GIVE_UP_S, NOTICE_S, Group, named, spoiled
from moeserve.comm.proofs import Credentials, Handshake, Place, accepting, dialling
from moeserve.errors import ConfigError, LateRankError, UnauthenticatedError
from moeserve.observe.log_bound import LogBound

log = logging.getLogger(__name__)

# What all of a handshake may take. Ranks answer late where very many of them share a few cores
# (1,024 on two did not within 5 s).
_HANDSHAKE_S = 5.0
_HANDSHAKE_S_PER_RANK = 0.03
# Connections within their handshakes, at most: these, and two of every rank.
_MOST_UNPROVEN = 128
# Taken from the queue of the listening socket before others are served.
_MOST_ACCEPTED = 64
_SLICE_S = 0.1
_DIAL_AGAIN_S = 0.1
_MOST_LOGGED, _LOGGED_PER_S = 10, 60.0
BACKLOG = 512


@dataclass(frozen=True, slots=True)
class Address:
    """Where a rank listens, and the token that proves that one has read its note."""

    host: str
    port: int
    token: bytes

    def note(self) -> bytes:
        return json.dumps([self.host, self.port, self.token.hex()]).encode()

    @classmethod
    def read(cls, note: bytes, rank: int) -> Address:
        """ConfigError where the note of ``rank`` is none."""
        try:
            host, port, token = json.loads(note)
            found = cls(str(host), int(port), bytes.fromhex(token))
        except (ValueError, TypeError, RecursionError, OverflowError) as error:
            raise spoiled("address", f"no address of rank {rank}") from error
        if not 0 < found.port < 1 << 16:
            raise spoiled("address", f"a port of rank {rank} that is none")
        return found


@dataclass(slots=True, eq=False)
class _Unproven:
    """A connection within its handshake; ``place`` where we dialled it, else None."""

    stream: socket.socket
    handshake: Handshake
    give_up: float
    place: Place | None
    connecting: bool
    needed: int = 0
    read: bytes = b""
    greeted: bool = False


def listen(
    stack: ExitStack, host: str, prepare: Callable[[socket.socket], None] | None = None
) -> socket.socket:
    """A socket that ``stack`` closes; ``prepare`` sees it before anybody can connect. ConfigError
    where ``host`` is no address of this machine."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
        if prepare is not None:
            prepare(listening)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, 0))
        listening.listen(BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"no port of {host} can be opened for the other ranks: name an interface of this host "
            f"({error})"
        ) from error
    return listening


class Connector:
    """Owns the connections until all are proven; ``listening`` is its caller's, ``credentials``
    are this rank's. ``awaited`` are the places that others dial; ``prepare`` sees each socket that
    dials before it does.

    Places are numbered by the group. ``complete`` waits until ``deadline`` at most.
    """

    def __init__(
        self,
        group: Group,
        listening: socket.socket,
        credentials: Credentials,
        awaited: Collection[Place],
        deadline: float,
        prepare: Callable[[socket.socket], None] | None = None,
    ) -> None:
        self._group = group
        listening.setblocking(False)
        self._listening = listening
        self._credentials = credentials
        self._awaited = set(awaited)
        self._deadline = deadline
        self._prepare = prepare
        self._dialled: dict[Place, Address] = {}
        self._dial_at: dict[Place, float] = {}
        self._found: dict[Place, socket.socket] = {}
        self._unproven: dict[int, _Unproven] = {}
        self._lost: dict[Place, str] = {}
        self._lost_at = 0.0
        self._listen_at = 0.0
        self._refused = 0
        self._logged = LogBound(_MOST_LOGGED, _LOGGED_PER_S, time.monotonic)
        self._most = _MOST_UNPROVEN + 2 * group.world

    def dial(self, place: Place, address: Address) -> None:
        """As soon as ``complete`` runs, and again if it is lost before it is proven."""
        self._dialled[place] = address
        self._dial_at[place] = 0.0

    def complete(self, timeout_s: float) -> Mapping[Place, socket.socket]:
        """Every place, dialled and awaited, and its connection, which does not block.

        LateRankError names who did not come in time, ConfigError who has another secret.
        """
        notice_at = time.monotonic() + NOTICE_S
        trouble_at = 0.0
        while missing := self._missing():
            now = time.monotonic()
            if now >= trouble_at:
                trouble_at = now + _SLICE_S
                if (trouble := self._group.trouble()) is not None:
                    raise trouble
            if self._lost and now > min(self._deadline, self._lost_at + GIVE_UP_S):
                late = sorted({self._group.of_run(place.acceptor) for place in self._lost})
                why = next(iter(self._lost.values()))
                raise LateRankError(f"{named(late)} did not connect: {why}", late)
            if now > self._deadline:
                raise LateRankError(f"{named(missing)} did not connect in {timeout_s:g} s", missing)
            if now > notice_at:
                notice_at = now + NOTICE_S
                rank = self._group.of_run(self._group.rank)
                self._group.notify(f"rank {rank}: waiting for {named(missing)} to connect")
            for place in [p for p, at in self._dial_at.items() if at <= now]:
                self._dial(place)
            self._move(now)
        found, self._found = self._found, {}
        return found

    def close(self) -> None:
        """Whatever was not handed over."""
        for one in self._unproven.values():
            one.stream.close()
        for stream in self._found.values():
            stream.close()
        if self._logged.take_left_out():
            rank = self._group.of_run(self._group.rank)
            log.warning("rank %d refused %d connections in all", rank, self._refused)

    def _missing(self) -> list[int]:
        """Ranks of the run that are not connected, ascending."""
        ahead = {place.acceptor for place in self._dialled if place not in self._found}
        behind = {place.dialler for place in self._awaited if place not in self._found}
        return sorted(map(self._group.of_run, ahead | behind))

    def _dial(self, place: Place) -> None:
        del self._dial_at[place]
        address = self._dialled[place]
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        stream: socket.socket | None = None
        try:
            stream = socket.socket(family, socket.SOCK_STREAM)
            if self._prepare is not None:
                self._prepare(stream)
            stream.setblocking(False)
            number = stream.connect_ex((address.host, address.port))
            if number not in (0, errno.EINPROGRESS):
                raise OSError(number, errno.errorcode.get(number, "it failed"))
        except OSError as error:
            if stream is not None:
                stream.close()
            self._lose(place, f"it cannot be reached at {address.host}:{address.port}: {error}")
            return
        own = self._credentials
        handshake = dialling(Credentials(own.magic, address.token, own.secret), place)
        one = _Unproven(stream, handshake, self._deadline, place, connecting=True)
        self._unproven[stream.fileno()] = one

    def _move(self, now: float) -> None:
        """Wait a moment for whatever comes, and go on with it."""
        poll = select.poll()
        for fd, one in self._unproven.items():
            poll.register(fd, select.POLLOUT if one.connecting else select.POLLIN)
        if now >= self._listen_at:
            poll.register(self._listening, select.POLLIN)
        wait_s = min([_SLICE_S, *(at - now for at in self._dial_at.values())])
        for fd, _ in poll.poll(max(0.0, wait_s) * 1000):
            if fd == self._listening.fileno():
                self._accept_some(now)
            elif (ready := self._unproven.get(fd)) is None:
                continue  # it had to make room
            elif ready.connecting:
                self._connected(ready)
            else:
                self._read(ready)
        for late in [u for u in self._unproven.values() if u.give_up < now]:
            self._refuse(late, "it did not finish its handshake in time")

    def _accept_some(self, now: float) -> None:
        """Of those that have come; none for a moment where there are no descriptors left."""
        for _ in range(_MOST_ACCEPTED):
            try:
                stream, _ = self._listening.accept()
            except OSError as error:  # nobody is there, or has gone again
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._listen_at = now + _SLICE_S
                    self._make_room()
                return
            if sum(u.place is None for u in self._unproven.values()) >= self._most:
                self._make_room()
            handshake = accepting(self._credentials, self._is_awaited)
            give_up = now + _HANDSHAKE_S + self._group.world * _HANDSHAKE_S_PER_RANK
            stream.setblocking(False)
            one = _Unproven(stream, handshake, give_up, None, connecting=False)
            self._unproven[stream.fileno()] = one
            self._advance(one, None)
            if one.stream.fileno() >= 0:  # a hello that came with the connection
                self._read(one)

    def _is_awaited(self, place: Place) -> bool:
        return place in self._awaited and place not in self._found

    def _make_room(self) -> None:
        """One that was accepted goes: the oldest that has said nothing, else the oldest."""
        accepted = [one for one in self._unproven.values() if one.place is None]
        silent = [one for one in accepted if not one.greeted]
        if chosen := silent or accepted:
            self._refuse(chosen[0], "it was slow, and others came")

    def _connected(self, one: _Unproven) -> None:
        one.connecting = False
        if number := one.stream.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            assert one.place is not None
            address = self._dialled[one.place]
            why = errno.errorcode.get(number, str(number))
            self._refuse(one, f"it cannot be reached at {address.host}:{address.port}: {why}")
        else:
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
            turn = next(one.handshake) if received is None else one.handshake.send(received)
            one.needed, one.greeted = turn.needed, received is not None
            if turn.send and one.stream.send(turn.send) != len(turn.send):
                raise ConnectionAbortedError("it takes no data")  # a new socket has room for it
            if not turn.needed:
                next(one.handshake)
        except StopIteration as proven:
            del self._unproven[one.stream.fileno()]
            self._found[proven.value] = one.stream
            self._lost.pop(proven.value, None)
        except UnauthenticatedError as error:
            self._refuse(one, str(error))
            if one.place is not None:
                ours, theirs = map(self._group.of_run, (self._group.rank, one.place.acceptor))
                raise ConfigError(
                    f"rank {ours} and rank {theirs} do not trust one another: {error}"
                ) from error
        except OSError as error:
            self._refuse(one, str(error))

    def _refuse(self, one: _Unproven, why: str) -> None:
        """A stranger goes; a rank that we dialled is dialled again."""
        del self._unproven[one.stream.fileno()]
        one.stream.close()
        if one.place is not None:
            self._lose(one.place, why)
            return
        self._refused += 1
        if self._logged.admits():
            rank = self._group.of_run(self._group.rank)
            log.warning("a connection to rank %d was refused: %s", rank, why)

    def _lose(self, place: Place, why: str) -> None:
        """It may have failed for another's sake, of which its note tells soon (``trouble``)."""
        now = time.monotonic()
        if not self._lost:
            self._lost_at = now
        self._lost[place] = why
        self._dial_at[place] = now + _DIAL_AGAIN_S
