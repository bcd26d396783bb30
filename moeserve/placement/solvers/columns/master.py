"""The restricted master: from the columns so far to prices of items.

min cost @ x, each item in columns of total 1, at most ``places`` columns where columns may be
small. What is wanted are its dual values; whatever they are, ``generation`` makes a valid bound of
them, so rounding here costs tightness and never truth. HiGHS where it is installed, else a simplex
of ours on an inverse kept as a matrix, its right-hand side perturbed against degeneracy: native, or
its twin here.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moeserve.errors import PlacementError
from moeserve.native import native_module

F64 = NDArray[np.float64]
I32 = NDArray[np.int32]

_TOLERANCE = 1e-7
_LEAST_PIVOT = 1e-8
_NOTHING = 1e-13
_REFRESH = 1000  # pivots between two inversions
_LISTED = 24  # columns that are looked at for several pivots


@dataclass(frozen=True, slots=True, eq=False)
class MasterSolution:
    """Costs as given; ``share_C`` is how much of each column the relaxation takes."""

    value: float
    price_E: F64
    place_price: float
    share_C: F64


class Master(Protocol):
    def add(self, item_CM: I32, cost_C: F64) -> None: ...

    def dearer(self, factor: float) -> None:
        """Items outside of all columns cost that much more from now on."""

    def solve(self) -> MasterSolution: ...


def have_highs() -> bool:
    return importlib.util.find_spec("highspy") is not None


def master_of(items: int, size: int, places: int, alone_E: F64, *, counted: bool) -> Master:
    """``alone_E`` is what each item costs outside of all columns: about what its price will be at
    first, so that prices begin there, and dearer while items are left outside.
    """
    if have_highs():
        return HighsMaster(items, size, places, alone_E, counted=counted)
    if native_module("moeserve.placement._columns", PlacementError)[0] is not None:
        return NativeMaster(items, size, places, alone_E, counted=counted)
    return SimplexMaster(items, size, places, alone_E, counted=counted)


class HighsMaster:
    """Keeps one model, to which columns are added; each solve starts from the last basis."""

    def __init__(self, items: int, size: int, places: int, alone_E: F64, *, counted: bool) -> None:
        highspy: Any = importlib.import_module("highspy")  # an optional dependency

        del size
        self._items, self._counted, self._columns = items, counted, 0
        self._model: Any = highspy.Highs()
        for name, value in (("output_flag", False), ("threads", 1), ("time_limit", 60.0)):
            self._model.setOptionValue(name, value)
        none, nothing = np.zeros(0, np.int32), np.zeros(0)
        for _ in range(items):
            self._model.addRow(1.0, 1.0, 0, none, nothing)
        if counted:
            self._model.addRow(-highspy.kHighsInf, float(places), 0, none, nothing)
        self._inf, self._alone_E = highspy.kHighsInf, alone_E
        for e in range(items):
            self._model.addCol(
                float(alone_E[e]), 0.0, self._inf, 1, np.array([e], np.int32), np.ones(1)
            )

    def add(self, item_CM: I32, cost_C: F64) -> None:
        for items, cost in zip(item_CM, cost_C, strict=True):
            rows = items[items >= 0]
            if self._counted:
                rows = np.append(rows, np.int32(self._items))
            self._model.addCol(
                float(cost), 0.0, self._inf, len(rows), rows.astype(np.int32), np.ones(len(rows))
            )
        self._columns += len(item_CM)

    def dearer(self, factor: float) -> None:
        self._alone_E = self._alone_E * factor
        for e, cost in enumerate(self._alone_E.tolist()):
            self._model.changeColCost(e, cost)

    def solve(self) -> MasterSolution:
        self._model.run()
        solution = self._model.getSolution()
        dual = np.array(solution.row_dual, np.float64)
        share = np.array(solution.col_value, np.float64)[self._items :]
        value = float(self._model.getInfo().objective_function_value)
        place = min(0.0, float(dual[self._items])) if self._counted else 0.0
        return MasterSolution(value, dual[: self._items], place, share)


class NativeMaster:
    """``placement/simplex.cc``; one thread at a time."""

    def __init__(self, items: int, size: int, places: int, alone_E: F64, *, counted: bool) -> None:
        native, _ = native_module("moeserve.placement._columns", PlacementError)
        assert native is not None
        self._items, self._places, self._counted = items, places, counted
        self._simplex: Any = native.Simplex(size, places, np.asarray(alone_E, np.float64), counted)

    def add(self, item_CM: I32, cost_C: F64) -> None:
        assert item_CM.max(initial=-1) < self._items
        columns_CM = np.ascontiguousarray(item_CM, np.int32)
        self._simplex.add(columns_CM, np.ascontiguousarray(cost_C, np.float64))

    def dearer(self, factor: float) -> None:
        self._simplex.dearer(factor)

    def solve(self) -> MasterSolution:
        dual_R, share_C = (part.reshape(-1) for part in self._simplex.solve())
        place = min(0.0, float(dual_R[self._items])) if self._counted else 0.0
        price_E = dual_R[: self._items]
        value = float(price_E.sum()) + self._places * place  # not perturbed
        return MasterSolution(value, price_E, place, share_C)


class SimplexMaster:
    """Primal simplex; the last basis is where the next solve begins."""

    def __init__(self, items: int, size: int, places: int, alone_E: F64, *, counted: bool) -> None:
        self._items, self._counted = items, counted
        rows = items + counted
        # Where columns are counted, the first is empty: a place that is not used.
        self._item_CM = np.full((int(counted), size), -1, np.int32)
        self._cost_C = np.zeros(int(counted))
        # Basic columns below 0 are those of row -1 - b alone: an item by itself, or a spare place.
        self._basis_R = -1 - np.arange(rows)
        self._alone_R = np.zeros(rows)
        self._alone_R[:items] = alone_E
        self._inverse_RR: F64 = np.eye(rows)
        self._places = places
        perturbed = min(max(1e-5 * rows * rows / 256, 1e-5), 1e-3)
        self._right_R = 1.0 + (np.random.default_rng(1).random(rows) - 0.5) * perturbed
        self._right_R[items:] += places - 1.0
        self._level_R = self._right_R.copy()
        self._since = 0

    def add(self, item_CM: I32, cost_C: F64) -> None:
        self._item_CM = np.concatenate((self._item_CM, item_CM))
        self._cost_C = np.concatenate((self._cost_C, cost_C))

    def dearer(self, factor: float) -> None:
        self._alone_R *= factor

    def solve(self) -> MasterSolution:
        left = 40 * len(self._basis_R) + len(self._cost_C)  # against circling: any end is valid
        while left > 0 and len(listed := self._cheapest(self._duals(), None)):
            while left > 0 and len(listed := self._cheapest(self._duals(), listed)):
                left -= 1
                if not self._pivot(int(listed[0])):
                    left = 0
        dual_R = self._duals()
        share_C = np.zeros(len(self._cost_C))
        of_columns = self._basis_R >= 0
        share_C[self._basis_R[of_columns]] = self._level_R[of_columns]
        place = min(0.0, float(dual_R[self._items])) if self._counted else 0.0
        value = float(dual_R[: self._items].sum()) + self._places * place  # not perturbed
        return MasterSolution(value, dual_R[: self._items], place, share_C[int(self._counted) :])

    def _basic_costs(self) -> F64:
        basis_R = self._basis_R
        costs = self._alone_R[-1 - np.minimum(basis_R, -1)]
        of_columns = basis_R >= 0
        costs[of_columns] = self._cost_C[basis_R[of_columns]]
        return np.asarray(costs, np.float64)

    def _duals(self) -> F64:
        return np.asarray(self._basic_costs() @ self._inverse_RR, np.float64)

    def _cheapest(self, dual_R: F64, among: NDArray[np.int64] | None) -> NDArray[np.int64]:
        """Columns that are cheaper than these duals, items outside of all columns among them: the
        cheapest first, at most ``_LISTED``."""
        columns = np.arange(-self._items, len(self._cost_C)) if among is None else among
        price = np.append(dual_R[: self._items], 0.0)  # -1 reads the last
        of_items = columns < 0
        held = np.maximum(columns, 0)
        cost_C = np.where(of_items, self._alone_R[-1 - np.minimum(columns, -1)], 0.0)
        price_C = np.where(of_items, dual_R[-1 - np.minimum(columns, -1)], 0.0)
        if len(self._cost_C):
            place = dual_R[self._items] if self._counted else 0.0
            cost_C = np.where(of_items, cost_C, self._cost_C[held])
            whole_C = price[self._item_CM[held]].sum(axis=1) + place
            price_C = np.where(of_items, price_C, whole_C)
        reduced_C = cost_C - price_C
        below = np.flatnonzero(reduced_C < -_TOLERANCE * (1.0 + np.abs(cost_C)))
        order = np.argsort(reduced_C[below], kind="stable")[:_LISTED]
        return columns[below[order]]

    def _pivot(self, enters: int) -> bool:
        step_R = self._inverse_RR[:, self._rows(enters)].sum(axis=1)
        usable_R = step_R > _LEAST_PIVOT
        if not usable_R.any():
            return False
        ratio_R = np.where(usable_R, self._level_R / np.where(usable_R, step_R, 1.0), np.inf)
        near_R = ratio_R <= ratio_R.min() + 1e-12
        leaves = int(np.where(near_R, step_R, 0.0).argmax())
        ratio = max(0.0, float(ratio_R[leaves]))
        self._level_R = np.maximum(0.0, self._level_R - ratio * step_R)
        self._level_R[leaves] = ratio
        row_R = self._inverse_RR[leaves] / step_R[leaves]
        moved = np.flatnonzero(np.abs(step_R) > _NOTHING)
        self._inverse_RR[moved] -= np.outer(step_R[moved], row_R)
        self._inverse_RR[leaves] = row_R
        self._basis_R[leaves] = enters
        self._since += 1
        if self._since >= _REFRESH:
            self._refresh()
        return True

    def _rows(self, column: int) -> NDArray[np.int64]:
        if column < 0:
            return np.array([-1 - column])
        items = self._item_CM[column].astype(np.int64)
        rows = items[items >= 0]
        return np.append(rows, self._items) if self._counted else rows

    def _refresh(self) -> None:
        basic_RR = np.zeros_like(self._inverse_RR)
        for r, column in enumerate(self._basis_R.tolist()):
            basic_RR[self._rows(column), r] = 1.0
        self._inverse_RR = np.asarray(np.linalg.inv(basic_RR), np.float64)
        self._level_R = np.maximum(0.0, self._inverse_RR @ self._right_R)
        self._since = 0
