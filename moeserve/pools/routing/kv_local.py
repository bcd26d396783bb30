"""The least predicted finish, drawn to members that were sent the same prefix.

A member that this gateway has sent a prefix to is thought to have its KV, so it is looked at too,
and only what is left of the prompt counts: it is chosen unless its queue costs more than the
prefill that it saves. What is remembered is bounded, and may be wrong: then a prompt is computed.

Of long prompts not every page is remembered: all of the first ``_EVERY``, and from there on ever
fewer, the same ones in every prompt. Whoever has a page has those before it, so the last that is
known is found by bisection: of 512 pages, 56 are remembered, and a choice looks for a dozen.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Iterable, Iterator

from moeserve.pools.members import Role
from moeserve.pools.routing.base import Route, RouteWanted, RoutingPolicy
from moeserve.pools.routing.choosing import Windows
from moeserve.pools.routing.least_finish import LookedAt, least_finish, look
from moeserve.pools.routing.loads import LoadRow, LoadTable
from moeserve.pools.routing.predict import ASSUMED, Assumed

# Pages that are remembered, and members that are looked at for what they have.
MOST_PAGES = 1 << 16
_MOST_FOUND = 2
_EVERY = 16


class _Holders:
    """By page, the two members that were sent it last, the later one first. At most ``most`` pages:
    when half of them were noted, the other half, which were noted before, is forgotten."""

    def __init__(self, most: int) -> None:
        self._half = max(1, most // 2)
        self._new: dict[bytes, tuple[str, ...]] = {}
        self._old: dict[bytes, tuple[str, ...]] = {}

    def __len__(self) -> int:
        return len(self._new) + len(self._old)

    def get(self, key: bytes) -> tuple[str, ...]:
        return self._new.get(key) or self._old.get(key, ())

    def note(self, keys: Iterable[bytes], member_id: str) -> None:
        """Pages of one prompt, the last first: what more prompts share is forgotten last. Where one
        is known already to be the member's, those before it are."""
        new, old = self._new, self._old
        for key in keys:
            known = new.get(key)
            if known is None:
                if len(new) >= self._half:
                    new, old = {}, new
                    self._new, self._old = new, old
                known = old.get(key)
            elif known[0] == member_id:
                return
            if known is None:
                new[key] = (member_id,)
            else:
                new[key] = known if known[0] == member_id else (member_id, known[0])


class KvLocal(RoutingPolicy):
    """``start`` differs between gateways. Keys are needed (``RouteWanted.keys``)."""

    def __init__(
        self, assumed: Assumed = ASSUMED, start: int = 0, most_pages: int = MOST_PAGES
    ) -> None:
        self._assumed = assumed
        self._windows = Windows(start)
        self._holders = _Holders(most_pages)

    def choose(self, wanted: RouteWanted, table: LoadTable, now: float) -> Route | None:
        cached = self._cached(wanted)
        rows = look(self._windows, wanted, table, now)
        if cached:
            rows = _add(rows, self._usable(cached, wanted, table))
        return least_finish(wanted, rows, table, self._assumed, cached)

    def note(self, wanted: RouteWanted, route: Route) -> None:
        where, keys = (route.prefill or route.decode).id, wanted.keys
        self._holders.note((keys[page] for page in reversed(_remembered(len(keys)))), where)

    def _cached(self, wanted: RouteWanted) -> dict[str, int]:
        """Tokens that members are thought to have, by member: whoever has most, and whoever has
        most of the others."""
        keys, found = wanted.keys, dict[str, int]()
        pages = _remembered(len(keys))

        def unknown(page: int) -> bool:
            known = self._holders.get(keys[page])
            return not known or (known[0] in found and known[-1] in found)

        for _ in range(_MOST_FOUND):
            pages = pages[: bisect_left(pages, True, key=unknown)]
            if not pages:
                break
            for member_id in self._holders.get(keys[pages[-1]]):
                found.setdefault(member_id, (pages[-1] + 1) * wanted.page_tokens)
            if len(found) >= _MOST_FOUND:
                break
        return found

    def _usable(
        self, cached: dict[str, int], wanted: RouteWanted, table: LoadTable
    ) -> Iterator[LoadRow]:
        for member_id in cached:
            row = table.rows.get(member_id)
            if (
                row is not None
                and member_id not in wanted.exclude
                and row.member.terms.compute_id == wanted.compute_id
                and not row.load.draining
                and not table.is_late(row)
            ):
                yield row


def _add(rows: LookedAt, more: Iterator[LoadRow]) -> LookedAt:
    """With those of ``more`` that were not looked at, for what they do and lean to."""
    prefill, decode, both = list(rows.prefill), list(rows.decode), list(rows.both)
    for row in more:
        role, leans = row.member.role, row.load.leans
        unified = role is Role.UNIFIED
        if role.prefills and not (unified and leans is Role.DECODE) and row not in prefill:
            prefill.append(row)
        if unified and leans is not Role.PREFILL and row not in decode:
            decode.append(row)
        if unified and leans is Role.UNIFIED and row not in both:
            both.append(row)
    return LookedAt(prefill, decode, both)


@functools.lru_cache(maxsize=4096)
def _remembered(pages: int) -> tuple[int, ...]:
    """Which pages of a prompt of so many are remembered."""
    found, page, step = [], 0, 1
    while page < pages:
        found.append(page)
        page += step
        if page >= _EVERY * step:
            step *= 2
    return tuple(found)
