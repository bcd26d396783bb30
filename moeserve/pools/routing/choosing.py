"""The members that are looked at for a request: all of a small pool, a few of a large one.

A large pool is looked at window by window, so that every member is looked at equally often and a
choice costs the same however many there are: the least loaded of a few is nearly as good as that of
all, and does not send everybody to one (Mitzenmacher, The Power of Two Choices in Randomized Load
Balancing, 2001). In a small pool whoever is first changes from choice to choice, which spreads
those that are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set

from moeserve.pools.routing.loads import NOTED_S, LoadRow, LoadTable, PoolKind

FEW = 8

Costs = Sequence[tuple[float, LoadRow]]


class Windows:
    """Where the next look at each pool begins. Gateways beginning at different ``start`` do not go
    the same way."""

    def __init__(self, start: int = 0, few: int = FEW) -> None:
        self._few = few
        self._next = dict.fromkeys(PoolKind, start)

    def look(
        self, table: LoadTable, compute_id: str, kind: PoolKind, exclude: Set[str], now: float
    ) -> list[LoadRow]:
        """Some members that are not excluded: late ones only where there is no other."""
        pool = table.pool(compute_id, kind)
        size = len(pool)
        if not size:
            return []
        start = self._next[kind] % size
        self._next[kind] = start + (self._few if size > self._few else 1)
        found: list[LoadRow] = []
        late: list[LoadRow] = []
        for i in range(size):
            row = pool[(start + i) % size]
            if row.member.id in exclude:
                continue
            row.drop_notes(now - NOTED_S)
            (late if table.is_late(row) else found).append(row)
            if len(found) == self._few:
                break
        return found or late[: self._few]


def by_cost(rows: Iterable[LoadRow], cost: Callable[[LoadRow], float]) -> Costs:
    """Cheapest first; of those that are equal, whoever came first."""
    return sorted(((cost(row), row) for row in rows), key=_first)


def _first(pair: tuple[float, LoadRow]) -> float:
    return pair[0]
