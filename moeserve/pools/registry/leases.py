"""The members of a registry and when their leases end: a table without a clock of its own.

Its owner says what time it is. Time runs for leases only while the registry listens: between two
calls no more than ``MOST_STEP_S`` passes, so that a registry that was stopped, or whose process was
busy, does not take its own silence for that of the members. Every call costs the same, however many
members there are; ``expire`` looks at those that it drops.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from moeserve.errors import ExhaustedError, InvalidRequestError, NotFoundError
from moeserve.pools.members import Member, MemberLoad, Report, check_member

# The owner calls more often than that.
MOST_STEP_S = 0.5


class LeaseTable:
    """Leases of ``lease_s`` for ``most`` members at most."""

    def __init__(self, lease_s: float, most: int) -> None:
        self._lease_s = lease_s
        self._most = most
        self._reports: dict[str, Report] = {}
        self._ends: OrderedDict[str, float] = OrderedDict()  # soonest first: all are equally long
        self._asked: float | None = None
        self._time = 0.0

    @property
    def reports(self) -> Mapping[str, Report]:
        return self._reports

    def join(self, report: Report, now: float) -> None:
        """The lease begins. InvalidRequestError if the id is another member's, ExhaustedError if
        the table is full."""
        member = report.member
        check_member(member)
        known = self._reports.get(member.id)
        if known is None and len(self._reports) >= self._most:
            raise ExhaustedError(f"the registry is full: {self._most} members at most")
        if known is not None and _place(known.member) != _place(member):
            raise InvalidRequestError(
                f"member {member.id} is at {known.member.address}, not at {member.address}: give "
                "every member an id of its own"
            )
        self._reports[member.id] = report
        self._extend(member.id, now)

    def renew(self, member_id: str, load: MemberLoad, now: float) -> Report:
        """What is known of it from now on: a report that is older than the last only extends the
        lease. NotFoundError if it has none."""
        known = self._reports.get(member_id)
        if known is None:
            raise NotFoundError(f"member {member_id[:128]} has no lease here: join again")
        self._extend(member_id, now)
        if load.sequence > known.load.sequence:
            known = self._reports[member_id] = Report(known.member, load)
        return known

    def leave(self, member_id: str) -> bool:
        """Whether it had a lease."""
        if self._reports.pop(member_id, None) is None:
            return False
        del self._ends[member_id]
        return True

    def expire(self, now: float) -> tuple[str, ...]:
        """Drops and returns those whose leases have ended."""
        time = self._listened(now)
        gone = []
        for member_id, end in self._ends.items():
            if end > time:
                break
            gone.append(member_id)
        for member_id in gone:
            del self._ends[member_id], self._reports[member_id]
        return tuple(gone)

    def _extend(self, member_id: str, now: float) -> None:
        self._ends[member_id] = self._listened(now) + self._lease_s
        self._ends.move_to_end(member_id)

    def _listened(self, now: float) -> float:
        """Seconds for which the registry has listened."""
        if self._asked is not None:
            self._time += min(max(0.0, now - self._asked), MOST_STEP_S)
        self._asked = now
        return self._time


def _place(member: Member) -> tuple[object, ...]:
    return member.address, member.role, member.rank, member.instance
