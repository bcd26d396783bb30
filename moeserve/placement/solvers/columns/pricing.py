"""The pricing problems of columns: native where that is built, else the twin.

``price`` is exact: its ``floor_E`` are bounds on the reduced cost of every allowed column at any
limit. ``descend`` finds columns fast and proves nothing. ``cover`` combines columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from moeserve.errors import PlacementError
from moeserve.native import native_module
from moeserve.placement.solvers.columns import twin
from moeserve.placement.solvers.columns.layer import ColumnLayer

I32 = NDArray[np.int32]
I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Effort:
    """How long one search may take: nodes of its tree, and seconds; with ``cpu``, of CPU time."""

    nodes: int = 1 << 60
    seconds: float = float("inf")
    cpu: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class PricedColumns:
    """``reduced_C`` is the cost of each column less the prices of its items.

    No allowed column with an item has a reduced cost below its ``floor_E``.
    """

    item_CM: I32
    reduced_C: I64
    floor_E: I64
    complete: bool
    nodes: int

    @property
    def floor(self) -> int:
        """No allowed column has a reduced cost below."""
        return int(self.floor_E.min())


@dataclass(frozen=True, slots=True, eq=False)
class ColumnCover:
    """``block_E`` is None where there is no cover below the budget; then ``value`` is that.

    Not ``complete``: there may be better ones.
    """

    block_E: I32 | None
    value: int
    complete: bool
    nodes: int


def core() -> ModuleType:
    """The native module, or the twin."""
    native, _ = native_module("moeserve.placement._columns", PlacementError)
    return native or twin


def price(
    layer: ColumnLayer,
    price_E: I64,
    threshold: int,
    *,
    most: int,
    effort: Effort,
    fewer: bool = False,
) -> PricedColumns:
    """Columns with a reduced cost below ``threshold``, depth first, all of them if ``complete``.

    After ``most`` the search is cut short, or (``fewer``) the threshold falls to the median of
    those and the search goes on.
    """
    assert price_E.shape == (layer.items,)
    loops = core()
    limits = (threshold, most, fewer, effort.nodes, effort.seconds, effort.cpu)
    if loops is twin:
        return PricedColumns(*twin.price(layer, price_E, *limits))
    item_CM, reduced_C, floor_E, complete, nodes = loops.price(
        *_arrays(layer, price_E), layer.size, layer.at_most, layer.least_load, layer.most_load,
        *limits,
    )  # fmt: skip
    return PricedColumns(
        item_CM, reduced_C.reshape(-1), floor_E.reshape(-1), bool(complete), int(nodes)
    )


def descend(
    layer: ColumnLayer, price_E: I64, start_CM: I32, threshold: int, *, most: int, seed: int
) -> tuple[I32, I64]:
    """Columns below ``threshold`` met on descents from the given ones: (item_CM, reduced_C)."""
    assert price_E.shape == (layer.items,)
    assert start_CM.shape[1:] == (layer.size,)
    loops = core()
    if loops is twin:
        return twin.descend(layer, price_E, start_CM, threshold, most, seed)
    item_CM, reduced_C = loops.descend(
        *_arrays(layer, price_E), layer.size, layer.at_most, layer.least_load, layer.most_load,
        np.ascontiguousarray(start_CM, np.int32), threshold, most, seed,
    )  # fmt: skip
    return item_CM, reduced_C.reshape(-1)


def cover(
    layer: ColumnLayer,
    price_E: I64,
    columns: PricedColumns,
    *,
    whole: int,
    budget: int,
    effort: Effort,
) -> ColumnCover:
    """The cheapest cover below ``budget``, in reduced cost, of columns that are all >= 0.

    All its columns but one are among those given; with ``columns`` complete up to ``whole``, no
    cover below ``min(budget, 2 * whole + 2)`` is missed.
    """
    assert not layer.at_most
    order = np.argsort(columns.reduced_C, kind="stable")
    item_CM = np.ascontiguousarray(columns.item_CM[order])
    reduced_C = np.ascontiguousarray(columns.reduced_C[order])
    assert not len(reduced_C) or reduced_C[0] >= 0
    loops, limits = core(), (whole, budget, effort.nodes, effort.seconds, effort.cpu)
    if loops is twin:
        found = twin.cover(layer, price_E, (item_CM, reduced_C), *limits)
    else:
        found = loops.cover(
            *_arrays(layer, price_E), layer.size, layer.least_load, layer.most_load, item_CM,
            reduced_C, *limits,
        )  # fmt: skip
    block_E, value, complete, nodes = found
    blocks = block_E.reshape(-1) if block_E.size else None
    return ColumnCover(blocks, int(value), bool(complete), int(nodes))


def _arrays(layer: ColumnLayer, price_E: I64) -> tuple[I32, I32, I64, I64]:
    return layer.item_PK, layer.weight_P, layer.load_E, np.ascontiguousarray(price_E, np.int64)
