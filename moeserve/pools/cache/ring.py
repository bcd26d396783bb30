"""Which members keep what: consistent hashing (Karger et al. 1997) with virtual nodes.

Every member has ``POINTS`` places on a circle of 2^64; a key belongs to the members that come first
after its own place. When a member comes or goes, only the keys of its own stretches move. The
owners of a key are distinct instances as long as there are enough, so that a replica outlives its
host's process; ranks of one instance follow only then. Everyone who knows the same members finds
the same owners, in the same order, whatever the order in which they came. Pure.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

POINTS = 128


class RingMember(NamedTuple):
    """Who takes part in a ring. ``id`` decides where: a member that comes back with its disk must
    have the same one, so it is no name of one life (``Member.id``)."""

    id: str
    instance: str


@dataclass(frozen=True, slots=True)
class HashRing:
    """``owner[i]`` has the stretch that ends at ``end[i]``, in ascending order."""

    end: tuple[int, ...]
    owner: tuple[RingMember, ...]
    members: int
    instances: int

    @staticmethod
    def of(places: Iterable[RingMember], points: int = POINTS) -> HashRing:
        """Of places with distinct ids; of equal ids the first counts."""
        distinct = {place.id: place for place in reversed(list(places))}
        ends = sorted(
            (end, place) for place in distinct.values() for end in _ends(place.id, points)
        )
        instances = {place.instance for place in distinct.values()}
        owner = tuple(place for _, place in ends)
        return HashRing(tuple(end for end, _ in ends), owner, len(distinct), len(instances))

    def owners(self, key: bytes, count: int) -> tuple[RingMember, ...]:
        """Up to ``count`` distinct places for a key, best first."""
        wanted = min(count, self.members)
        first = bisect_right(self.end, _position(key))
        chosen: list[RingMember] = []
        passed: dict[str, RingMember] = {}  # of instances that have been chosen
        instances: set[str] = set()
        for step in range(len(self.owner)):
            spare = wanted if len(instances) < self.instances else wanted - len(passed)
            if len(chosen) >= min(wanted, spare):
                break
            place = self.owner[(first + step) % len(self.owner)]
            if place.instance not in instances:
                instances.add(place.instance)
                chosen.append(place)
            elif place not in chosen:
                passed.setdefault(place.id, place)
        return (*chosen, *passed.values())[:wanted]


def _ends(name: str, points: int) -> Iterable[int]:
    for at in range(points):
        yield _position(at.to_bytes(4, "little") + name.encode())


def _position(content: bytes) -> int:
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")
