"""The members that one knows, from one registry or several. On one thread; no clock of its own.

A member is here if any registry has it. Who leaves is gone at once. Who falls silent, or is missing
when a registry that was away comes back, stays for ``GRACE_S`` longer: a registry that has itself
been stopped may have dropped members that are alive, and those join again with their next beat.
While a registry is away nothing changes: it is asked about members, not whether they live; whoever
talks to one that is dead finds out.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from moeserve.pools.members import Report, Role
from moeserve.pools.registry.base import LEASE_S, MOST_MEMBERS, Changes

# Longer than a member needs to join a registry again that has forgotten it.
GRACE_S = 1.2
# For how long a registry that is late revives nobody who has left, and how many are remembered.
LEFT_S = 2 * LEASE_S
_MOST_LEFT = 4096


@dataclass(frozen=True, slots=True)
class ViewChange:
    """What a view shows from now on: ``put`` are new members and new loads, ``gone`` are ids."""

    put: tuple[Report, ...] = ()
    gone: tuple[str, ...] = ()


class ClusterView:
    """``apply`` and ``tick`` are for who follows registries (``follow.Follower``)."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, grace_s: float = GRACE_S
    ) -> None:
        self._clock = clock
        self._grace_s = grace_s
        self._shown: dict[str, Report] = {}
        self._in: dict[int, set[str]] = {}  # by registry
        self._fading: dict[str, float] = {}  # in no registry; until when they are shown
        self._left: OrderedDict[str, float] = OrderedDict()  # until when they are not taken
        self._listeners: list[Callable[[ViewChange], None]] = []
        self._members: tuple[Report, ...] | None = None

    def members(self) -> tuple[Report, ...]:
        """In the order in which they came."""
        if self._members is None:
            self._members = tuple(self._shown.values())
        return self._members

    def get(self, member_id: str) -> Report | None:
        return self._shown.get(member_id)

    def of_role(self, role: Role) -> tuple[Report, ...]:
        """Members of exactly this role."""
        return tuple(r for r in self.members() if r.member.role is role)

    def subscribe(self, on_change: Callable[[ViewChange], None]) -> Callable[[], None]:
        """``on_change`` is called after each change, the first time, before this returns, with all
        that is there. What is returned ends that."""
        self._listeners.append(on_change)
        on_change(ViewChange(self.members()))
        return lambda: self._listeners.remove(on_change)

    async def wait_for(self, enough: Callable[[ClusterView], bool], timeout_s: float) -> bool:
        """Until ``enough`` says so; False if that takes longer."""
        changed = asyncio.Event()
        end = self.subscribe(lambda change: changed.set())
        try:
            async with asyncio.timeout(timeout_s):
                while not enough(self):
                    changed.clear()
                    await changed.wait()
        except TimeoutError:
            return False
        finally:
            end()
        return True

    def apply(self, source: int, changes: Changes) -> None:
        """What the registry of this number tells."""
        held = self._in.setdefault(source, set())
        gone = [i for i in changes.left if self._forget(i)]
        missing: Iterable[str] = changes.expired
        grace_s = self._grace_s
        put = [report for report in changes.put if self._take(held, report)]
        if changes.whole:
            missing = held - {report.member.id for report in changes.put}
            grace_s = max(grace_s, changes.settle_s)
        due = self._clock() + grace_s
        for member_id in missing:
            held.discard(member_id)
            if member_id in self._shown and not self._somewhere(member_id):
                self._fading.setdefault(member_id, due)
        self._tell(put, gone)

    def tick(self) -> None:
        """Drops those that are in no registry any more, and whose time is over."""
        if not self._fading:
            return
        now = self._clock()
        over = [i for i, due in self._fading.items() if due <= now]
        for member_id in over:
            del self._fading[member_id], self._shown[member_id]
        self._tell([], over)

    def _take(self, held: set[str], report: Report) -> bool:
        """Whether it is news."""
        member_id = report.member.id
        known = self._shown.get(member_id)
        if self._left.get(member_id, 0.0) > self._clock():
            return False
        if known is None and len(self._shown) >= MOST_MEMBERS:
            return False
        held.add(member_id)
        self._fading.pop(member_id, None)
        if known is not None and known.load.sequence >= report.load.sequence:
            return False
        self._shown[member_id] = report
        return True

    def _forget(self, member_id: str) -> bool:
        """Whether it was shown."""
        for held in self._in.values():
            held.discard(member_id)
        self._fading.pop(member_id, None)
        self._left[member_id] = self._clock() + LEFT_S
        if len(self._left) > _MOST_LEFT:
            self._left.popitem(last=False)
        return self._shown.pop(member_id, None) is not None

    def _somewhere(self, member_id: str) -> bool:
        return any(member_id in held for held in self._in.values())

    def _tell(self, put: list[Report], gone: list[str]) -> None:
        if put or gone:
            self._members = None
            change = ViewChange(tuple(put), tuple(gone))
            for listener in tuple(self._listeners):
                listener(change)
