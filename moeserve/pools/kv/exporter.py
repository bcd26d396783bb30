"""Blocks into runs: the KV of one sequence out of a cache, with digests, into the memory given.

All runs of a frame leave in one call, whatever their layers and wherever they begin; the digest of
a run is made in the same pass, of what has left the cache. Letters: R runs, X bytes, D of a digest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise

from torch import Tensor

from moeserve.core import BlockId
from moeserve.kernels.ops import KvRuns
from moeserve.pools.kv.digests import DIGEST_BYTES, RunDigests
from moeserve.pools.kv.house import KvHouse
from moeserve.pools.kv.runs import Stretch, frame_runs, stretch_bytes

Frame = tuple[Stretch, ...]


@dataclass(frozen=True, slots=True)
class FrameParts:
    """The runs of each of some frames, from the frame's first byte on, in the same blocks."""

    house: KvHouse
    blocks: Sequence[BlockId]
    runs: Sequence[KvRuns]

    def export(self, frame: int, out_X: Tensor) -> Tensor:
        """Writes one of them; digests, uint8 [R, D]."""
        return self.house.export_runs(self.blocks, self.runs[frame], out_X)


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
        made = frame_runs(self._layouts, self.digests, stretches, self._size, self._size)
        used = blocks[made.first_block : made.last_block + 1]
        digests = self._house.export_runs(used, made.runs, out_X).numpy().tobytes()
        ends = accumulate((DIGEST_BYTES * count for count in made.counts), initial=0)
        return [digests[begin:end] for begin, end in pairwise(ends)]

    def size_of(self, frame: Frame) -> int:
        return sum(stretch_bytes(self._layouts[stretch.layer], stretch) for stretch in frame)

    def parts(self, blocks: Sequence[BlockId], frames: Sequence[Frame]) -> FrameParts:
        """What one table of all runs makes of the frames."""
        stretches = list(chain.from_iterable(frames))
        made = frame_runs(self._layouts, self.digests, stretches, self._size, self._size)
        counts, runs, begin, byte = iter(made.counts), [], 0, 0
        for frame in frames:
            end = begin + sum(next(counts) for _ in frame)
            own_R4 = made.runs.runs_R4[begin:end].clone()
            own_R4[:, 3] -= byte
            runs.append(KvRuns(own_R4, made.runs.heads_RH[begin:end]))
            begin, byte = end, byte + self.size_of(frame)
        return FrameParts(self._house, blocks[made.first_block : made.last_block + 1], runs)
