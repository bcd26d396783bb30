"""Who is connected, what each connection waits for and since when, and who has to go.

Pure: time is an argument, and connections are whatever can be a key. A connection is in one phase
at a time; a phase with a limit must end within it, however much arrives meanwhile, so that bytes
that trickle in gain nothing. Bytes that are held for connections (bodies on their way in, answers
that nobody reads) are added up.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class ConnectionPhase(StrEnum):
    """What a connection is at."""

    OPENING = "opening"  # accepted, its TLS not yet agreed on
    IDLE = "idle"  # between requests
    HEAD = "head"  # a request's head has begun
    BODY = "body"  # a request's body is on its way in
    ANSWERING = "answering"  # the request is here whole
    STALLED = "stalled"  # its client does not read the answer
    LEAVING = "leaving"  # answered, and what the client still sends is thrown away


# Those that nobody has asked anything of go first, once they had time to send what they came for.
FRESH_S = 0.5
_UNASKED = (
    ConnectionPhase.OPENING,
    ConnectionPhase.IDLE,
    ConnectionPhase.HEAD,
    ConnectionPhase.LEAVING,
)
# Of the others those that wait for their client, once they have for so long.
_HELD = (ConnectionPhase.BODY, ConnectionPhase.STALLED)
HELD_S = 2.0


class Phases(Generic[Key]):
    """Owns the phase of every connection. ``limits_s`` says how long one may last; those that it
    leaves out may last for ever."""

    def __init__(self, limits_s: Mapping[ConnectionPhase, float]) -> None:
        self._limits_s = dict(limits_s)
        self._phases: dict[Key, ConnectionPhase] = {}
        self._since: dict[ConnectionPhase, OrderedDict[Key, float]] = {
            p: OrderedDict() for p in ConnectionPhase
        }
        self._bytes: dict[Key, int] = {}
        self.held_bytes = 0

    def __len__(self) -> int:
        return len(self._phases)

    def __contains__(self, key: Key) -> bool:
        return key in self._phases

    def enter(self, key: Key, phase: ConnectionPhase, now: float) -> None:
        """From now on; one that is in that phase already stays there since when it was."""
        before = self._phases.get(key)
        if before is phase:
            return
        if before is not None:
            del self._since[before][key]
        self._phases[key] = phase
        self._since[phase][key] = now

    def leave(self, key: Key) -> None:
        """The connection has ended; may be said again."""
        phase = self._phases.pop(key, None)
        if phase is not None:
            del self._since[phase][key]
            self.hold(key, 0)

    def hold(self, key: Key, count: int) -> None:
        """So many bytes are held for it now."""
        self.held_bytes += count - self._bytes.pop(key, 0)
        if count:
            self._bytes[key] = count

    def held(self, key: Key) -> int:
        return self._bytes.get(key, 0)

    def count(self, phase: ConnectionPhase) -> int:
        return len(self._since[phase])

    def late(self, now: float) -> Iterator[tuple[Key, ConnectionPhase]]:
        """Those whose phase has lasted longer than it may; each is to be ended by the caller."""
        for phase, limit_s in self._limits_s.items():
            found = []
            for key, since in self._since[phase].items():
                if since + limit_s > now:
                    break
                found.append(key)
            yield from ((key, phase) for key in found)

    def least_missed(self, now: float) -> Key | None:
        """Who goes where there is no room for another: the one that has been idle longest, and
        longer than ``FRESH_S``; where none is, the one that has kept us waiting longest; None where
        all are being served."""
        idle = self._longest(_UNASKED, now - FRESH_S)
        return self.most_waited_for(now) if idle is None else idle

    def most_waited_for(self, now: float) -> Key | None:
        """Of those whose bytes we hold, the one that has kept us waiting longest, and longer than
        ``HELD_S``."""
        return self._longest(_HELD, now - HELD_S)

    def _longest(self, phases: Sequence[ConnectionPhase], before: float) -> Key | None:
        longest: Key | None = None
        for phase in phases:
            front = next(iter(self._since[phase].items()), None)
            if front is not None and front[1] < before:
                longest, before = front
        return longest
