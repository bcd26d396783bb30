"""The cache members that one knows: who keeps which key, and who is left alone for a while.

A member's place in the ring is its instance and rank, so one that comes back under the same name
finds its keys and what it has on disk. One that fails is not asked for ``FIRST_REST_S``, doubled
each time up to ``LONGEST_REST_S``, and so costs requests next to nothing until it leaves the
registry. Owners of a key are found in the same time however many members there are; a ring is made
anew when one comes or goes, not with their loads. On the event loop's thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from moeserve.pools.cache.ring import HashRing, RingMember
from moeserve.pools.members import Member, Role
from moeserve.pools.registry.view import ClusterView, ViewChange

FIRST_REST_S = 1.0
LONGEST_REST_S = 30.0


@dataclass(slots=True)
class _Rest:
    length: float
    until: float


class CacheMembers:
    """Those of a view that it follows; ``set`` is for who knows them otherwise."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._members: dict[str, Member] = {}
        self._names: dict[str, str] = {}  # place in the ring, by id
        self._ring: HashRing | None = None
        self._rests: dict[str, _Rest] = {}

    def __len__(self) -> int:
        return len(self._members)

    def put(self, member: Member) -> None:
        """Is there, again or for the first time; members of other roles are passed over."""
        if member.role is not Role.CACHE or member.id in self._names:
            return
        name = f"{member.instance}/{member.rank}"
        before = self._members.get(name)
        if before is not None:  # a new life
            self.gone(before.id)
        self._members[name] = member
        self._names[member.id] = name
        self._ring = None

    def gone(self, member_id: str) -> None:
        name = self._names.pop(member_id, None)
        if name is not None:
            del self._members[name]
            self._rests.pop(name, None)
            self._ring = None

    def follow(self, view: ClusterView) -> Callable[[], None]:
        """Whoever is there, less those that drain; what is returned ends that."""

        def change(news: ViewChange) -> None:
            for report in news.put:
                if report.load.draining:
                    self.gone(report.member.id)
                else:
                    self.put(report.member)
            for member_id in news.gone:
                self.gone(member_id)

        return view.subscribe(change)

    def set(self, members: Iterable[Member]) -> None:
        """These, and no others."""
        wanted = {member.id: member for member in members}
        for member_id in self._names.keys() - wanted.keys():
            self.gone(member_id)
        for member in wanted.values():
            self.put(member)

    def owners(self, key: bytes, count: int) -> tuple[Member, ...]:
        """Up to ``count`` members that keep this key, best first, less those that rest."""
        if self._ring is None:
            self._ring = HashRing.of(
                RingMember(name, member.instance) for name, member in self._members.items()
            )
        now = self._clock()
        found = (place.id for place in self._ring.owners(key, count))
        return tuple(self._members[name] for name in found if not self._rests_now(name, now))

    def failed(self, member: Member) -> None:
        """It did not answer, or not in time."""
        name = self._names.get(member.id)
        if name is None:
            return
        rest = self._rests.get(name)
        now = self._clock()
        if rest is not None and rest.until > now:  # of calls that began before
            return
        length = min(2 * rest.length, LONGEST_REST_S) if rest else FIRST_REST_S
        self._rests[name] = _Rest(length, now + length)

    def worked(self, member: Member) -> None:
        name = self._names.get(member.id)
        if name is not None:
            self._rests.pop(name, None)

    def _rests_now(self, name: str, now: float) -> bool:
        rest = self._rests.get(name)
        return rest is not None and rest.until > now
