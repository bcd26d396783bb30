"""The members that may be chosen, with their loads and what was sent to them since.

Members report twice a second; within that time one gateway may route many requests, which would all
go to whoever looked idle last. So each route is noted with what it brings (``note``), until a
report shows it: one that came ``SHOWN_S`` after it was noted, or, where no report comes, until
``NOTED_S`` are over. What another gateway sends is seen only in reports.

Members stand in pools, by ``compute_id`` and by what they do; those that drain are in none. A
member whose reports have stopped while others' go on (``is_late``) is for when there is no other:
if all stop, it is the registry that is away. Times are by the owner's clock, which is monotonic.
An update, a note and a look cost the same however many members there are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from moeserve.pools.members import Member, MemberLoad, Report, Role

# A report that is older than the way to the member, and from it, does not show what was sent.
SHOWN_S = 0.25
NOTED_S = 10.0
# Three heartbeats; one and a half where there are many members.
LATE_S = 1.6
# Notes of one member: more are counted as if they were shown.
MOST_NOTES = 4096


class PoolKind(StrEnum):
    """What members do: one thing, or both."""

    PREFILL = "prefill"
    DECODE = "decode"
    UNIFIED = "unified"


@dataclass(frozen=True, slots=True)
class Sent:
    """What a route brings to a member: tokens to prefill, KV blocks' worth of tokens to hold, one
    request to decode or none, and whether it is urgent."""

    prefill_tokens: int = 0
    kv_tokens: int = 0
    requests: int = 0
    urgent: int = 0


class LoadRow:
    """One member: its newest report, and what was sent since. Read by policies, written by the
    table alone."""

    __slots__ = ("_notes", "heard_at", "kv_tokens", "load", "member", "prefill_tokens", "requests",
                 "urgent")  # fmt: skip

    def __init__(self, report: Report, now: float) -> None:
        self.member: Member = report.member
        self.load: MemberLoad = report.load
        self.heard_at = now
        self._notes: deque[tuple[float, Sent]] = deque()
        self.prefill_tokens = self.kv_tokens = self.requests = self.urgent = 0

    @property
    def waiting_tokens(self) -> int:
        """To be prefilled."""
        return self.load.waiting_tokens + self.prefill_tokens

    @property
    def batch(self) -> int:
        """Requests that it has."""
        return self.load.running + self.load.waiting + self.requests

    @property
    def free_blocks(self) -> int:
        """Less than 0 where more was sent than fits."""
        size = max(1, self.member.terms.block_size)
        return self.load.free_blocks - -(-self.kv_tokens // size)

    def hear(self, load: MemberLoad, now: float) -> None:
        self.load, self.heard_at = load, now
        self.drop_notes(now - SHOWN_S)

    def add_note(self, sent: Sent, now: float) -> None:
        self.drop_notes(now - NOTED_S)
        if len(self._notes) >= MOST_NOTES:
            self._drop_first()
        self._notes.append((now, sent))
        self._count(sent, 1)

    def drop_notes(self, before: float) -> None:
        while self._notes and self._notes[0][0] <= before:
            self._drop_first()

    def _drop_first(self) -> None:
        self._count(self._notes.popleft()[1], -1)

    def _count(self, sent: Sent, sign: int) -> None:
        self.prefill_tokens += sign * sent.prefill_tokens
        self.kv_tokens += sign * sent.kv_tokens
        self.requests += sign * sent.requests
        self.urgent += sign * sent.urgent


class _SlowMean:
    """Of what came lately, zeros passed over."""

    def __init__(self) -> None:
        self.value = 0.0

    def take(self, value: float) -> None:
        if value:
            self.value += (value - self.value) / 32 if self.value else value


class LoadTable:
    """``update`` and ``remove`` are fed by a view of the cluster."""

    def __init__(self) -> None:
        self._rows: dict[str, LoadRow] = {}
        self._pools: dict[tuple[str, PoolKind], list[LoadRow]] = {}
        self._places: dict[str, int] = {}  # in its pool
        self._heard = float("-inf")
        self._rate, self._step_s = _SlowMean(), _SlowMean()

    @property
    def typical_prefill_rate(self) -> float:
        """Of members that have measured it, as lately reported; 0 where none has."""
        return self._rate.value

    @property
    def typical_step_s(self) -> float:
        return self._step_s.value

    @property
    def rows(self) -> Mapping[str, LoadRow]:
        return self._rows

    def pool(self, compute_id: str, kind: PoolKind) -> Sequence[LoadRow]:
        """Members that take new requests, in no order that means anything. An empty ``compute_id``
        is that of members that name none."""
        return self._pools.get((compute_id, kind), ())

    def is_late(self, row: LoadRow) -> bool:
        return self._heard - row.heard_at > LATE_S

    def update(self, reports: Iterable[Report], now: float) -> None:
        for report in reports:
            self._heard = max(self._heard, now)
            self._rate.take(report.load.prefill_rate)
            self._step_s.take(report.load.step_s)
            row = self._rows.get(report.member.id)
            if row is None:
                row = self._rows[report.member.id] = LoadRow(report, now)
                self._enter(row)
                continue
            turned = row.load.draining != report.load.draining or row.member != report.member
            if turned:
                self._leave(row)
            row.member = report.member
            row.hear(report.load, now)
            if turned:
                self._enter(row)

    def remove(self, member_ids: Iterable[str]) -> None:
        for member_id in member_ids:
            row = self._rows.pop(member_id, None)
            if row is not None:
                self._leave(row)

    def note(self, member_id: str, sent: Sent, now: float) -> None:
        """No matter whether the member is still there."""
        row = self._rows.get(member_id)
        if row is not None:
            row.add_note(sent, now)

    def _enter(self, row: LoadRow) -> None:
        kind = _KINDS.get(row.member.role)
        if kind is None or row.load.draining:
            return
        pool = self._pools.setdefault((row.member.terms.compute_id, kind), [])
        self._places[row.member.id] = len(pool)
        pool.append(row)

    def _leave(self, row: LoadRow) -> None:
        place = self._places.pop(row.member.id, None)
        if place is None:
            return
        key = (row.member.terms.compute_id, _KINDS[row.member.role])
        pool = self._pools[key]
        last = pool.pop()
        if last is not row:
            pool[place] = last
            self._places[last.member.id] = place
        if not pool:
            del self._pools[key]


_KINDS = {
    Role.PREFILL: PoolKind.PREFILL,
    Role.DECODE: PoolKind.DECODE,
    Role.UNIFIED: PoolKind.UNIFIED,
}
