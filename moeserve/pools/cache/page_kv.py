"""Pages out of a rank's KV blocks and into them again.

In a page every layer is one run, laid out as one block of ``page_tokens`` positions would be
(``kernels.kv_layout``), whatever the size of the blocks it came from: peers of different block
sizes make and read equal bytes. The page size is a multiple of the block size. A run's digest is
xxh3-128 over the page's key, its layer, its place and its bytes, made when they leave the cache and
checked before they enter another, so it also finds what happens between the cache and the page.

Letters: N blocks of a page, P positions of a block, X bytes of a block or a page.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import xxhash
from torch import Tensor

from moeserve.core import BlockId
from moeserve.errors import ConfigError, DataLossError
from moeserve.kernels.kv_layout import KvBlockLayout
from moeserve.pools.cache.keys import PageKey
from moeserve.pools.cache.pages import PageBytes, StoredRun
from moeserve.pools.kv.house import KvHouse

log = logging.getLogger(__name__)

_PLACE = struct.Struct("<IQQ")


class PageKv:
    """Pages of one house. ConfigError where its blocks do not fill them."""

    def __init__(self, house: KvHouse, page_tokens: int) -> None:
        if page_tokens % house.block_size:
            raise ConfigError(
                f"pages of {page_tokens} tokens are no multiple of blocks of {house.block_size}: "
                "set another block_size, or another page size for all members"
            )
        self.blocks_per_page = page_tokens // house.block_size
        self._page_tokens = page_tokens
        self._house = house
        self._layouts = house.layouts

    @property
    def page_bytes(self) -> int:
        return sum(_of_page(layout, self._page_tokens).nbytes for layout in self._layouts)

    def blocks_of(self, page: int, blocks: Sequence[BlockId]) -> Sequence[BlockId]:
        """Those of a page, of all of a sequence."""
        return blocks[page * self.blocks_per_page : (page + 1) * self.blocks_per_page]

    def export(self, page: int, key: PageKey, blocks_N: Sequence[BlockId]) -> tuple[StoredRun, ...]:
        """All layers of a page whose blocks are held and computed. For any thread."""
        assert len(blocks_N) == self.blocks_per_page, (len(blocks_N), self.blocks_per_page)
        runs = []
        for layer, layout in enumerate(self._layouts):
            data_NX = torch.empty(len(blocks_N), layout.nbytes, dtype=torch.uint8)
            self._house.export_kv(layer, blocks_N, data_NX)
            data = _as_page(layout, data_NX).numpy().data
            start = page * self._page_tokens
            digest = _digest(key, layer, start, self._page_tokens, data)
            runs.append(StoredRun(layer, start, self._page_tokens, digest, data))
        return tuple(runs)

    def import_run(self, run: StoredRun, key: PageKey, blocks_N: Sequence[BlockId]) -> None:
        """One layer of a page into its last blocks, as many as there are given: those before are
        there already. DataLossError where it is not what was exported. For any thread."""
        if not 0 <= run.layer < len(self._layouts):
            raise DataLossError(f"a run of layer {run.layer}: there are {len(self._layouts)}")
        layout = self._layouts[run.layer]
        if memoryview(run.data).nbytes != _of_page(layout, self._page_tokens).nbytes:
            raise DataLossError(
                f"a page of layer {run.layer} has {memoryview(run.data).nbytes} bytes: the sender's"
                " KV has another shape"
            )
        if run.digest != _digest(key, run.layer, run.start, run.count, run.data):
            raise DataLossError(f"positions {run.start} on of layer {run.layer} have changed")
        data_NX = _as_blocks(layout, run.data, self.blocks_per_page)
        self._house.import_kv(run.layer, blocks_N, data_NX[-len(blocks_N) :].contiguous())


def page_kv_of(house: KvHouse, page_tokens: int) -> PageKv | None:
    """None where blocks do not fill pages: such a rank computes all by itself. Said in the log."""
    try:
        return PageKv(house, page_tokens)
    except ConfigError as error:
        log.warning("the cache pool is not used: %s", error.message)
        return None


def _digest(key: PageKey, layer: int, start: int, count: int, data: PageBytes) -> bytes:
    found = xxhash.xxh3_128(key + _PLACE.pack(layer, start, count))
    found.update(data)
    return found.digest()


def _of_page(layout: KvBlockLayout, page_tokens: int) -> KvBlockLayout:
    return replace(layout, block_size=page_tokens)


def _as_page(layout: KvBlockLayout, data_NX: Tensor) -> Tensor:
    """[N, X of a block] -> [X of a page]: each section's positions, one after the other."""
    if len(data_NX) == 1:
        return data_NX[0]
    return torch.cat([data_NX[:, s.start : s.end].reshape(-1) for s in layout.sections])


def _as_blocks(layout: KvBlockLayout, data: PageBytes, blocks: int) -> Tensor:
    """[X of a page] -> [N, X of a block]; a copy."""
    data_X = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
    parts, at = [], 0
    for section in layout.sections:
        end = at + blocks * section.nbytes
        parts.append(data_X[at:end].view(blocks, section.nbytes))
        at = end
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
