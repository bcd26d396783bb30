"""What a unified member leans to now, from the members that it sees: for its heartbeat's report.

Follow the registry with loads into ``view``; where all members are unified, each of them so hears
of the loads of all. On one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Protocol

from moeserve.pools.members import Member, Report, Role
from moeserve.pools.routing.role_shift import RoleShift, ShiftMarks


class MembersInView(Protocol):
    """``registry.view.ClusterView``."""

    def members(self) -> Iterable[Report]: ...


class Leaning:
    """Of ``member``; one that is not unified leans to what it does, always."""

    def __init__(
        self,
        view: MembersInView,
        member: Member,
        marks: ShiftMarks,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._view = view
        self._member = member
        self._clock = clock
        self._shift = RoleShift(member.id, marks)

    @property
    def turns(self) -> int:
        """How often it has turned."""
        return self._shift.turns

    def role(self) -> Role:
        """Before each beat: time passes only by these calls. Until the member sees itself in the
        view it stays as it is."""
        if self._member.role is not Role.UNIFIED:
            return self._member.role
        same = self._member.terms.compute_id
        reports = [r for r in self._view.members() if r.member.terms.compute_id == same]
        if not any(r.member.id == self._member.id for r in reports):
            return self._shift.leans
        return self._shift.decide(reports, self._clock())
