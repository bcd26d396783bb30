"""What products and attention cost on this machine, measured with the kernels that serve.

Weights are random codes; values do not change the time. "Cold" weights are more than the last cache
holds, taken in turn; "warm" ones are the same few again and again. A figure is the median of
several calls, as it is of steps. Memory is bounded by ``MOST_BYTES``.
Letters as in ``kernels.ops``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle

import torch
from torch import Tensor

from moeserve.forecast.shapes import KernelShapes
from moeserve.forecast.timing import CallTimer
from moeserve.kernels.matrix import GROUP, Int4Matrix, Int8Matrix, Matrix
from moeserve.kernels.ops import AttentionBatch, Experts, KvCache, KvShape, Linear, Ops
from moeserve.offload.model.distinct import equal_use, expected_distinct
from moeserve.offload.model.machine import AttentionCost, ProductCurve, rising

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
# Rows per expert of a curve; measured where tokens choose at random.
ROWS_OF_EXPERT = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0, 128.0)
# A point whose calls take longer is the last one: beyond it the curve is straight.
LONGEST_CALL = 0.12
MOST_BYTES = 192 << 20
BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5 + 5 / GROUP}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
BLOCK = 16
DRAWS = 8
CHUNK = 512
PAST = 1536
Points = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class KernelProbe:
    """Measures the kernels of ``ops`` at ``shapes``, on a machine whose last cache has so many
    bytes."""

    ops: Ops
    shapes: KernelShapes
    cache: int
    timer: CallTimer = field(default_factory=CallTimer)

    def products(self, kind: str) -> ProductCurve:
        """Seconds per weight of a matrix, by rows of activations."""
        out, into = self.shapes.linear, self.shapes.hidden
        copies = copies_beyond(self.cache, out * into * BYTES[kind])
        matrix = random_matrix(kind, out, into)
        stack = [self.ops.pack_linear(matrix) for _ in range(copies)]
        cold, warm = self._linear(stack), self._linear(stack[:1])
        return joined([float(rows) for rows in ROWS], cold, warm)

    def _linear(self, stack: Sequence[Linear]) -> Points:
        weights = self.shapes.linear * self.shapes.hidden

        def call_with(rows: int) -> Callable[[], object]:
            x_TK = torch.randn(rows, self.shapes.hidden)
            turn = cycle(stack)
            return lambda: self.ops.linear(x_TK, next(turn))

        return [(rows, seconds / weights) for rows, seconds in self._measured(call_with)]

    def experts(self, kind: str) -> ProductCurve:
        """Seconds per weight of an expert, by rows for each of the experts that are met."""
        shapes = self.shapes
        size = 3 * shapes.hidden * shapes.inner * BYTES[kind]
        count = max(shapes.top_k, min(shapes.experts, int(MOST_BYTES // size)))
        few = max(shapes.top_k, min(count, int(self.cache // 4 // size)))
        matrices = (
            random_matrix(kind, count, 2 * shapes.inner, shapes.hidden),
            random_matrix(kind, count, shapes.hidden, shapes.inner),
        )
        copies = copies_beyond(self.cache, count * size)
        stacks = [self.ops.pack_experts(*matrices) for _ in range(copies)]
        return joined(ROWS_OF_EXPERT, self._experts(stacks, count), self._experts(stacks[:1], few))

    def _experts(self, stacks: Sequence[Experts], among: int) -> Points:
        """Tokens choose among the first ``among`` experts."""
        shapes, ops = self.shapes, self.ops
        each = 3 * shapes.hidden * shapes.inner
        generator = torch.Generator().manual_seed(among)

        def drawn(tokens: int) -> Tensor:
            order = torch.rand(tokens, among, generator=generator)
            return order.topk(shapes.top_k).indices.to(torch.int32).contiguous()

        def call_with(tokens: int) -> Callable[[], object]:
            x_TH = torch.randn(tokens, shapes.hidden)
            units_T = ops.units(x_TH, stacks[0])
            weights_TC = torch.full((tokens, shapes.top_k), 1 / shapes.top_k)
            turn, ids = cycle(stacks), cycle([drawn(tokens) for _ in range(DRAWS)])
            return lambda: ops.moe_ffn(x_TH, next(turn), next(ids), weights_TC, units_T)

        found: Points = []
        use = equal_use(among, shapes.top_k)
        for tokens, seconds in self._measured(call_with):
            distinct = expected_distinct(use, tokens)
            found.append((tokens * shapes.top_k / distinct, seconds / distinct / each))
        return found

    def attention(self, kind: str) -> AttentionCost:
        """Per operation, of one new token in each of several sequences, and of a chunk of a
        prompt."""
        row = self.ops.kv_bytes_per_block(kv_shape(self.shapes, kind, 1)) // BLOCK
        most = min(int(MOST_BYTES // row), 1 << 17)
        longest = max(PAST + CHUNK, min(most, int(2 * self.cache // row)))
        few = max(256, min(longest, int(self.cache // 8 // row)))
        held = self.ops.new_kv(kv_shape(self.shapes, kind, -(-longest // BLOCK)))
        fill(self.ops, held)
        cold, warm = self._decode(held, longest), self._decode(held, few)
        pairs = CHUNK * PAST + CHUNK * (CHUNK + 1) / 2
        batch = AttentionBatch(ints(0, CHUNK), ints(PAST + CHUNK), blocks_of(1, PAST + CHUNK))
        prefill = self._attend(held, batch, CHUNK) / pairs / self.shapes.attention_operations
        return AttentionCost(cold, warm, prefill)

    def _decode(self, held: KvCache, tokens: int) -> float:
        """Per operation, where sequences share all of the first ``tokens`` tokens out."""
        sequences = 16 if tokens >= 16 * BLOCK * 4 else 4
        each = tokens // sequences // BLOCK * BLOCK
        batch = AttentionBatch(
            torch.arange(sequences + 1, dtype=torch.int32),
            ints(*[each] * sequences),
            blocks_of(sequences, each),
        )
        seconds = self._attend(held, batch, sequences)
        return seconds / (sequences * each) / self.shapes.attention_operations

    def _attend(self, held: KvCache, batch: AttentionBatch, rows: int) -> float:
        q_TAD = torch.randn(rows, self.shapes.heads, self.shapes.head_size)
        return self.timer.typical(lambda: self.ops.paged_attention(q_TAD, held, batch, scale=0.1))

    def _measured(self, call_with: Callable[[int], Callable[[], object]]) -> Points:
        """Seconds of a call by its size, up to the first one that takes too long."""
        found: Points = []
        for size in ROWS:
            found.append((size, self.timer.typical(call_with(size))))
            if found[-1][1] > LONGEST_CALL:
                break
        return found


def joined(rows: Sequence[float], cold: Points, warm: Points) -> ProductCurve:
    """Both on the same rows, as far as both were measured; warm is never more than cold."""
    last = min(cold[-1][0], warm[-1][0])
    shared = [r for r in rows if r <= last] or [rows[0]]
    cold_s = rising([on_line(cold, r) for r in shared])
    warm_s = rising([min(on_line(warm, r), c) for r, c in zip(shared, cold_s, strict=True)])
    return ProductCurve(tuple(shared), cold_s, warm_s)


def on_line(points: Points, x: float) -> float:
    """Straight between points, and level before the first."""
    before = points[0]
    for after in points:
        if after[0] >= x:
            if after[0] == before[0]:
                return after[1]
            return before[1] + (after[1] - before[1]) * (x - before[0]) / (after[0] - before[0])
        before = after
    return before[1]


def copies_beyond(cache: int, size: float) -> int:
    """So many that together they are twice the cache, within what may be taken."""
    return max(1, min(int(2 * cache // size) + 1, int(MOST_BYTES // size), 4096))


def random_matrix(kind: str, *shape: int) -> Matrix:
    """One matrix of random codes, again and again for leading dimensions."""
    out, into = shape[-2:]
    lead = shape[:-2]
    if kind == "int4":
        groups = -(-into // GROUP)
        packed = torch.randint(0, 256, (out, into // 2), dtype=torch.uint8)
        scale, zero = torch.full((out, groups), 1e-3), torch.full((out, groups), 8).byte()
        packed, scale, zero = (
            part.expand(*lead, *part.shape).contiguous() for part in (packed, scale, zero)
        )
        return Int4Matrix(packed, scale, zero)
    if kind == "int8":
        codes = torch.randint(-127, 128, (out, into), dtype=torch.int8)
        return Int8Matrix(codes.expand(*shape).contiguous(), torch.full(shape[:-1], 1e-3))
    plain: Tensor = (torch.randn(out, into) / into**0.5).to(DTYPES[kind])
    return plain.expand(*shape).contiguous()


def kv_shape(shapes: KernelShapes, kind: str, blocks: int) -> KvShape:
    return KvShape(
        blocks,
        BLOCK,
        shapes.kv_heads,
        shapes.head_size,
        shapes.value_size,
        DTYPES[kind],
        shapes.latent,
    )


def fill(ops: Ops, cache: KvCache) -> None:
    """The same few random rows all over, so that no number is odd."""
    s = cache.shape
    rows = 4 * s.block_size
    k = torch.randn(rows, s.kv_heads, s.head_size)
    v = None if s.latent else torch.randn(rows, s.kv_heads, s.value_size)
    for first in range(0, s.num_blocks * s.block_size, rows):
        count = min(rows, s.num_blocks * s.block_size - first)
        ops.write_kv(
            cache, k[:count], None if v is None else v[:count], torch.arange(first, first + count)
        )


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def blocks_of(sequences: int, context: int) -> Tensor:
    """Block tables of sequences that lie one after the other."""
    width = -(-context // BLOCK)
    return torch.arange(sequences * width, dtype=torch.int32).view(sequences, width)
