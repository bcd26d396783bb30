"""Runs into borrowed blocks: each is checked for its place and its digest before it enters a cache,
all of a frame in one call. The sender's runs may be of another size than the blocks here. Blocks
that begin before ``have`` are somebody else's and not written to.

Letters: R runs, X bytes, D of a digest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moeserve.core import BlockId
from moeserve.engine.sequence import HeldKv
from moeserve.errors import DataLossError, InvalidRequestError
from moeserve.kernels.kv_runs import run_bytes
from moeserve.pools.kv.counters import KvCounters
from moeserve.pools.kv.digests import DIGEST_BYTES, Data, RunDigests
from moeserve.pools.kv.house import KvHouse
from moeserve.pools.kv.order import RunOrder
from moeserve.pools.kv.runs import (
    Stretch,
    count_runs,
    frame_runs,
    stretch_bytes,
    tensor_of,
)


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
        return self._have

    def extend(self, blocks: Sequence[BlockId], token_ids: Sequence[int], length: int) -> None:
        """The sequence is longer by these tokens, and ``length`` positions of it are wanted; the
        blocks come behind those that it has."""
        self._blocks += blocks
        self.digests.extend(token_ids)
        self._order.resize(length)

    def take_stretch(
        self, stretch: Stretch, digests: bytes, run_size: int, data: Data, transport: str
    ) -> list[Stretch]:
        """``take`` one stretch, of which there are as many bytes as its runs have."""
        layer, count = stretch.layer, stretch.stop - stretch.start
        if not 0 <= layer < len(self._layouts) or len(data) != run_bytes(
            self._layouts[layer], count
        ):
            raise InvalidRequestError(
                f"{len(data)} bytes are not {count} positions of layer {layer} of "
                f"{len(self._layouts)}"
            )
        return self.take([stretch], [digests], run_size, data, transport)

    def take(
        self,
        stretches: Sequence[Stretch],
        digests: Sequence[bytes],
        run_size: int,
        data: Data,
        transport: str,
    ) -> list[Stretch]:
        """Runs of each of these, which lie ``stretch_bytes`` one behind the other in ``data``; what
        is to come again, a run each.

        InvalidRequestError where they are not due or of another size than said, DataLossError
        where one is wrong that was wrong before. What came before, and is right, has entered the
        cache then.
        """
        good: list[Stretch] = []
        try:
            at = 0
            for stretch, said in zip(stretches, digests, strict=True):
                self._check(stretch, said, run_size, len(data) - at)
                self._order.take(stretch.layer, stretch.start, stretch.stop - stretch.start)
                good.append(stretch)
                at += stretch_bytes(self._layouts[stretch.layer], stretch)
        finally:  # what was taken is said to have arrived
            wrong = self._import(good, digests, run_size, data, transport) if good else []
        return wrong

    def _check(self, stretch: Stretch, digests: bytes, run_size: int, left: int) -> None:
        """Its runs have as many digests and bytes as they need."""
        layer, start, stop = stretch.layer, stretch.start, stretch.stop
        if not 0 <= layer < len(self._layouts):
            raise InvalidRequestError(f"runs of layer {layer}: there are {len(self._layouts)}")
        if run_size < 1 or not 0 <= start < stop <= self._order.length:
            raise InvalidRequestError(
                f"runs of {run_size} from position {start} to {stop - 1}, of "
                f"{self._order.length} that are wanted"
            )
        runs = count_runs(stretch, run_size)
        size = run_bytes(self._layouts[layer], stop - start)
        if left < size or len(digests) != DIGEST_BYTES * runs:
            raise InvalidRequestError(
                f"{left} bytes and {len(digests)} of digests are not {runs} runs of layer {layer}, "
                f"which have {size}"
            )

    def _import(
        self,
        stretches: Sequence[Stretch],
        digests: Sequence[bytes],
        run_size: int,
        data: Data,
        transport: str,
    ) -> list[Stretch]:
        """In one call: each is checked, and enters the cache if it is right."""
        layouts = self._layouts
        made = frame_runs(layouts, self.digests, stretches, run_size, self._size)
        said = torch.frombuffer(bytearray().join(digests[: len(stretches)]), dtype=torch.uint8)
        used = self._blocks[made.first_block : made.last_block + 1]
        right_R = self._house.import_runs(
            used, made.runs, said.view(-1, DIGEST_BYTES), tensor_of(data)
        )
        bad = [] if right_R.all() else (~right_R).nonzero()[:, 0].tolist()
        nbytes = sum(run_bytes(layouts[s.layer], s.stop - s.start) for s in stretches)
        wrong: list[Stretch] = []
        lost: DataLossError | None = None
        for layer, start, count, _ in made.runs.runs_R4[bad].tolist():
            start += made.first_block * self._size
            wrong.append(Stretch(layer, start, start + count))
            nbytes -= run_bytes(layouts[layer], count)
            try:
                self._order.miss(layer, start, count)
            except DataLossError as error:
                lost = error
        self._counters.add("bad_digests", len(wrong))
        self.taken_bytes += nbytes
        self.taken_runs += len(made.runs) - len(wrong)
        self._counters.add("runs", len(made.runs) - len(wrong))
        self._counters.add_to("bytes", transport, nbytes)
        if lost is not None:
            raise lost
        return wrong
