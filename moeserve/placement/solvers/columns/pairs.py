"""A bound on large groups from which pairs of items share a place: semidefinite, by its dual.

Exact searches for columns of 16 items and more do not end. Let X be 1 where two items share a
place: X is positive semidefinite, no eigenvalue exceeds ``size``, every row sums to ``size``, the
diagonal is 1, entries are >= 0, ``X[a, b] + X[b, c] - X[a, c] <= 1``, and the loads that share a
place with an item keep the limits. A pattern whose items form Z pairs on places touches at least
g(Z) places, g being the convex minorant of what its splits give. So the least of sum(weight g(Z))
over such X is a bound, and so is every value of its Lagrangian dual: with the constraints beyond
rows and eigenvalues priced into a matrix M, the rest is maximal at

    size / items * sum(M) + size * (the sum of the places - 1 largest eigenvalues of P M P),

P being the projection across the vector of ones. Prices follow averaged subgradients. Any prices
give a bound; what floating point may be off is taken from it.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray

from moeserve.placement.solvers.columns.layer import TOKEN, ColumnLayer

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

_ROUNDING = 1e-9  # of the sums of a bound: far above the error of eigenvalues
_LEAST_STEP = 0.01  # of an iterate in the average
_MOST_WITH_TRIANGLES = 128  # items
_TRIANGLES_EVERY = 50  # steps
_TRIANGLES = 2000  # that enter together
_VIOLATED = 0.05
_WIDEST = 16  # choices whose splits are listed
_MOST_ITEMS = 256


class PairBound:
    """Owns the prices of a layer's constraints; ``bound`` only ever rises with ``run``.

    Not for layers of ``at_most``, whose rows have no known sum, nor for very large ones.
    """

    def __init__(self, layer: ColumnLayer) -> None:
        assert self.fits(layer)
        self.layer = layer
        self.bound = 0
        self.steps = 0
        E, m = layer.items, layer.size
        self._weight_P = layer.weight_P.astype(np.float64)
        a, b = np.triu_indices(layer.item_PK.shape[1], 1)
        both_PQ = (layer.item_PK[:, a] >= 0) & (layer.item_PK[:, b] >= 0)
        # The cell behind the last holds 0: pairs that are none.
        cell_PQ = layer.item_PK[:, a].astype(np.int64) * E + layer.item_PK[:, b]
        self._cell_PQ = np.where(both_PQ, cell_PQ, E * E)
        self._base_PG, self._slope_PG = _pieces_of(layer)
        self._mean_EE: F64 = np.full((E, E), (m - 1) / max(1, E - 1))
        np.fill_diagonal(self._mean_EE, 1.0)
        self._priced_EE: F64 | None = None  # averaged slopes of patterns, on their pairs
        self._base = 0.0
        self._diagonal_E = np.zeros(E)
        self._positive_EE = np.zeros((E, E))
        total = float(layer.load_E.sum())
        self._load_unit = max(1.0, total / E)
        self._load_E = layer.load_E / self._load_unit
        self._most = layer.most_load / self._load_unit if layer.most_load < total else math.inf
        self._least = layer.least_load / self._load_unit if layer.least_load > 0 else -math.inf
        self._above_E, self._below_E = np.zeros(E), np.zeros(E)
        self._triangle_N3 = np.zeros((0, 3), np.int64)
        self._triangle_N = np.zeros(0)
        self._scale = 0.0

    @staticmethod
    def fits(layer: ColumnLayer) -> bool:
        narrow = layer.item_PK.shape[1] <= _WIDEST
        return not layer.at_most and narrow and layer.items <= _MOST_ITEMS

    def run(self, steps: int) -> int:
        """``bound`` after so many more steps, in the units of costs."""
        for _ in range(steps):
            self.steps += 1
            shared_EE = self._step(max(2 / (self.steps + 1), _LEAST_STEP))
            self._reprice(shared_EE)
        return self.bound

    def _step(self, part: float) -> F64:
        """One value of the dual, and the X that attains it at these prices."""
        layer, E = self.layer, self.layer.items
        shared = np.append(self._mean_EE.reshape(-1), 0.0)[self._cell_PQ].sum(axis=1)
        piece_P = np.argmax(self._base_PG - self._slope_PG * shared[:, None], axis=1)
        at = np.arange(len(piece_P))
        slope_P = self._weight_P * self._slope_PG[at, piece_P]
        cells = np.bincount(
            self._cell_PQ.reshape(-1), np.repeat(slope_P, self._cell_PQ.shape[1]), E * E + 1
        )[:-1].reshape(E, E)
        priced_EE, base = (cells + cells.T) / 2, float(self._weight_P @ self._base_PG[at, piece_P])
        if self._priced_EE is None:
            self._priced_EE, self._base = priced_EE, base
            self._scale = float(priced_EE.sum()) / E
        self._priced_EE = (1 - part) * self._priced_EE + part * priced_EE
        self._base = (1 - part) * self._base + part * base
        matrix_EE, constant = self._priced()
        centred_EE = matrix_EE - matrix_EE.mean(axis=0)
        centred_EE -= centred_EE.mean(axis=1)[:, None]
        values, vectors = np.linalg.eigh((centred_EE + centred_EE.T) / 2)
        top = layer.places - 1
        whole = layer.size / E * float(matrix_EE.sum())
        largest = layer.size * float(values[E - top :].sum())
        size = layer.size * (float(np.abs(matrix_EE).sum()) + top * float(np.abs(values).max()))
        off = _ROUNDING * (self._base + abs(constant) + size)
        tokens = math.ceil(self._base + constant - whole - largest - off)
        self.bound = max(self.bound, tokens * TOKEN)
        top_EV = vectors[:, E - top :]
        shared_EE: F64 = layer.size / E + layer.size * (top_EV @ top_EV.T)
        self._mean_EE = (1 - part) * self._mean_EE + part * shared_EE
        return shared_EE

    def _priced(self) -> tuple[F64, float]:
        """(M, what all prices add to the dual beside it)."""
        assert self._priced_EE is not None
        matrix_EE = self._priced_EE + self._positive_EE - np.diag(self._diagonal_E)
        constant = -float(self._diagonal_E.sum())
        load_EE = np.outer(self._above_E - self._below_E, self._load_E)
        matrix_EE -= (load_EE + load_EE.T) / 2
        if math.isfinite(self._most):
            constant -= float(self._above_E.sum()) * self._most
        if math.isfinite(self._least):
            constant += float(self._below_E.sum()) * self._least
        if len(self._triangle_N):
            a, b, c = self._triangle_N3.T
            cells = np.zeros_like(matrix_EE)
            np.add.at(cells, (a, b), self._triangle_N)
            np.add.at(cells, (b, c), self._triangle_N)
            np.add.at(cells, (a, c), -self._triangle_N)
            matrix_EE -= (cells + cells.T) / 2
            constant -= float(self._triangle_N.sum())
        return matrix_EE, constant

    def _reprice(self, shared_EE: F64) -> None:
        """Prices follow what this X violates, with falling steps."""
        step = 0.5 * self._scale / math.sqrt(self.steps) / self.layer.size
        self._diagonal_E += 0.3 * step * (np.diag(shared_EE) - 1)
        positive_EE = np.maximum(0.0, self._positive_EE - 0.1 * step * shared_EE)
        self._positive_EE = (positive_EE + positive_EE.T) / 2
        np.fill_diagonal(self._positive_EE, 0.0)
        with_E = shared_EE @ self._load_E
        if math.isfinite(self._most):
            self._above_E = np.maximum(0.0, self._above_E + 0.1 * step * (with_E - self._most))
        if math.isfinite(self._least):
            self._below_E = np.maximum(0.0, self._below_E + 0.1 * step * (self._least - with_E))
        few = self.layer.items <= _MOST_WITH_TRIANGLES
        if few and self.steps % _TRIANGLES_EVERY == 0 and self.steps > _TRIANGLES_EVERY:
            self._take_triangles()
        if len(self._triangle_N):
            a, b, c = self._triangle_N3.T
            over_N = shared_EE[a, b] + shared_EE[b, c] - shared_EE[a, c] - 1
            self._triangle_N = np.maximum(0.0, self._triangle_N + 0.1 * step * over_N)

    def _take_triangles(self) -> None:
        """The most violated ones enter, those without a price leave."""
        E, mean_EE = self.layer.items, self._mean_EE
        kept = self._triangle_N > 0
        triangle_N3, price_N = self._triangle_N3[kept], self._triangle_N[kept]
        over = (mean_EE[:, :, None] + mean_EE[None, :, :] - mean_EE[:, None, :] - 1).reshape(-1)
        top = np.argsort(-over, kind="stable")[:_TRIANGLES]
        top = top[over[top] > _VIOLATED]
        fresh_N3 = np.stack(np.unravel_index(top, (E, E, E)), axis=1)
        fresh_N3 = fresh_N3[fresh_N3[:, 0] < fresh_N3[:, 2]]
        known = triangle_N3 @ np.array([E * E, E, 1])
        fresh_N3 = fresh_N3[~np.isin(fresh_N3 @ np.array([E * E, E, 1]), known)]
        self._triangle_N3 = np.concatenate((triangle_N3, fresh_N3))
        self._triangle_N = np.concatenate((price_N, np.zeros(len(fresh_N3))))


def _pieces_of(layer: ColumnLayer) -> tuple[F64, F64]:
    """[P, pieces]: g(Z) is the largest of base - slope * Z, by the pattern's number of items."""
    choices_P = (layer.item_PK >= 0).sum(axis=1)
    by_count = [pieces(int(k), layer.size, layer.places) for k in range(layer.item_PK.shape[1] + 1)]
    most = max(len(lines) for lines in by_count)
    filled = np.array([lines + lines[-1:] * (most - len(lines)) for lines in by_count])
    return filled[choices_P, :, 0], filled[choices_P, :, 1]


def pieces(items: int, size: int, places: int) -> list[tuple[float, float]]:
    """(base, slope) of the lines that make up g for ``items`` items."""
    least: dict[int, int] = {}  # pairs on places -> the fewest places

    def split(left: int, largest: int, used: int, pairs: int) -> None:
        if left == 0:
            least[pairs] = min(used, least.get(pairs, used))
        elif used < places:
            for part in range(min(left, largest), 0, -1):
                split(left - part, part, used + 1, pairs + part * (part - 1) // 2)

    split(items, size, 0, 0)
    hull: list[tuple[int, int]] = []
    for pairs, used in sorted(least.items()):
        while len(hull) > 1 and _above(hull[-2], hull[-1], (pairs, used)):
            hull.pop()
        hull.append((pairs, used))
    lines = [(float(hull[-1][1]), 0.0)]  # g falls, so its last value is below all
    for (z0, n0), (z1, n1) in itertools.pairwise(hull):
        if n1 < n0:
            slope = (n0 - n1) / (z1 - z0)
            lines.append((n0 + slope * z0, slope))
    return lines


def _above(a: tuple[int, int], b: tuple[int, int], c: tuple[int, int]) -> bool:
    """Whether b is not below the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])
