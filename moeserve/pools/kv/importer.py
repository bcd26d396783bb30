"""Runs into borrowed blocks: each is checked for its place and its digest before it enters a cache.

The sender's runs may be of another size than the blocks here: blocks are put together from runs,
and enter the cache whole. Blocks that begin before ``have`` are somebody else's and not written to.

Letters: N runs or blocks, X bytes of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeserve.core import BlockId
from moeserve.engine.sequence import HeldKv
from moeserve.errors import InvalidRequestError
from moeserve.pools.kv.counters import KvCounters
from moeserve.pools.kv.digests import Data, RunDigests
from moeserve.pools.kv.house import KvHouse
from moeserve.pools.kv.order import RunOrder
from moeserve.pools.kv.runs import (
    KvRun,
    Stretch,
    copy_positions,
    resized,
    run_bytes,
    run_ends,
    tensor_of,
)

# Of the data that is checked and then imported at once, so that it is read from a near cache.
PIECE_BYTES = 256 << 10


@dataclass(slots=True)
class _Part:
    """A block that is being put together: ``filled`` of its positions are there."""

    data_X: Tensor
    filled: int = 0


class KvImporter:
    """The KV of one sequence, on its way into the blocks of ``held``, of which the first
    ``held.computed`` positions are there and full blocks; ``length`` positions are wanted.

    Not for several threads at once.
    """

    def __init__(
        self,
        house: KvHouse,
        held: HeldKv,
        length: int,
        digests: RunDigests,
        counters: KvCounters,
    ) -> None:
        assert held.computed % house.block_size == 0, held
        self.digests = digests
        self._house = house
        self._layouts = house.layouts
        self._size = house.block_size
        self._counters = counters
        self._blocks = list(held.blocks)
        self._have = held.computed
        self._order = RunOrder(len(self._layouts), self._have, length)
        self._parts: dict[tuple[int, int], _Part] = {}
        self.taken_bytes = self.taken_runs = 0  # that were as they should be

    @property
    def held(self) -> HeldKv:
        """Its blocks, and what can be computed with: up to a partial block's end only when all is
        there."""
        return HeldKv(tuple(self._blocks), self.computed)

    @property
    def computed(self) -> int:
        order = self._order
        return order.length if order.complete else order.arrived // self._size * self._size

    @property
    def length(self) -> int:
        return self._order.length

    @property
    def left(self) -> int:
        """So many positions have not come in all layers."""
        return self._order.length - self._order.arrived

    @property
    def most_arrived(self) -> int:
        """No position from here on has come in any layer."""
        return self._order.most_arrived

    @property
    def awaits_again(self) -> bool:
        """Whether all that is left is to be sent again."""
        return self._order.awaits_again

    @property
    def complete(self) -> bool:
        return self._order.complete

    def restart(self) -> int:
        """Another source goes on from the position that is returned."""
        self._have = self.computed
        self._order = RunOrder(len(self._layouts), self._have, self._order.length)
        self._parts.clear()
        return self._have

    def extend(self, blocks: Sequence[BlockId], token_ids: Sequence[int], length: int) -> None:
        """The sequence is longer by these tokens, and ``length`` positions of it are wanted; the
        blocks come behind those that it has."""
        self._blocks += blocks
        self.digests.extend(token_ids)
        self._order.resize(length)
        for (layer, block), part in self._parts.items():
            self._import_if_full(layer, block, part)

    def take(self, run: KvRun, transport: str) -> bool:
        """One run; False where its digest is wrong."""
        return not self.take_stretch(
            Stretch(run.layer, run.start, run.start + run.count),
            run.digest, run.count, run.data, transport,
        )  # fmt: skip

    def take_stretch(
        self, stretch: Stretch, digests: bytes, run_size: int, data: Data, transport: str
    ) -> list[tuple[int, int]]:
        """Runs of one layer, one behind the other; (start, count) of those that are to come again.

        InvalidRequestError where they are not due or of another size than said, DataLossError
        where one is wrong that was wrong before.
        """
        layer, at = stretch.layer, 0
        bounds = self._check(stretch, digests, run_size, data)
        wrong: list[tuple[int, int]] = []
        view, width = memoryview(data), run_bytes(self._layouts[layer], 1)
        most, counted = max(1, PIECE_BYTES // (width * run_size)), 0
        for i in range(0, len(bounds), most):
            runs = bounds[i : i + most]
            end = at + width * sum(count for _, count in runs)
            said = digests[16 * i : 16 * (i + len(runs))]
            bad = self._take_piece(layer, runs, said, view[at:end])
            wrong += bad
            counted += end - at - width * sum(count for _, count in bad)
            at = end
        self.taken_bytes += counted
        self.taken_runs += len(bounds) - len(wrong)
        self._counters.add("runs", len(bounds) - len(wrong))
        self._counters.add_to("bytes", transport, counted)
        return wrong

    def _take_piece(
        self, layer: int, runs: list[tuple[int, int]], said: bytes, view: memoryview
    ) -> list[tuple[int, int]]:
        """Runs that are checked and then imported at once; those that are wrong."""
        width = run_bytes(self._layouts[layer], 1)
        found = self.digests.of_each(layer, runs, width, view)
        wrong: list[tuple[int, int]] = []
        good: list[tuple[int, int, int]] = []  # (start, count, offset of its bytes)
        at = 0
        try:
            for i, (start, count) in enumerate(runs):
                self._order.take(layer, start, count)
                if found[16 * i : 16 * (i + 1)] == said[16 * i : 16 * (i + 1)]:
                    good.append((start, count, at))
                else:
                    self._counters.add("bad_digests")
                    self._order.miss(layer, start, count)
                    wrong.append((start, count))
                    if good:
                        self._place(layer, good, view)
                        good = []
                at += count * width
        finally:  # what was taken and was right is said to have arrived, so it enters the cache
            if good:
                self._place(layer, good, view)
        return wrong

    def _check(
        self, stretch: Stretch, digests: bytes, run_size: int, data: Data
    ) -> list[tuple[int, int]]:
        """Bounds of the runs, of which there are as many as have digests and bytes."""
        layer, start, stop = stretch.layer, stretch.start, stretch.stop
        if not 0 <= layer < len(self._layouts):
            raise InvalidRequestError(f"runs of layer {layer}: there are {len(self._layouts)}")
        if run_size < 1 or not 0 <= start < stop <= self._order.length:
            raise InvalidRequestError(
                f"runs of {run_size} from position {start} to {stop - 1}, of "
                f"{self._order.length} that are wanted"
            )
        bounds = list(run_ends(start, stop, run_size))
        size = run_bytes(self._layouts[layer], stop - start)
        if len(data) != size or len(digests) != 16 * len(bounds):
            raise InvalidRequestError(
                f"{len(data)} bytes and {len(digests)} of digests are not {len(bounds)} runs of "
                f"layer {layer}, which have {size}"
            )
        return bounds

    def _place(self, layer: int, runs: list[tuple[int, int, int]], view: memoryview) -> None:
        """Checked runs into the cache, whole blocks at once."""
        layout, size = self._layouts[layer], self._size
        start, count, at = runs[0]
        bytes_X = tensor_of(view)  # which outlives it
        if start % size == 0 and all(count == size for _, count, _ in runs):
            first = start // size
            blocks = self._blocks[first : first + len(runs)]
            data_X = bytes_X[at : at + run_bytes(layout, len(runs) * size)]
            self._house.import_kv(layer, blocks, data_X.view(len(runs), -1))
            return
        for start, count, at in runs:
            run_X = bytes_X[at : at + run_bytes(layout, count)]
            self._put_together(layer, start, count, run_X)

    def _put_together(self, layer: int, start: int, count: int, run_X: Tensor) -> None:
        """A run that is no whole block here, into the blocks that it touches."""
        layout, size, done = self._layouts[layer], self._size, 0
        source = resized(layout, count)
        while done < count:
            block, first = divmod(start + done, size)
            part = self._parts.get((layer, block))
            if part is None:
                part = _Part(torch.zeros(layout.nbytes, dtype=torch.uint8))
                self._parts[layer, block] = part
            taken = min(size - first, count - done)
            copy_positions((source, run_X, done), (layout, part.data_X, first), taken)
            part.filled += taken
            done += taken
            self._import_if_full(layer, block, part)
            if part.filled == size:
                del self._parts[layer, block]

    def _import_if_full(self, layer: int, block: int, part: _Part) -> None:
        """Nothing more of the block is wanted; it stays a part, for more may be wanted later."""
        if part.filled == min(self._size, self._order.length - block * self._size):
            self._house.import_kv(layer, [self._blocks[block]], part.data_X[None])
