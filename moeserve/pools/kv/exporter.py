"""Blocks into runs: the KV of one sequence out of a cache, with digests, into the memory given.

The digest of a run is made when its bytes have left the cache. Letters: N blocks, X bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moeserve.core import BlockId
from moeserve.pools.kv.digests import RunDigests
from moeserve.pools.kv.house import KvHouse
from moeserve.pools.kv.importer import PIECE_BYTES
from moeserve.pools.kv.runs import (
    Stretch,
    copy_positions,
    resized,
    run_bytes,
    run_ends,
    stretch_bytes,
)


class KvExporter:
    """Of one sequence, whose tokens ``digests`` has. Not for several threads at once."""

    def __init__(self, house: KvHouse, digests: RunDigests) -> None:
        self.digests = digests
        self._house = house
        self._layouts = house.layouts
        self._size = house.block_size

    def fill(
        self, blocks: Sequence[BlockId], stretches: Sequence[Stretch], out_X: Tensor
    ) -> list[bytes]:
        """Writes the stretches, each ``stretch_bytes`` behind the one before; the digests of the
        runs of each. ``blocks`` are those of the sequence, held, and computed so far."""
        found, at = [], 0
        for stretch in stretches:
            size = run_bytes(self._layouts[stretch.layer], stretch.stop - stretch.start)
            found.append(self._export(blocks, stretch, out_X[at : at + size]))
            at += stretch_bytes(self._layouts[stretch.layer], stretch)
        return found

    def _export(self, blocks: Sequence[BlockId], stretch: Stretch, out_X: Tensor) -> bytes:
        layer, layout, at = stretch.layer, self._layouts[stretch.layer], 0
        runs = list(run_ends(stretch.start, stretch.stop, self._size))
        view, width = out_X.numpy().data, run_bytes(layout, 1)
        most, i = max(1, PIECE_BYTES // (width * self._size)), 0
        digests = []
        while i < len(runs):
            start, count = runs[i]
            first, inside = divmod(start, self._size)
            whole = sum(1 for _, n in runs[i : i + most] if n == self._size)
            if count == self._size:
                rows_NX = out_X[at : at + whole * self._size * width].view(whole, -1)
                self._house.export_kv(layer, blocks[first : first + whole], rows_NX)
            else:
                whole = 1
                row_NX = torch.empty(1, layout.nbytes, dtype=torch.uint8)
                self._house.export_kv(layer, blocks[first : first + 1], row_NX)
                target = (resized(layout, count), out_X[at:], 0)
                copy_positions((layout, row_NX[0], inside), target, count)
            done = runs[i : i + whole]
            digests.append(self.digests.of_each(layer, done, width, view[at:]))
            at += width * sum(count for _, count in done)
            i += whole
        return b"".join(digests)
