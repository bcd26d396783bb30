"""The least predicted finish, drawn to members that were sent the same prefix.

A member that this gateway has sent a prefix to is thought to have its KV, so it is looked at too,
and only what is left of the prompt counts: it is chosen unless its queue costs more than the
prefill that it saves. What is remembered is bounded, and may be wrong: then a prompt is computed.

Of long prompts not every page is remembered: all of the first ``_EVERY``, and from there on ever
fewer, the same ones in every prompt, so that a choice looks for some dozens of keys at most.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterator

from moeserve.pools.members import Role
from moeserve.pools.routing.base import Route, RouteWanted, RoutingPolicy
from moeserve.pools.routing.choosing import Windows
from moeserve.pools.routing.least_finish import LookedAt, least_finish, look
from moeserve.pools.routing.loads import LoadRow, LoadTable
from moeserve.pools.routing.predict import ASSUMED, Assumed

# Pages that are remembered, the least lately used forgotten first; members of each; members that
# are looked at for what they have.
MOST_PAGES = 1 << 16
_MOST_HOLDERS = 2
_MOST_FOUND = 2
_EVERY = 16


class KvLocal(RoutingPolicy):
    """``start`` differs between gateways. Keys are needed (``RouteWanted.keys``)."""

    def __init__(
        self, assumed: Assumed = ASSUMED, start: int = 0, most_pages: int = MOST_PAGES
    ) -> None:
        self._assumed = assumed
        self._windows = Windows(start)
        self._most_pages = most_pages
        self._holders: OrderedDict[bytes, tuple[str, ...]] = OrderedDict()

    def choose(self, wanted: RouteWanted, table: LoadTable, now: float) -> Route | None:
        cached = self._cached(wanted)
        rows = look(self._windows, wanted, table, now)
        if cached:
            rows = _add(rows, self._usable(cached, wanted, table))
        return least_finish(wanted, rows, table, self._assumed, cached)

    def note(self, wanted: RouteWanted, route: Route) -> None:
        where = (route.prefill or route.decode).id
        for page in _remembered(len(wanted.keys)):
            key = wanted.keys[page]
            known = self._holders.get(key, ())
            if known[:1] != (where,):
                others = tuple(i for i in known if i != where)
                self._holders[key] = (where, *others[: _MOST_HOLDERS - 1])
            self._holders.move_to_end(key)
        while len(self._holders) > self._most_pages:
            self._holders.popitem(last=False)

    def _cached(self, wanted: RouteWanted) -> dict[str, int]:
        """Tokens that members are thought to have, by member: the longest prefixes first."""
        found: dict[str, int] = {}
        for page in reversed(_remembered(len(wanted.keys))):
            for member_id in self._holders.get(wanted.keys[page], ()):
                found.setdefault(member_id, (page + 1) * wanted.page_tokens)
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
