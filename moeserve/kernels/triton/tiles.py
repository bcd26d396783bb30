"""Which tile a product or attention takes. Letters: see ``ops``.

Integer sums are exact, so a product of codes may take another tile for more rows. A product of
floats has one tile whatever the rows are: another one could add in another order, and a row's bits
would depend on its batch; so has attention over a kind of cache. ``TILES`` and ``query_tile`` are
all there is, for compiling ahead and for naming in results.

Tiles are the largest that spill no register on any device that ``aot`` was asked about. A device of
``hip`` has twice the registers for half the warps, and 64 KiB of shared memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from moeserve.kernels.records import WeightKind

MOST_WARPS = {"cuda": 32, "hip": 4}


class Tile(NamedTuple):
    """Rows, features out and features in of a program, its warps, and stages of its pipeline."""

    rows: int
    out: int
    into: int
    warps: int
    stages: int


class QueryTile(NamedTuple):
    """Queries of a program of attention, its warps, and stages of its pipeline."""

    queries: int
    warps: int
    stages: int


# By kind, then for at most so many rows each; the last is for any number.
TILES: dict[WeightKind, tuple[tuple[int, Tile], ...]] = {
    WeightKind.INT8: (
        (16, Tile(16, 64, 128, 4, 4)),
        (64, Tile(64, 64, 128, 4, 3)),
        (0, Tile(128, 64, 128, 8, 3)),
    ),
    WeightKind.INT4: (
        (16, Tile(16, 64, 128, 4, 3)),
        (0, Tile(64, 32, 128, 8, 3)),
    ),
    WeightKind.BF16: ((0, Tile(64, 64, 64, 8, 2)),),
    WeightKind.FP32: ((0, Tile(16, 32, 32, 4, 2)),),
}
LEAST_INTO = 64  # two products of 32 features, of low and of high halves


def tile_of(kind: WeightKind, rows: int, group: int = 0) -> Tile:
    """For so many rows; ``group`` is int4's, and a tile takes no more features than it has."""
    found = next(tile for most, tile in TILES[kind] if not most or rows <= most)
    if kind is WeightKind.INT4:
        group = 1 << (max(group, LEAST_INTO) - 1).bit_length()
        return found._replace(into=min(found.into, group))
    return found


def query_tile(dtype: torch.dtype, latent: bool, backend: str = "cuda") -> QueryTile:
    """Over a cache of ``dtype``. A decode of eight heads to a KV head fills half a tile of 16: in
    larger ones its softmax is mostly of rows that are not there, which takes longer than reading
    the KV (``predict``); prompts would want larger ones. Of a latent all heads share the KV."""
    if dtype is torch.float32:
        return QueryTile(16, 8, 2)
    if not latent:
        stages = 3 if dtype is torch.bfloat16 else 2
        return QueryTile(16, 4, stages if backend == "cuda" else 1)
    if backend == "hip":
        return QueryTile(16, 8, 1)
    return QueryTile(16 if dtype is torch.int8 else 32, 8, 2)
