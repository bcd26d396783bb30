"""The route with the least predicted finish, over members that are looked at.

1. The best that prefills, the best that decodes, and the best unified one that would do both.
2. Two members if one prefills and another decodes sooner, the KV's way included, than one alone.
3. Where nobody prefills for others, whoever decodes computes the prompt.

A unified member that leans to one side is not looked at for the other, unless there is nobody else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moeserve.pools.members import Role
from moeserve.pools.routing.base import Route, RouteWanted
from moeserve.pools.routing.choosing import Windows, by_cost
from moeserve.pools.routing.loads import LoadRow, LoadTable, PoolKind
from moeserve.pools.routing.predict import Assumed, decode_s, prefill_s, transfer_s

# Sources of KV that are named beside the best.
MOST_ALTERNATES = 2


@dataclass(frozen=True, slots=True)
class LookedAt:
    """Members that take new requests: for prefill, for decode, and unified ones for both."""

    prefill: Sequence[LoadRow]
    decode: Sequence[LoadRow]
    both: Sequence[LoadRow]


def look(windows: Windows, wanted: RouteWanted, table: LoadTable, now: float) -> LookedAt:
    prefill, decode, unified = (
        windows.look(table, wanted.compute_id, kind, wanted.exclude, now) for kind in PoolKind
    )
    return sort_out(prefill, decode, unified)


def sort_out(
    prefill: Sequence[LoadRow], decode: Sequence[LoadRow], unified: Sequence[LoadRow]
) -> LookedAt:
    """By what unified members lean to."""
    prefilling = [row for row in unified if row.load.leans is not Role.DECODE]
    decoding = [row for row in unified if row.load.leans is not Role.PREFILL]
    if not (decode or decoding):
        decoding = list(unified)
    both = [row for row in decoding if row.load.leans is not Role.DECODE]
    return LookedAt([*prefill, *prefilling], [*decode, *decoding], both)


def least_finish(
    wanted: RouteWanted,
    rows: LookedAt,
    table: LoadTable,
    assumed: Assumed,
    cached: Mapping[str, int],
) -> Route | None:
    """``cached`` is how many tokens of the prompt a member is thought to have."""

    def prefill_cost(row: LoadRow) -> float:
        left = max(0, wanted.prompt_tokens - cached.get(row.member.id, 0))
        return prefill_s(row, left, table, assumed)

    def decode_cost(row: LoadRow) -> float:
        return decode_s(row, wanted, table, assumed)

    decodes = by_cost(rows.decode, decode_cost)
    if not decodes:
        return None
    decode_at, decode = decodes[0]
    prefills = [
        (cost, row)
        for cost, row in by_cost(rows.prefill, prefill_cost)
        if row.member.id != decode.member.id
    ]
    alone = by_cost(rows.both, lambda row: prefill_cost(row) + decode_cost(row))
    if not prefills:
        return Route(alone[0][1].member if alone else decode.member)
    split_s = prefills[0][0] + transfer_s(decode, wanted.prompt_tokens, assumed) + decode_at
    if alone and alone[0][0] <= split_s:
        return Route(alone[0][1].member)
    first, *others = (row.member for _, row in prefills[: 1 + MOST_ALTERNATES])
    return Route(decode.member, first, tuple(others))
