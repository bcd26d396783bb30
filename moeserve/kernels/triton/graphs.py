"""Steps in which every sequence has one token, captured once and replayed.

A graph is of a bucket: at most so many rows, which see at most so many segments of the past. It
reads its numbers from tensors that stay where they are (``Inputs``); rows beyond the step's go
nowhere: they see nothing, write no KV, and no expert is asked about them. So a replay gives the
bits of the same step run by itself. All kernels of a replay are on their way by one call.

``capture`` is ``CudaCapture`` on a device; tests have one that records. What cannot be replayed
(prompts, several tokens of a sequence) is not brought here.

Letters: see ``ops``; B rows of a bucket.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from moeserve.errors import InternalError
from moeserve.kernels.ops import ATTENTION_SEGMENT, AttentionBatch, KvCache, Ops, Rope, Step, Trunk
from moeserve.kernels.triton.attention import DeviceBatch, Tiles

BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
MOST_GRAPHS = 48  # the one that was longest unused goes
MOST_SHARED = 7  # a tile of attention has at most 2^6 rows of a sequence


class Capture(Protocol):
    """Takes what a device does in ``run``, which it may call several times with the same numbers;
    gives the result, and what fills it anew from the numbers that its inputs then hold."""

    def __call__(self, run: Callable[[], Tensor], /) -> tuple[Tensor, Callable[[], None]]: ...


class CudaCapture:
    """CUDA graphs of one device, which share their memory: results last until the next replay."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None  # of torch, without a name

    def __call__(self, run: Callable[[], Tensor], /) -> tuple[Tensor, Callable[[], None]]:
        with torch.cuda.device(self._device):
            aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                run()  # kernels are compiled, and copies of constants made
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                out = run()
        self._pool = graph.pool()
        return out, graph.replay


