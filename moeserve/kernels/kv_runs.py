"""Runs of KV: consecutive positions of a sequence in one cache, as bytes with digests; many of them
leave caches, or enter some, in one call (``Ops.export_runs``, ``Ops.import_runs``).

A run of ``count`` positions is laid out as a block of so many would be (``kv_layout``), wherever in
its blocks it begins or ends. Its digest is XXH3-128 over its head and its bytes. What a head holds
is the business of those who exchange runs (``pools.kv.digests``).

``export_by_blocks`` and ``import_by_blocks`` do it block by block and run by run, with the package
xxhash: the slow twin of every backend, and the way of caches that know whole blocks only.

R runs, X bytes, H bytes of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
import xxhash
from torch import Tensor

from moeserve.core import BlockId
from moeserve.errors import InternalError
from moeserve.kernels.kv_layout import KvBlockLayout
from moeserve.kernels.ops import KvRuns

DIGEST_BYTES = 16


class BlockKv(Protocol):
    """Caches whose blocks leave and enter whole."""

    @property
    def layouts(self) -> Sequence[KvBlockLayout]: ...

    def export_kv(self, layer: int, blocks: Sequence[BlockId], out_NX: Tensor, /) -> None: ...

    def import_kv(self, layer: int, blocks: Sequence[BlockId], data_NX: Tensor, /) -> None: ...


def resized(layout: KvBlockLayout, block_size: int) -> KvBlockLayout:
    return replace(layout, block_size=block_size)


def run_bytes(layout: KvBlockLayout, count: int) -> int:
    """Of a run of so many positions. Sections have no gaps, so it is proportional to them."""
    return layout.nbytes // layout.block_size * count


def copy_positions(
    source: tuple[KvBlockLayout, Tensor, int], target: tuple[KvBlockLayout, Tensor, int], count: int
) -> None:
    """``count`` positions of one block or run, from a position on, into another. Each is (layout,
    uint8 [X], first position); the layouts differ in their block size only."""
    (layout, data_X, first), (other, out_X, at) = source, target
    for s, o in zip(layout.sections, other.sections, strict=True):
        width = s.nbytes // layout.block_size
        begin, to = s.start + first * width, o.start + at * width
        out_X[to : to + count * width] = data_X[begin : begin + count * width]


def digest_of(head_H: Tensor, data_X: Tensor) -> bytes:
    found = xxhash.xxh3_128(head_H.numpy().data)
    found.update(data_X.numpy().data)
    return found.digest()


def export_by_blocks(kv: BlockKv, blocks: Sequence[BlockId], runs: KvRuns, out_X: Tensor) -> Tensor:
    """As ``Ops.export_runs``, of caches in the order of ``kv``."""
    digests_RD = torch.empty(len(runs), DIGEST_BYTES, dtype=torch.uint8)
    for r, (layer, start, count, offset) in enumerate(runs.runs_R4.tolist()):
        layout = kv.layouts[layer]
        run_X = out_X[offset : offset + run_bytes(layout, count)]
        pieces = _pieces(layout.block_size, start, count)
        rows_NX = torch.empty(len(pieces), layout.nbytes, dtype=torch.uint8)
        kv.export_kv(layer, [blocks[block] for block, *_ in pieces], rows_NX)
        for row_X, (_, first, at, n) in zip(rows_NX, pieces, strict=True):
            copy_positions((layout, row_X, first), (resized(layout, count), run_X, at), n)
        digest = bytearray(digest_of(runs.heads_RH[r], run_X))
        digests_RD[r] = torch.frombuffer(digest, dtype=torch.uint8)
    return digests_RD


def import_by_blocks(
    kv: BlockKv, blocks: Sequence[BlockId], runs: KvRuns, digests_RD: Tensor, data_X: Tensor
) -> Tensor:
    """As ``Ops.import_runs``. A block that runs have a part of is read, and written whole."""
    right_R = torch.zeros(len(runs), dtype=torch.bool)
    rows: dict[int, dict[int, Tensor]] = {}  # by layer, by place in the table of blocks
    for r, (layer, start, count, offset) in enumerate(runs.runs_R4.tolist()):
        layout, found = kv.layouts[layer], rows.setdefault(layer, {})
        run_X = data_X[offset : offset + run_bytes(layout, count)]
        if digest_of(runs.heads_RH[r], run_X) != digests_RD[r].numpy().tobytes():
            continue
        right_R[r] = True
        for block, first, at, n in _pieces(layout.block_size, start, count):
            if block not in found:
                row_NX = torch.empty(1, layout.nbytes, dtype=torch.uint8)
                if n < layout.block_size:
                    kv.export_kv(layer, [blocks[block]], row_NX)
                found[block] = row_NX[0]
            target = layout, found[block], first
            copy_positions((resized(layout, count), run_X, at), target, n)
    for layer, found in rows.items():
        if found:
            places = [blocks[block] for block in found]
            kv.import_kv(layer, places, torch.stack(list(found.values())))
    return right_R


def check_places(
    layouts: Sequence[KvBlockLayout], blocks: Sequence[int], runs: KvRuns, data_X: Tensor
) -> None:
    """InternalError unless all runs have their caches, blocks and bytes."""
    for layer, start, count, offset in runs.runs_R4.tolist():
        sound = 0 <= layer < len(layouts) and start >= 0 and count > 0 and offset >= 0
        if sound:
            layout = layouts[layer]
            sound = start + count <= len(blocks) * layout.block_size and offset + run_bytes(
                layout, count
            ) <= len(data_X)
        if not sound:
            raise outside_runs(layer, start, count, offset)


def outside_runs(layer: int, start: int, count: int, offset: int) -> InternalError:
    return InternalError(
        f"positions {start}..{start + count - 1} of cache {layer}, bytes from {offset} on: there "
        "is no such cache, block or place"
    )


def _pieces(size: int, start: int, count: int) -> list[tuple[int, int, int, int]]:
    """(place in the table of blocks, first position in it, position in the run, how many)."""
    found, at = [], 0
    while at < count:
        block, first = divmod(start + at, size)
        n = min(size - first, count - at)
        found.append((block, first, at, n))
        at += n
    return found
