"""The pricing problems of ``placement/columns.h`` in Python: the same answers, slowly.

The oracle for the native half and the fallback where it is not built. ``price`` and ``cover`` find
the same columns and value where they are complete, and limits that hold where they are not;
``descend`` takes the same decisions. Arguments are those of ``pricing``, checked there.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moeserve.placement.solvers.columns.layer import TOKEN, ColumnLayer
from moeserve.placement.solvers.twin import Random

I32 = NDArray[np.int32]
I64 = NDArray[np.int64]
Bits = NDArray[np.bool_]

_WIDEST = 16
_MOST = (1 << 63) // 4

Found = tuple[I32, I64]


@dataclass(eq=False)
class _Columns:
    """Columns found, with ascending items."""

    size: int
    items: list[list[int]] = field(default_factory=list)
    reduced: list[int] = field(default_factory=list)

    def keep(self, items: list[int], reduced: int) -> None:
        self.items.append(sorted(items) + [-1] * (self.size - len(items)))
        self.reduced.append(reduced)

    def arrays(self) -> Found:
        item_CM = np.array(self.items, np.int32).reshape(-1, self.size)
        return item_CM, np.array(self.reduced, np.int64)

    def halve(self) -> int:
        """Keeps those below the median, which it returns."""
        median = sorted(self.reduced)[len(self.reduced) // 2]
        kept = [c for c, reduced in enumerate(self.reduced) if reduced < median]
        self.items = [self.items[c] for c in kept]
        self.reduced = [self.reduced[c] for c in kept]
        return median


class _Pricing:
    """Depth first over the candidates, the most promising first."""

    def __init__(self, layer: ColumnLayer, price_E: I64, threshold: int):
        self.uses_EP = layer.uses_EP()
        self.weight_P = layer.weight_P.astype(np.int64)
        self.load_E, self.price_E = layer.load_E, price_E
        self.limits = (layer.least_load, layer.most_load)
        self.size, self.at_most = layer.size, layer.at_most
        self.width = layer.item_PK.shape[1]
        self.threshold = threshold
        self.floor_E = np.full(layer.items, _MOST, np.int64)  # of what was left unseen
        self.found = _Columns(layer.size)
        self.nodes = 0

    def run(self, most: int, fewer: bool, nodes: int, seconds: float, cpu: bool) -> bool:
        self.most, self.fewer, self.most_nodes = most, fewer, nodes
        self.clock = time.thread_time if cpu else time.monotonic
        self.ends = self.clock() + min(seconds, 1e9)
        self.stopped = False
        everyone = np.arange(len(self.load_E), dtype=np.int64)
        self._visit([], 0, everyone, np.zeros(len(self.weight_P), np.bool_), -_MOST)
        self.floor_E = np.minimum(self.floor_E, self.threshold)
        for items, reduced in zip(self.found.items, self.found.reduced, strict=True):
            chosen = [e for e in items if e >= 0]
            self.floor_E[chosen] = np.minimum(self.floor_E[chosen], reduced)
        return not self.stopped

    def _hit(self, chosen: list[int], value: int) -> None:
        load = int(self.load_E[chosen].sum())
        if value < self.threshold and self.limits[0] <= load <= self.limits[1]:
            self.found.keep(chosen, value)
            if len(self.found.items) >= self.most:
                if self.fewer:
                    self.threshold = self.found.halve()
                else:
                    self.stopped = True

    def _least(self, candidates: I64, touched_P: Bits, partners: int) -> I64:
        """[candidates]: as ``Pricing::share``."""
        weight_P = np.where(touched_P, 0, self.weight_P)
        uses = self.uses_EP[candidates].astype(np.int64)
        pair = (uses * weight_P) @ uses.T
        n = pair.diagonal().copy()
        np.fill_diagonal(pair, 0)
        with_ = -np.sort(-pair, axis=1)[:, :partners].sum(axis=1)
        most = min(self.width, partners + 1)
        best = n * (TOKEN // most) if most <= _WIDEST else np.zeros_like(n)
        for s in range(1, min(most, _WIDEST - 1) + 1):
            best = np.maximum(best, 2 * n * (TOKEN // (s + 1)) - with_ * (TOKEN // (s * (s + 1))))
        return best - self.price_E[candidates]

    def _visit(
        self, chosen: list[int], value: int, candidates: I64, touched_P: Bits, lower: int
    ) -> None:
        self.nodes += 1
        self.stopped = self.stopped or self.nodes > self.most_nodes or self.clock() > self.ends
        rest = self.size - len(chosen)
        if self.stopped:
            self._leave(chosen, candidates, lower)
            return
        if chosen and (self.at_most or not rest):
            self._hit(chosen, value)
        if not rest or (len(candidates) < rest and not self.at_most):
            return
        least = self._least(candidates, touched_P, rest - 1)
        order = np.lexsort((candidates, least))
        candidates, least = candidates[order], least[order]
        joining = np.minimum(least, 0) if self.at_most else least
        for i in range(len(candidates) if self.at_most else len(candidates) - rest + 1):
            below = value + int(least[i]) + int(joining[i + 1 : i + rest].sum())
            if below >= self.threshold:
                break
            if self.stopped:
                self._leave(chosen, candidates[i:], below)
                break
            e = int(candidates[i])
            fresh_P = self.uses_EP[e] & ~touched_P
            more = int(self.weight_P[fresh_P].sum()) * TOKEN - int(self.price_E[e])
            self._visit([*chosen, e], value + more, candidates[i + 1 :], touched_P | fresh_P, below)

    def _leave(self, chosen: list[int], candidates: I64, lower: int) -> None:
        """No column of these, of which none was looked into further, is cheaper."""
        for items in (chosen, candidates):
            self.floor_E[items] = np.minimum(self.floor_E[items], lower)


def price(
    layer: ColumnLayer, price_E: I64, threshold: int, most: int, fewer: bool, nodes: int,
    seconds: float, cpu: bool = False,
) -> tuple[I32, I64, I64, bool, int]:  # fmt: skip
    search = _Pricing(layer, price_E, threshold)
    complete = search.run(most, fewer, nodes, seconds, cpu)
    item_CM, reduced_C = search.found.arrays()
    return item_CM, reduced_C, search.floor_E, complete, search.nodes


class _Descent:
    """A column that is changed by the best swap, summed anew each time."""

    def __init__(self, layer: ColumnLayer, price_E: I64):
        self.uses_EP = layer.uses_EP()
        self.weight_P = layer.weight_P.astype(np.int64)
        self.load_E, self.price_E = layer.load_E, price_E
        self.size, self.at_most = layer.size, layer.at_most
        self.least, self.most = layer.least_load, layer.most_load
        self.items: list[int] = []

    def value(self, items: list[int]) -> int:
        tokens = int(self.weight_P[self.uses_EP[items].any(axis=0)].sum()) if items else 0
        return tokens * TOKEN - int(self.price_E[items].sum())

    def load(self, items: list[int]) -> int:
        return int(self.load_E[items].sum())

    def over(self, load: int, whole: bool) -> int:
        off = max(0, load - self.most) + (max(0, self.least - load) if whole else 0)
        return _MOST // 2 if off > _MOST // TOKEN else TOKEN // 4 * off

    def complete(self, random: Random) -> None:
        patterns_E = self.uses_EP.sum(axis=1)
        while len(self.items) < self.size:
            best, pick, now = _MOST, -1, self.value(self.items)
            for e in range(len(self.load_E)):
                noise = random.draw() % 1024
                if e in self.items:
                    continue
                with_ = self.value([*self.items, e]) - now
                with_ += int(patterns_E[e]) * (TOKEN // 8192) * noise
                with_ += self.over(self.load(self.items) + int(self.load_E[e]), False)
                if with_ < best:
                    best, pick = with_, e
            if pick < 0 or (self.at_most and best >= 0 and self.items):
                return
            self.items.append(pick)

    def changes(self) -> list[tuple[int, int]]:
        """(item out or -1, item in or -1), in the order in which ties are decided."""
        outside = [f for f in range(len(self.load_E)) if f not in self.items]
        changes = []
        for e in self.items:
            changes += [(e, -1)] if self.at_most and len(self.items) > 1 else []
            changes += [(e, f) for f in outside]
        if self.at_most and len(self.items) < self.size:
            changes += [(-1, f) for f in outside]
        return changes

    def changed(self, out: int, into: int) -> list[int]:
        items = [e for e in self.items if e != out]
        return [*items, into] if into >= 0 else items

    def improve(self) -> bool:
        """The best change, where one helps."""
        now = self.value(self.items) + self.over(self.load(self.items), True)
        best, chosen = 0, None
        for out, into in self.changes():
            items = self.changed(out, into)
            gain = self.value(items) - now + self.over(self.load(items), True)
            if gain < best:
                best, chosen = gain, items
        if chosen is None:
            return False
        self.items = chosen
        return True

    def allowed(self) -> bool:
        full = self.at_most or len(self.items) == self.size
        return full and self.least <= self.load(self.items) <= self.most


def descend(
    layer: ColumnLayer, price_E: I64, start_CM: I32, threshold: int, most: int, seed: int
) -> Found:
    size = layer.size
    found, random = _Columns(size), Random(seed)
    met: set[tuple[int, ...]] = set()
    descent = _Descent(layer, price_E)
    for start in start_CM.tolist():
        descent.items = [e for e in start if e >= 0]
        descent.complete(random)
        for move in range(8 * size + 1):
            key = tuple(sorted(descent.items))
            reduced = descent.value(descent.items)
            wanted = descent.allowed() and reduced < threshold and len(found.items) < most
            if wanted and key not in met:
                met.add(key)
                found.keep(descent.items, reduced)
            if move == 8 * size or not descent.improve():
                break
    return found.arrays()


class _Covering:
    """Each item in turn: a column that has it, or the one column that is not in the list."""

    def __init__(self, layer: _Descent, item_CM: I32, reduced_C: I64, whole: int, budget: int):
        self.layer, self.whole, self.best = layer, whole, budget
        self.columns = [frozenset(items) for items in item_CM.tolist()]
        self.reduced = [int(x) for x in reduced_C]
        self.places = len(layer.load_E) // layer.size
        self.blocks: list[frozenset[int]] = []
        self.nodes = 0

    def run(self, nodes: int, seconds: float, cpu: bool) -> bool:
        self.clock = time.thread_time if cpu else time.monotonic
        self.most_nodes, self.ends = nodes, self.clock() + min(seconds, 1e9)
        self.stopped = False
        everyone = frozenset(range(len(self.layer.load_E)))
        self._visit([], 0, everyone, frozenset(), list(range(len(self.columns))))
        return not self.stopped

    def _visit(
        self, chosen: list[int], value: int, open_: frozenset[int], implied: frozenset[int],
        listed: list[int],
    ) -> None:  # fmt: skip
        self.nodes += 1
        self.stopped = self.stopped or self.nodes > self.most_nodes or self.clock() > self.ends
        if self.stopped:
            return
        if len(chosen) == self.places - 1:
            self._finish(chosen, value, open_ | implied)
            return
        pick = min(open_, key=lambda e: (sum(e in self.columns[c] for c in listed), e))
        for c in listed:
            with_ = value + self.reduced[c]
            if pick in self.columns[c] and with_ + (self.whole + 1) * bool(implied) < self.best:
                rest = [x for x in listed if not self.columns[x] & self.columns[c]]
                self._visit([*chosen, c], with_, open_ - self.columns[c], implied, rest)
        if len(implied) < self.layer.size and value + self.whole + 1 < self.best:
            rest = [x for x in listed if pick not in self.columns[x]]
            self._visit(chosen, value, open_ - {pick}, implied | {pick}, rest)

    def _finish(self, chosen: list[int], value: int, last: frozenset[int]) -> None:
        self.layer.items = sorted(last)
        value += self.layer.value(self.layer.items)
        if self.layer.allowed() and value < self.best:
            self.best = value
            self.blocks = [*(self.columns[c] for c in chosen), last]


def cover(
    layer: ColumnLayer, price_E: I64, columns: Found, whole: int, budget: int, nodes: int,
    seconds: float, cpu: bool = False,
) -> tuple[I32, int, bool, int]:  # fmt: skip
    search = _Covering(_Descent(layer, price_E), *columns, whole, budget)
    complete = search.run(nodes, seconds, cpu)
    block_E = np.zeros(layer.items if search.blocks else 0, np.int32)
    for d, block in enumerate(search.blocks):
        block_E[list(block)] = d
    return block_E, search.best, complete, search.nodes
