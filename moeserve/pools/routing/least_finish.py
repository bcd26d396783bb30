"""The route with the least predicted finish, over members that are looked at.

1. The best two members of which one prefills and the other decodes, and the best unified one that
   would do both.
2. Two members if one prefills and another decodes sooner, the KV's way included, than one alone.
3. Where nobody prefills for others, whoever decodes computes the prompt.

A unified member that leans to one side is not looked at for the other, unless there is nobody else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moeserve.pools.members import Role
from moeserve.pools.routing.base import Route, RouteWanted
from moeserve.pools.routing.choosing import Costs, Windows, by_cost
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
    prefills = by_cost(rows.prefill, prefill_cost)
    alone = by_cost(rows.both, lambda row: prefill_cost(row) + decode_cost(row))
    pair = _best_pair(prefills, decodes)
    if pair is None:
        return Route((alone or decodes)[0][1].member)
    pair_s, prefill, decode = pair
    if alone and alone[0][0] <= pair_s + transfer_s(decode, wanted.prompt_tokens, assumed):
        return Route(alone[0][1].member)
    others = [row.member for _, row in prefills if row is not prefill and row is not decode]
    return Route(decode.member, prefill.member, tuple(others[:MOST_ALTERNATES]))


def _best_pair(prefills: Costs, decodes: Costs) -> tuple[float, LoadRow, LoadRow] | None:
    """Two different members with the least sum: it is among the best two of each."""
    pairs = [
        (prefill_at + decode_at, prefill, decode)
        for prefill_at, prefill in prefills[:2]
        for decode_at, decode in decodes[:2]
        if prefill is not decode
    ]
    return min(pairs, key=lambda pair: pair[0], default=None)
