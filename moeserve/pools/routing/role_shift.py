"""What a unified member leans to, as the load of the pools shifts, with hysteresis.

A member that leans gets no new requests of the other kind; what it has it keeps, so that none is
lost by turning. Members decide for themselves, from the same view: the one that loses least by
turning does so, the next when ``hold_s`` are over since a turn, and never the last that does the
other thing.

Prompts wait: ``backlog_s``, tokens to be prefilled over the rate of all who prefill. Decoding is
full: ``fullness``, used blocks over all blocks of those who decode. One turns when a figure passes
its high mark while the other is below its own, and back to neither when it is below its low mark.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moeserve.errors import ConfigError
from moeserve.pools.members import Report, Role


@dataclass(frozen=True, slots=True)
class ShiftMarks:
    """Seconds, and shares of memory. ConfigError where a low mark is not below its high one: a
    member would turn to and fro."""

    backlog_low_s: float = 0.25
    backlog_high_s: float = 2.0
    full_low: float = 0.6
    full_high: float = 0.85
    hold_s: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.backlog_low_s < self.backlog_high_s:
            raise ConfigError(
                f"backlog marks {self.backlog_low_s} and {self.backlog_high_s} s: expected the low "
                "one below the high one"
            )
        if not 0 <= self.full_low < self.full_high <= 1 or self.hold_s < 0:
            raise ConfigError(
                f"marks of fullness {self.full_low} and {self.full_high}, held for {self.hold_s} "
                "s: expected shares, the low one below the high one, and no negative time"
            )


@dataclass(frozen=True, slots=True)
class PoolPressure:
    """``prefilling`` and ``decoding`` count those who take such requests now."""

    backlog_s: float
    fullness: float
    prefilling: int
    decoding: int


def pressure(reports: Iterable[Report]) -> PoolPressure:
    """Of members that compute the same. A backlog at no measured rate at all is without end."""
    tokens = rate = used = total = 0.0
    prefilling = decoding = 0
    for report in reports:
        load = report.load
        prefills, decodes = _does(report)
        prefilling += prefills
        decoding += decodes
        if report.member.role.prefills:
            tokens += load.waiting_tokens
            rate += load.prefill_rate if prefills else 0.0
        if decodes:
            used += load.total_blocks - load.free_blocks
            total += load.total_blocks
    backlog_s = tokens / rate if rate else (float("inf") if tokens else 0.0)
    return PoolPressure(backlog_s, used / total if total else 0.0, prefilling, decoding)


class RoleShift:
    """One unified member's decision, which begins with leaning to neither."""

    def __init__(self, member_id: str, marks: ShiftMarks) -> None:
        self._member_id = member_id
        self._marks = marks
        self._leans = Role.UNIFIED
        self._turned_at = float("-inf")  # this member, or another
        self._leaning: dict[str, Role] = {}  # the others
        self.turns = 0

    @property
    def leans(self) -> Role:
        return self._leans

    def decide(self, reports: Sequence[Report], now: float) -> Role:
        """``reports`` are of all members that compute the same, this one too."""
        leaning = {r.member.id: r.load.leans for r in reports if r.member.id != self._member_id}
        known = leaning.keys() & self._leaning.keys()
        if any(leaning[i] is not self._leaning[i] for i in known):
            self._turned_at = now
        self._leaning = leaning
        wanted = self._wanted(reports)
        if wanted is not self._leans and now - self._turned_at >= self._marks.hold_s:
            self._leans, self._turned_at = wanted, now
            self.turns += 1
        return self._leans

    def _wanted(self, reports: Sequence[Report]) -> Role:
        now, marks = pressure(reports), self._marks
        if self._leans is Role.PREFILL:
            over = now.backlog_s < marks.backlog_low_s or now.fullness > marks.full_high
            return Role.UNIFIED if over or not now.decoding else Role.PREFILL
        if self._leans is Role.DECODE:
            over = now.fullness < marks.full_low or now.backlog_s > marks.backlog_high_s
            return Role.UNIFIED if over or not now.prefilling else Role.DECODE
        if now.backlog_s > marks.backlog_high_s and now.fullness < marks.full_high:
            return Role.PREFILL if now.decoding > 1 and self._first(reports) else Role.UNIFIED
        full = now.fullness > marks.full_high and now.backlog_s < marks.backlog_low_s
        if full and now.prefilling > 1 and self._first(reports, most=True):
            return Role.DECODE
        return Role.UNIFIED

    def _first(self, reports: Sequence[Report], *, most: bool = False) -> bool:
        """Whether this member runs the fewest requests, or the most, of those that could turn."""
        sign = -1 if most else 1
        turning = [
            (sign * report.load.running, report.member.id)
            for report in reports
            if report.member.role is Role.UNIFIED
            and (report.load.leans is Role.UNIFIED or report.member.id == self._member_id)
            and not report.load.draining
        ]
        return bool(turning) and min(turning)[1] == self._member_id


def _does(report: Report) -> tuple[bool, bool]:
    """Whether it takes requests to prefill, and to decode."""
    role, leans = report.member.role, report.load.leans
    takes = not report.load.draining
    unified = role is Role.UNIFIED
    return (
        takes and role.prefills and not (unified and leans is Role.DECODE),
        takes and role.decodes and not (unified and leans is Role.PREFILL),
    )
