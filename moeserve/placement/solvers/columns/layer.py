"""One layer as a problem of columns, in whole numbers, so that nothing is lost to rounding.

Items are experts, or copies of experts. A column is a set of items that one place (a device, or a
node) may hold. Letters: P patterns (tokens that chose the same items, counted together), K choices,
E items, C columns, M items of a column.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]

TOKEN = 720720  # the unit of costs is 1 / TOKEN of a token: see placement/columns.h
LOAD_UNITS = 16  # units of load per choice of a token
ANY_LOAD = 1 << 60
MOST_ITEMS = 1024
WIDEST = 255
_MOST_WEIGHT = 1 << 30  # of all tokens of a layer


@dataclass(frozen=True, slots=True, eq=False)
class ColumnLayer:
    """Split ``items`` over ``places`` so that tokens touch few: a column has ``size`` items.

    With ``at_most``, it has that many or fewer. ``item_PK`` holds distinct items, -1 behind the
    last. ``scale`` units of weight are one token. A column's load must lie within the two limits.
    """

    item_PK: I32
    weight_P: I32
    load_E: I64
    size: int
    places: int
    least_load: int = -ANY_LOAD
    most_load: int = ANY_LOAD
    at_most: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        patterns, width = self.item_PK.shape
        assert self.item_PK.dtype == np.int32 and self.item_PK.flags.c_contiguous
        assert self.weight_P.dtype == np.int32 and self.weight_P.shape == (patterns,)
        assert self.load_E.dtype == np.int64 and self.load_E.ndim == 1
        assert 1 <= width <= WIDEST and 1 <= self.size <= self.items <= MOST_ITEMS
        assert self.item_PK.max(initial=-1) < self.items
        assert self.at_most or self.size * self.places == self.items
        assert int(self.weight_P.sum(dtype=np.int64)) <= _MOST_WEIGHT

    @property
    def items(self) -> int:
        return len(self.load_E)

    def cost_of(self, block_E: I32) -> int:
        """Of a whole cover: block_E is the place of each item."""
        place_PK = np.where(self.item_PK >= 0, block_E[self.item_PK], -1)
        place_PK.sort(axis=1)
        fresh_PK = place_PK[:, 1:] != place_PK[:, :-1]
        count_P = fresh_PK.sum(axis=1) + (place_PK[:, 0] >= 0)
        return int(count_P @ self.weight_P.astype(np.int64)) * TOKEN

    def costs_of(self, item_CM: I32) -> I64:
        """[C]: of columns, by themselves."""
        costs = np.zeros(len(item_CM), np.int64)
        uses_EP = self.uses_EP()
        weight_P = self.weight_P.astype(np.int64)
        for c, items in enumerate(item_CM):
            costs[c] = uses_EP[items[items >= 0]].any(axis=0) @ weight_P * TOKEN
        return costs

    def shares_of(self, block_E: I32) -> F64:
        """[E]: what a cover costs, each pattern divided among its items on each place."""
        chosen_PK = self.item_PK >= 0
        place_PK = np.where(chosen_PK, block_E[self.item_PK], -1)
        same_PKK = place_PK[:, :, None] == place_PK[:, None, :]
        share_PK = self.weight_P[:, None] / same_PKK.sum(axis=2)
        shares = np.bincount(self.item_PK[chosen_PK], share_PK[chosen_PK], self.items)
        return np.asarray(shares * TOKEN, np.float64)

    def alone_E(self) -> I64:
        """[E]: the cost of each item in a column of its own."""
        chosen_PK = self.item_PK >= 0
        weight_PK = np.broadcast_to(self.weight_P[:, None], chosen_PK.shape)
        tokens_E = np.bincount(self.item_PK[chosen_PK], weight_PK[chosen_PK], self.items)
        return np.rint(tokens_E).astype(np.int64) * TOKEN

    def uses_EP(self) -> NDArray[np.bool_]:
        """Does the pattern use the item."""
        uses_EP = np.zeros((self.items, len(self.item_PK)), np.bool_)
        pattern, k = np.nonzero(self.item_PK >= 0)
        uses_EP[self.item_PK[pattern, k], pattern] = True
        return uses_EP

    def in_tokens(self, cost: int) -> float:
        return cost / TOKEN / self.scale

    def allows(self, block_E: I32) -> bool:
        """Whether every block of a cover is a column that is allowed."""
        load_D = np.zeros(self.places, np.int64)
        np.add.at(load_D, block_E, self.load_E)
        size_D = np.bincount(block_E, minlength=self.places)
        full = (size_D <= self.size) if self.at_most else (size_D == self.size)
        within = (load_D >= self.least_load) & (load_D <= self.most_load)
        return bool((full & within).all())


def patterns_of(item_TK: I32, weight_T: F64) -> tuple[I32, I32, float]:
    """Equal tokens together: (item_PK, weight_P, weight units per token).

    Weights that are not all equal are rounded down to whole units: a bound on less is one on them.
    """
    sorted_TK = -np.sort(-item_TK, axis=1)  # -1 last
    some_T = sorted_TK[:, 0] >= 0
    sorted_TK, weight_T = sorted_TK[some_T], weight_T[some_T]
    if not len(sorted_TK):
        return np.full((0, item_TK.shape[1]), -1, np.int32), np.zeros(0, np.int32), 1.0
    item_PK, pattern_T = np.unique(sorted_TK, axis=0, return_inverse=True)
    summed_P = np.bincount(pattern_T.reshape(-1), weight_T, minlength=len(item_PK))
    if (weight_T == weight_T[0]).all():
        summed_P, scale = np.rint(summed_P / weight_T[0]), 1.0 / float(weight_T[0])
    else:
        scale = 2.0 ** math.floor(math.log2(_MOST_WEIGHT / float(weight_T.sum())))
        scale = min(scale, 4096.0)
    whole_P = np.floor(summed_P * (scale if (weight_T != weight_T[0]).any() else 1.0))
    return np.ascontiguousarray(item_PK, np.int32), whole_P.astype(np.int32), scale


def whole_loads(load_E: F64, choices: float, most: float, least: float) -> tuple[I64, int, int]:
    """(load_E, most, least) in units of load, where all loads sum to ``choices`` of tokens.

    The limits are shares of the sum. They are widened by what rounding may add up to, so that no
    column within the limits is left out.
    """
    unit = LOAD_UNITS * choices / float(load_E.sum())
    slack = len(load_E) // 2 + 1
    whole_E = np.rint(load_E * unit).astype(np.int64)
    return (
        whole_E,
        math.ceil(most * choices * LOAD_UNITS) + slack,
        math.floor(least * choices * LOAD_UNITS) - slack,
    )


@dataclass(frozen=True, slots=True, eq=False)
class CertifiedLayer:
    """What was shown of one layer: no allowed cover costs less than ``bound`` tokens.

    ``best`` is the cost of the cheapest allowed cover known, ``block_E`` that cover (None where
    none was found that is better than those given). ``proven``: the cheapest of all.
    """

    bound: float
    best: float
    block_E: I32 | None

    @property
    def proven(self) -> bool:
        return self.bound >= self.best