@dataclass(frozen=True, slots=True)
class StepData:
    """What of a step is known on the host: its least and greatest slot. ``live_T`` bool, on the
    device: which rows are some sequence's; None where all are."""

    least_slot: int
    most_slot: int
    live_T: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Bucket:
    """The most rows, and the most segments of the past that a row sees."""

    rows: int
    segments: int

    @staticmethod
    def of(rows: int, positions: int) -> Bucket | None:
        """The least that has room; None where there is none."""
        wide = next((b for b in BUCKETS if b >= rows), None)
        segments = max(1, -(-positions // ATTENTION_SEGMENT))
        return None if wide is None else Bucket(wide, 1 << (segments - 1).bit_length())


@dataclass(frozen=True, slots=True)
class Inputs:
    """Of a bucket: views of one tensor on the device, and of one like it on the host (``hosted``),
    which is copied over it for each step. int64 ids, positions and slots [B]; int32 ends [B],
    live [B], tiles [B, 4], blocks [B, M]."""

    whole: Tensor
    hosted: Tensor
    wide_3B: Tensor
    narrow: Tensor
    rows: int
    table: int

    @staticmethod
    def of(rows: int, table: int, device: torch.device) -> Inputs:
        nbytes = 8 * 3 * rows + 4 * rows * (6 + table)
        hosted = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        whole = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        wide, narrow = whole[: 24 * rows], whole[24 * rows :]
        return Inputs(whole, hosted, wide.view(torch.int64), narrow.view(torch.int32), rows, table)

    def part(self, number: int) -> Tensor:
        """Ids, positions, slots."""
        return self.wide_3B[number * self.rows : (number + 1) * self.rows]

    def small(self, start: int, width: int) -> Tensor:
        """int32 [B, width], from ``start`` numbers of a row on."""
        at = self.rows * start
        return self.narrow[at : at + self.rows * width].view(self.rows, width)

    def fill(self, ids: Tensor, positions: Tensor, slots: Tensor, batch: AttentionBatch) -> None:
        """With a step's numbers, and one copy to the device."""
        rows, count, array = self.rows, len(ids), self.hosted.numpy()
        wide = array[: 24 * rows].view(np.int64).reshape(3, rows)
        wide[:, count:] = np.array([[0], [0], [-1]])
        for row, numbers in zip(wide, (ids, positions, slots), strict=True):
            row[:count] = numbers.numpy()
        narrow = array[24 * rows :].view(np.int32)
        narrow[:] = 0
        narrow[:count] = batch.context_S.numpy()
        narrow[rows : rows + count] = 1
        tiles = narrow[2 * rows : 6 * rows].reshape(rows, 4)
        tiles[:count, 0] = tiles[:count, 1] = np.arange(count)
        tiles[:count, 2], tiles[:count, 3] = 1, positions.numpy()
        table = min(self.table, batch.blocks_SM.shape[1])
        blocks = narrow[6 * rows :].reshape(rows, self.table)
        blocks[:count, :table] = batch.blocks_SM.numpy()[:, :table]
        self.whole.copy_(self.hosted, non_blocking=True)

    def batch(self, bucket: Bucket) -> DeviceBatch:
        """Whose numbers are those on the device, whatever they are; what is checked of a step was
        checked on the host."""
        none = torch.zeros(0, dtype=torch.int32)
        first = np.arange(bucket.rows + 1, dtype=np.int64)
        tiles = Tiles(self.small(2, 4), first)
        return DeviceBatch(
            none,
            none,
            none.view(0, 0),
            blocks=self.small(6, self.table),
            ends_T=self.small(0, 1)[:, 0],
            rows=bucket.rows,
            most=bucket.segments * ATTENTION_SEGMENT,
            shares={1 << i: tiles for i in range(MOST_SHARED)},
            checked=True,
        )


@dataclass(frozen=True, slots=True)
class Captured:
    """A bucket's."""

    inputs: Inputs
    logits_BN: Tensor
    replay: Callable[[], None]


class StepGraphs:
    """The graphs of one model over its caches, whose blocks are of one size."""

    def __init__(self, ops: Ops, trunk: Trunk, caches: Sequence[KvCache], capture: Capture) -> None:
        self.replays = 0
        self._ops, self._trunk, self._caches, self._capture = ops, trunk, tuple(caches), capture
        self._graphs: OrderedDict[Bucket, Captured] = OrderedDict()

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """Those that were captured."""
        return tuple(self._graphs)

    def of(self, trunk: Trunk, caches: Sequence[KvCache]) -> bool:
        """Whether it is of these."""
        same = trunk.stack is self._trunk.stack and trunk.head is self._trunk.head
        return same and len(caches) == len(self._caches) and all(map(_is, caches, self._caches))

    def run(
        self, ids_T: Tensor, position_T: Tensor, slot_T: Tensor, batch: AttentionBatch
    ) -> Tensor | None:
        """Logits [T, N], valid until the next run; None where no bucket has room. InternalError
        where the step and the caches do not fit."""
        bucket = Bucket.of(len(ids_T), int(batch.context_S.max()))
        if bucket is None:
            return None
        self._check(slot_T, batch)
        captured = self._graphs.get(bucket)
        if captured is None:
            captured = self._captured(bucket, ids_T, position_T, slot_T, batch)
        else:
            captured.inputs.fill(ids_T, position_T, slot_T, batch)
        self._graphs.move_to_end(bucket)
        captured.replay()
        self.replays += 1
        for cache in self._caches:
            cache.data.passes.done += 1
        return captured.logits_BN[: len(ids_T)]

    def _check(self, slot_T: Tensor, batch: AttentionBatch) -> None:
        shape = self._caches[0].shape
        slots = shape.num_blocks * shape.block_size
        needed = DeviceBatch.of(batch, torch.device("cpu")).blocks_needed(shape.block_size)
        if needed > shape.num_blocks or int(slot_T.min()) < 0 or int(slot_T.max()) >= slots:
            raise InternalError(f"a step's contexts, blocks or slots do not fit {shape}")

    def _captured(
        self, bucket: Bucket, ids_T: Tensor, at_T: Tensor, slot_T: Tensor, batch: AttentionBatch
    ) -> Captured:
        size = self._caches[0].shape.block_size
        table = -(-bucket.segments * ATTENTION_SEGMENT // size)
        inputs = Inputs.of(bucket.rows, table, self._ops.device)
        inputs.fill(ids_T, at_T, slot_T, batch)
        # What a capture calls several times must count as one pass.
        passes = [cache.data.passes.done for cache in self._caches]
        logits_BN, replay = self._capture(lambda: self._forward(inputs, bucket))
        for cache, done in zip(self._caches, passes, strict=True):
            cache.data.passes.done = done
        self._graphs[bucket] = captured = Captured(inputs, logits_BN, replay)
        if len(self._graphs) > MOST_GRAPHS:
            self._graphs.popitem(last=False)
        return captured

    def _forward(self, inputs: Inputs, bucket: Bucket) -> Tensor:
        """Everything here is the device's: nothing is copied from it or to it."""
        ops, trunk, rope = self._ops, self._trunk, self._trunk.rope
        ids_B, position_B, slot_B = map(inputs.part, range(3))
        own = Rope(ops.resident(rope.cos_WR), ops.resident(rope.sin_WR), rope.interleaved)  # type: ignore[attr-defined]
        live_B = inputs.small(1, 1)[:, 0] > 0
        data = StepData(0, 0, live_B)
        step = Step(bucket.rows, own, position_B, slot_B, inputs.batch(bucket), data)
        x_BH = ops.embed(trunk.embedding_WH, ids_B)
        ops.forward_layers(x_BH, trunk.stack, step, self._caches)
        rows_B = torch.arange(bucket.rows, device=ops.device)
        return ops.head(x_BH, rows_B, trunk.head)


def _is(one: object, other: object) -> bool:
    return one is other


def one_token_each(batch: AttentionBatch, tokens: int, rows_R: Tensor) -> bool:
    """Whether a step is of one token of each sequence, and the logits of all are wanted."""
    return 0 < tokens == len(batch.context_S) == len(rows_R)
