"""The member that can go on decoding longest, with virtual usage (Llumnix, OSDI 2024, section 4).

Freeness is the steps that a member can decode before its memory is full: what is free of it over
its batch, for each request takes a token's KV with each step. What is used is partly virtual, so
that one number serves several ends:

* prompts that wait count as if they were there, so a queue can make freeness negative;
* requests that are urgent come with headroom, which others stay out of;
* a member that drains counts as overfull, whatever it holds.

New requests go where freeness is greatest. ``rebalance`` pairs those who should give requests away
with those who can take them. Prompts are prefilled where the queue is shortest in time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from moeserve.pools.members import Role
from moeserve.pools.routing.base import Route, RouteWanted, RoutingPolicy
from moeserve.pools.routing.choosing import Windows, by_cost
from moeserve.pools.routing.least_finish import MOST_ALTERNATES, look
from moeserve.pools.routing.loads import LoadRow, LoadTable
from moeserve.pools.routing.predict import ASSUMED, Assumed, prefill_s


@dataclass(frozen=True, slots=True)
class Headroom:
    """``share`` of a member's memory that stays free of others while it runs urgent requests."""

    share: float = 0.2


HEADROOM = Headroom()


def freeness(row: LoadRow, headroom: Headroom = HEADROOM, *, urgent: bool = False) -> float:
    """Steps, in tokens of each request; negative where more is wanted than there is, -inf for a
    member that drains. ``urgent`` is as a request sees it that may use the headroom."""
    if row.load.draining:
        return -math.inf
    size = max(1, row.member.terms.block_size)
    free_tokens = row.free_blocks * size - row.load.waiting_tokens
    if row.urgent + row.load.urgent and not urgent:
        free_tokens -= int(headroom.share * row.load.total_blocks * size)
    # A batch that halves doubles the steps that are left, but less than nothing stays so.
    return free_tokens / max(1, row.batch) if free_tokens > 0 else float(free_tokens)


class MostFree(RoutingPolicy):
    """``start`` differs between gateways."""

    def __init__(
        self, headroom: Headroom = HEADROOM, assumed: Assumed = ASSUMED, start: int = 0
    ) -> None:
        self._headroom = headroom
        self._assumed = assumed
        self._windows = Windows(start)

    def choose(self, wanted: RouteWanted, table: LoadTable, now: float) -> Route | None:
        rows = look(self._windows, wanted, table, now)
        urgent = wanted.priority > 0
        decodes = by_cost(rows.decode, lambda row: -freeness(row, self._headroom, urgent=urgent))
        if not decodes:
            return None
        first = decodes[0][1]
        prefills = by_cost(
            rows.prefill,
            lambda row: prefill_s(row, wanted.prompt_tokens, table, self._assumed),
        )
        # Who can prefill, too, does so itself, but for members that do nothing else.
        alone = any(row is first for _, row in prefills)
        others = [
            row.member
            for _, row in prefills
            if row is not first and not (alone and row.member.role is Role.UNIFIED)
        ]
        prefill = others[0] if others else None
        return Route(first.member, prefill, tuple(others[1 : 1 + MOST_ALTERNATES]))

    def note(self, wanted: RouteWanted, route: Route) -> None:
        """Nothing is remembered but by the table."""


@dataclass(frozen=True, slots=True)
class Move:
    """One running request, or more, should go from ``source`` to ``target``."""

    source: str
    target: str


def rebalance(
    rows: Iterable[LoadRow], *, low: float, high: float, headroom: Headroom = HEADROOM
) -> tuple[Move, ...]:
    """Pairs members that are less free than ``low``, the least free first, with those that are
    freer than ``high``, the freest first. Each is in one pair at most; members of a pair compute
    the same and decode, and a source has requests to give."""
    assert low <= high, (low, high)
    decoding = [(freeness(row, headroom), row) for row in rows if row.member.role.decodes]
    ordered = sorted(decoding, key=lambda pair: (pair[0], pair[1].member.id))
    targets = [row for free, row in reversed(ordered) if free > high]
    moves = []
    for free, row in ordered:
        if free >= low or not row.load.running:
            continue
        same = row.member.terms.compute_id
        target = next((t for t in targets if t.member.terms.compute_id == same), None)
        if target is not None:
            targets.remove(target)
            moves.append(Move(row.member.id, target.member.id))
    return tuple(moves)
