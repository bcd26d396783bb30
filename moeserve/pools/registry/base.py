"""What a registry does: it knows the members whose leases run, and tells watchers of changes.

A member joins, renews its lease with every heartbeat, and leaves. One that is silent for
``LEASE_S`` is dropped. Time is monotonic and the registry's own: nobody's clock of the day matters,
and no member's at all. A registry holds nothing that requests in flight need: it may be away, and
whoever has a view of the cluster keeps it (``view``).

Errors: InvalidRequestError for what no member can be, NotFoundError for the renewal of a lease that
has run out (join again), ExhaustedError where it is full, UnavailableError if it is not reached
within ``CALL_S`` or is closed.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from moeserve.pools.members import Report, Role

HEARTBEAT_S = 0.5
LEASE_S = 3.0
# Where there are many members each beats less often, so that a registry gets so many a second; but
# three times within a lease.
BEATS_PER_S = 400
MOST_BEAT_S = LEASE_S / 3
# What a registry gets to answer a call.
CALL_S = 1.0
# Members of one registry, and those who watch it.
MOST_MEMBERS = 8192
MOST_WATCHERS = 8192


@dataclass(frozen=True, slots=True)
class Interest:
    """What a watcher wants to hear of. Without ``loads`` it hears of a member that joins, leaves,
    or begins or ends to drain, but not of each heartbeat, whose cost so does not grow with the
    number of those who watch."""

    roles: frozenset[Role] = frozenset(Role)
    loads: bool = True

    def covers(self, report: Report) -> bool:
        return report.member.role in self.roles


EVERYTHING = Interest()


@dataclass(frozen=True, slots=True)
class Changes:
    """What is new: ``put`` are members that came or have a new load, ``left`` those that said
    goodbye, ``expired`` those that fell silent. A member is in one of them at most.

    With ``whole``, which comes first and whenever a registry was away, ``put`` is all that there
    are; but in a registry that has just begun, members that are alive may be missing for another
    ``settle_s`` seconds.
    """

    put: tuple[Report, ...] = ()
    left: tuple[str, ...] = ()
    expired: tuple[str, ...] = ()
    whole: bool = False
    settle_s: float = 0.0


def beat_of(members: int, lease_s: float = LEASE_S) -> float:
    """What a registry of so many says: 0 where ``HEARTBEAT_S`` is not too often."""
    beat_s = members / BEATS_PER_S
    return 0.0 if beat_s <= HEARTBEAT_S else min(beat_s, lease_s / 3)


class Registry(Protocol):
    """On the event loop's thread."""

    async def join(self, report: Report) -> None:
        """Takes a lease, or renews the one that this member has."""
        ...

    async def renew(self, report: Report) -> None:
        """Another ``LEASE_S`` for ``report.member.id``, and its new load."""
        ...

    @property
    def beat_s(self) -> float:
        """How often a member should renew at most, as the registry last said; 0 is as it likes."""
        return 0.0

    async def leave(self, member_id: str) -> None:
        """Ends the lease; no matter whether there is one."""
        ...

    def watch(self, interest: Interest = EVERYTHING) -> AsyncGenerator[Changes, None]:
        """Begins with all members. Ends only by raising. Changes gather while the watcher is busy:
        it hears the newest of each member, and what waits is bounded by their number."""
        ...

    def parts(self) -> tuple[Registry, ...]:
        """The registries that a member joins and a view follows, each by itself: this one, or
        those that it stands for."""
        ...

    async def close(self) -> None: ...
