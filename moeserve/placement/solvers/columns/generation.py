"""A bound on one layer and a better cover of it, in steps, to be stopped after any of them.

Where groups are large, a bound on pairs of items comes first (``pairs``). Then, for any prices u of
items, a cover of D columns costs at least sum(u) + D * floor, where no allowed column has a reduced
cost (its cost less the prices of its items) below ``floor``. So every exact search for columns
gives a bound, finished or not, whatever the prices are. Good prices are the dual values of a master
problem over the columns found so far.

1. Columns by descent from the best covers, until they change the master's value no more.
2. Exact searches for columns that are cheaper than their items by more than a slack; what they find
   enters the master. The slack falls as searches find nothing: 10 % of the value first, then less.
3. With a slack of 0, or where time is short: columns of reduced cost up to half of a budget above
   the bound are enumerated, and covers of that budget looked for among them; all but one column of
   such a cover are in the list. The budget grows until a cover is found (it is the best there is)
   or reaches the best cover known (which then is).
4. Where that is too much work but few columns are as dear as the gap, an integer program over these
   (``ilp``) finds the best cover; else step 3 goes on where it gave up, with more nodes. Only where
   time is limited by the clock.

Pure: the time that a step may take comes with the call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from moeserve.placement.solvers import ilp
from moeserve.placement.solvers.columns import pricing
from moeserve.placement.solvers.columns.layer import TOKEN, CertifiedLayer, ColumnLayer
from moeserve.placement.solvers.columns.master import Master, MasterSolution, master_of
from moeserve.placement.solvers.columns.pairs import PairBound
from moeserve.placement.solvers.columns.pricing import Effort

F64 = NDArray[np.float64]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]

# The slacks, and how far above them columns are collected too: the search takes hardly longer,
# and the master needs them soon. In parts of a place's share of the value.
_SLACKS = ((0.1, 0.02), (0.05, 0.02), (0.02, 0.01), (0.01, 0.005), (0.0, 0.002))
_QUICK = 50_000  # nodes: after a search with fewer, the last slack but one is left out
_BUDGETS = (0.03, 0.06, 0.12, 0.25, 0.5, 1.0)  # of the gap
_PROVEN = 1_000_000  # nodes of one search for covers of a budget, at first
_MOST_AGAIN = 5
_MOST_PROGRAMMED = 8000  # columns of an integer program
_EXPLORED = 300_000  # nodes of the search for a better cover that is no proof
_LARGE = 17  # items of a column, from which on pairs are bounded first
_PAIR_STEPS, _MOST_PAIR_STEPS = 100, 800  # of one turn, of all
_OUTSIDE = 1.1  # of its share of the first cover, what an item outside of columns costs at first
_DEARER = 1.5  # times that, while items are left outside
_CLOSE = 0.002  # of the master's value: descents end where the estimate is so near to it
_SMOOTH = 0.5  # of the prices that gave the best estimate so far, against the newest
_INSIDE = 0.02  # items that the master may leave outside
_ROUNDS = 100  # of descents, before an exact search at the latest
_SEEDS, _ACTIVE = 16, 24  # descents of a round: from single items, from columns in use
_MOST_FOUND = 300  # columns of one round of descents that enter the master
_MOST_SEARCHED = 2000  # of one exact search
_FEWER = 0.2  # of the margin, after a search that found many
_MOST_LISTED = 200_000  # columns for covers
_EPSILON = TOKEN // 1024  # a reduced cost this close to 0 is none


class Stage(Enum):
    DESCEND = "descend"
    PAIRS = "pairs"
    SEARCH = "search"
    COVER = "cover"
    PROGRAM = "program"
    DONE = "done"


class ColumnSearch:
    """Owns the columns, the master and the best bound of one layer.

    ``covers_XE`` are covers to begin with, [place of each item]; those that are not allowed give
    columns but are not taken as the best. ``bound`` and ``best`` only ever get better.
    """

    def __init__(self, layer: ColumnLayer, covers_XE: Sequence[I32], *, branch: bool = True):
        self.layer = layer
        large = layer.size >= _LARGE and PairBound.fits(layer)
        self._pairs = PairBound(layer) if large else None
        self.stage = Stage.PAIRS if large else Stage.DESCEND
        self.bound = _at_least(layer)
        self.best: int | None = None
        self.block_E: I32 | None = None
        self._branch = branch and not layer.at_most
        self._alone_E = layer.alone_E()
        begins_E = layer.shares_of(covers_XE[0]) / TOKEN
        self._master: Master = master_of(
            layer.items, layer.size, layer.places, _OUTSIDE * begins_E + 1.0, counted=layer.at_most
        )
        self._known: set[bytes] = set()
        self._fresh_CM = np.zeros((0, layer.size), np.int32)  # from the last exact search
        self._columns_CM = np.zeros((0, layer.size), np.int32)
        self._first_cost = layer.cost_of(covers_XE[0])
        for block_E in covers_XE:
            self._begin_with(block_E)
        self._prices_E: I64 | None = None  # those of the bound, no column cheaper than its items
        self._floors: tuple[I64, I64] | None = None  # prices, and floors that are known at them
        self._rung = 0
        self._round = 0
        self._again = 0  # times that step 3 was begun anew, with 8 times the nodes each
        self._left_at: int | None = None  # the budget whose covers were not all looked at
        self._margin = 1.0  # of what an exact search collects above its slack
        self._centre_E: F64 | None = begins_E
        self._estimate = -np.inf
        self._solution: MasterSolution | None = None

    @property
    def done(self) -> bool:
        return self.stage is Stage.DONE

    @property
    def progress(self) -> int:
        """How far the search is: those with less should go first."""
        behind = {Stage.COVER: len(_SLACKS), Stage.PROGRAM: len(_SLACKS) + len(_BUDGETS)}
        return self._rung + behind.get(self.stage, 0) + self._again * (len(_BUDGETS) + 1)

    def cost(self) -> int:
        """Of the best cover known, allowed or not where none is."""
        return self._first_cost if self.best is None else self.best

    def certified(self) -> CertifiedLayer:
        tokens = self.layer.in_tokens
        best = np.inf if self.best is None else tokens(self.best)
        return CertifiedLayer(min(tokens(self.bound), best), best, self.block_E)

    def step(self, effort: Effort) -> None:
        """One search, within ``effort``; then a look at whether anything is left to do."""
        if not len(self.layer.weight_P) or self.layer.places == 1:
            self.stage = Stage.DONE
            return
        if self.stage is Stage.DESCEND:
            self._descend_once()
        elif self.stage is Stage.PAIRS:
            self._bound_pairs()
        elif self.stage is Stage.SEARCH:
            self._search(effort)
        elif self.stage is Stage.COVER:
            self._cover(effort)
        elif self.stage is Stage.PROGRAM:
            self._program(effort)
        if self.best is not None and self.bound > self.best - TOKEN:
            self.bound = self.best
            self.stage = Stage.DONE

    def _begin_with(self, block_E: I32) -> None:
        layer = self.layer
        sets = [np.flatnonzero(block_E == d) for d in range(layer.places)]
        columns_CM = np.full((layer.places, layer.size), -1, np.int32)
        for d, items in enumerate(sets):
            if len(items) > layer.size:
                return
            columns_CM[d, : len(items)] = items
        self._add(columns_CM[[len(items) > 0 for items in sets]])
        cost = layer.cost_of(block_E)
        if layer.allows(block_E) and (self.best is None or cost < self.best):
            self.best = cost

    def _add(self, item_CM: I32, cost_C: I64 | None = None) -> int:
        fresh = []
        for c, items in enumerate(item_CM):
            key = items.tobytes()
            if key not in self._known:
                self._known.add(key)
                fresh.append(c)
        if fresh:
            columns_CM = np.ascontiguousarray(item_CM[fresh])
            costs = self.layer.costs_of(columns_CM) if cost_C is None else cost_C[fresh]
            self._master.add(columns_CM, costs / TOKEN)
            self._columns_CM = np.concatenate((self._columns_CM, columns_CM))
        return len(fresh)

    def _solve(self) -> MasterSolution:
        self._solution = self._master.solve()
        return self._solution

    def _bound_pairs(self) -> None:
        assert self._pairs is not None
        self.bound = max(self.bound, self._pairs.run(_PAIR_STEPS))
        if self._pairs.steps >= _MOST_PAIR_STEPS:
            self._pairs, self.stage = None, Stage.DESCEND

    def _descend_once(self) -> None:
        """One round of step 1: smoothed prices first, the master's own when those give nothing."""
        solution = self._solution or self._solve()
        if self._centre_E is None:
            self._centre_E = solution.price_E
        smooth_E = _SMOOTH * self._centre_E + (1 - _SMOOTH) * solution.price_E
        found = self._descents(_whole(smooth_E), solution)
        if found > 0:
            self._solve()
            if self._is_close():
                self.stage = Stage.SEARCH
        elif self._descents(_whole(solution.price_E), solution) > 0:
            self._centre_E = solution.price_E
            self._solve()
        elif self._left_outside(solution):
            self._master.dearer(_DEARER)
            self._solve()
        else:
            self.stage = Stage.SEARCH
        self._round += 1
        if self._round % _ROUNDS == 0:
            self.stage = Stage.SEARCH

    def _is_close(self) -> bool:
        assert self._solution is not None
        value = self._solution.value * TOKEN
        return value - self._estimate < _CLOSE * value

    def _left_outside(self, solution: MasterSolution) -> bool:
        """Whether the master still leaves items outside of all columns, but for rounding."""
        items_C = (self._columns_CM >= 0).sum(axis=1)
        return float(solution.share_C @ items_C) < self.layer.items - _INSIDE

    def _descents(self, price_E: I64, solution: MasterSolution) -> int:
        layer = self.layer
        used = np.argsort(-solution.share_C, kind="stable")[:_ACTIVE]
        seeds = np.full((min(_SEEDS, layer.items), layer.size), -1, np.int32)
        seeds[:, 0] = (np.arange(len(seeds)) + self._round * _SEEDS) % layer.items
        starts = np.concatenate((self._columns_CM[used], self._fresh_CM, seeds))
        below = _whole_one(solution.place_price) - _EPSILON
        item_CM, reduced_C = pricing.descend(
            layer, price_E, starts, below, most=2 * _MOST_FOUND, seed=self._round
        )
        self._note_estimate(price_E, reduced_C, below)
        cost_C = reduced_C + _sums(price_E, item_CM)
        now_C = cost_C - _sums(_whole(solution.price_E), item_CM)
        better = np.argsort(now_C, kind="stable")[:_MOST_FOUND]
        better = better[now_C[better] < below]
        return self._add(item_CM[better], cost_C[better])

    def _note_estimate(self, price_E: I64, reduced_C: I64, below: int) -> None:
        """The bound these prices would give if the descents had met the cheapest column."""
        floor = int(min(reduced_C.min(initial=below), below))
        estimate = int(price_E.sum()) + self.layer.places * floor
        if estimate > self._estimate:
            self._estimate, self._centre_E = estimate, price_E / TOKEN

    def _search(self, effort: Effort) -> None:
        """One exact search of step 2."""
        solution = self._solution or self._solve()
        price_E = _whole(solution.price_E)
        share = solution.value / self.layer.places
        slack, more = _SLACKS[self._rung]
        closed = _whole_one(solution.place_price - slack * share) - _EPSILON
        threshold = closed + _whole_one(more * self._margin * share)
        found = pricing.price(
            self.layer, price_E, threshold, most=_MOST_SEARCHED, effort=effort, fewer=True
        )
        self._certify(price_E, self._known_floors(price_E, found.floor_E))
        self._add(found.item_CM, found.reduced_C + _sums(price_E, found.item_CM))
        below = found.reduced_C < closed
        if below.any():
            cheapest = np.argsort(found.reduced_C, kind="stable")[:_ACTIVE]
            self._fresh_CM = found.item_CM[cheapest]
            self._centre_E = self._solve().price_E
            self.stage = Stage.DESCEND
        elif found.complete:
            self._rung += 1
            if found.nodes < _QUICK and self._rung == len(_SLACKS) - 2:
                self._rung += 1
        if len(found.reduced_C) > _MOST_SEARCHED // 2:
            self._margin *= _FEWER
        if self._rung == len(_SLACKS) or not (found.complete or below.any()):
            self.stage = Stage.COVER if self._branch else Stage.DONE
            self._rung = 0

    def _known_floors(self, price_E: I64, floor_E: I64) -> I64:
        """With what the last search showed, where it was at the same prices."""
        if self._floors is not None and (self._floors[0] == price_E).all():
            floor_E = np.maximum(floor_E, self._floors[1])
        self._floors = (price_E, floor_E)
        return floor_E

    def _certify(self, price_E: I64, floor_E: I64) -> None:
        """``floor_E`` are those of an exact search at these prices.

        A column costs at least the prices of its items and the mean of their floors, so every price
        rises by its floor divided by ``size``. A column of fewer items has but the least floor.
        """
        layer = self.layer
        dear_E = np.maximum(price_E, 0)
        floor_E = np.maximum(floor_E, -int(np.sort(dear_E)[-layer.size :].sum()))  # costs are >= 0
        if layer.at_most:
            bound = int(price_E.sum()) + layer.places * min(0, int(floor_E.min()))
            certain_E = price_E
        else:
            certain_E = price_E + floor_E // layer.size
            bound = int(certain_E.sum())
        bound = -(-bound // TOKEN) * TOKEN  # costs are whole tokens
        if bound <= 0:  # a search that was stopped early: prices of 0 are as good
            bound, certain_E = 0, np.zeros_like(price_E)
        if bound > self.bound or self._prices_E is None:
            self.bound, self._prices_E = max(self.bound, bound), certain_E

    def _cover(self, effort: Effort) -> None:
        """One budget of step 3."""
        layer, price_E, best = self.layer, self._prices_E, self.best
        assert price_E is not None
        base = int(price_E.sum())
        if best is None:  # nothing to be better than: each item alone is dearer than any cover
            best = int(self._alone_E.sum()) + 1
        gap = best - base
        budget = gap if _BUDGETS[self._rung] == 1.0 else int(gap * _BUDGETS[self._rung])
        whole = budget // 2
        listed = pricing.price(layer, price_E, whole + 1, most=_MOST_LISTED, effort=effort)
        proof = Effort(min(_PROVEN << 3 * self._again, effort.nodes), effort.seconds, effort.cpu)
        found = pricing.cover(layer, price_E, listed, whole=whole, budget=budget, effort=proof)
        proof_ended = found.complete
        if listed.complete and found.complete:
            self.bound = max(self.bound, -(-(base + found.value) // TOKEN) * TOKEN)
        if found.block_E is None and budget < gap:
            few = Effort(
                min(_EXPLORED << 3 * self._again, effort.nodes), effort.seconds, effort.cpu
            )
            found = pricing.cover(layer, price_E, listed, whole=whole, budget=gap, effort=few)
        if found.block_E is not None:
            self.best, self.block_E = base + found.value, found.block_E
        self._rung += 1
        if not (listed.complete and proof_ended) or self._rung == len(_BUDGETS):
            self._left_at = self._rung - 1 if listed.complete and not proof_ended else None
            self.stage, self._rung = Stage.PROGRAM, 0

    def _program(self, effort: Effort) -> None:
        """Step 4; then step 3 again with more nodes, where time is limited by the clock."""
        self._program_once(effort)
        if self._left_at is None or math.isinf(effort.seconds) or self._again == _MOST_AGAIN:
            self.stage = Stage.DONE
        else:
            self.stage, self._rung = Stage.COVER, self._left_at
            self._again += 1

    def _program_once(self, effort: Effort) -> None:
        layer, price_E, best = self.layer, self._prices_E, self.best
        if price_E is None or best is None or math.isinf(effort.seconds) or effort.seconds < 1:
            return
        gap = best - int(price_E.sum())
        half_s = effort.seconds / 2  # for each of both
        half = Effort(effort.nodes, half_s, effort.cpu)
        listed = pricing.price(layer, price_E, gap + 1, most=_MOST_PROGRAMMED, effort=half)
        if not listed.complete:
            return
        cost_C = (listed.reduced_C + _sums(price_E, listed.item_CM)) // TOKEN
        found = ilp.cover_items(listed.item_CM, cost_C.astype(np.float64), limit=half_s)
        if found is None or not layer.allows(found.device_E):
            return
        cost = layer.cost_of(found.device_E)
        if cost < best:
            self.best, self.block_E = cost, found.device_E
        if found.proven and round(found.value) * TOKEN == cost:
            self.bound = max(self.bound, cost)


def _at_least(layer: ColumnLayer) -> int:
    """Each pattern needs as many columns as its items fill."""
    choices_P = (layer.item_PK >= 0).sum(axis=1)
    places_P = -(-choices_P // layer.size)
    return int(places_P @ layer.weight_P.astype(np.int64)) * TOKEN


def _sums(price_E: I64, item_CM: I32) -> I64:
    sums: I64 = np.append(price_E, 0)[item_CM].sum(axis=1)
    return sums


def _whole(price_E: F64) -> I64:
    return np.rint(price_E * TOKEN).astype(np.int64)


def _whole_one(price: float) -> int:
    return round(price * TOKEN)
