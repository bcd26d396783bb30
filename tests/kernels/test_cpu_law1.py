"""A row's result is the same bits whatever is computed beside it, by whom and in what pieces."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeserve.kernels import _cpu
from moeserve.kernels.cpu import CpuOps
from moeserve.kernels.ops import Activation, AttentionBatch, RouterSpec

FEW = settings(max_examples=10, deadline=None)
seeds = st.integers(0, 2**31)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])

RowOp = Callable[[CpuOps, Tensor], Tensor]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Stricter than ``==``: +0 is not -0."""
    return a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))


def linear(k: int, n: int, dtype: torch.dtype) -> RowOp:
    weight, bias = torch.randn(n, k).to(dtype), torch.randn(n)
    return lambda ops, x: ops.linear(x, ops.pack_linear(weight, bias))


def linear_heads(k: int, n: int, dtype: torch.dtype) -> RowOp:
    weight = torch.randn(3, n, k).to(dtype)
    return lambda ops, x: ops.linear_heads(
        x[:, None].expand(-1, 3, -1).contiguous(), ops.pack_heads(weight)
    )


def moe_ffn(k: int, n: int, dtype: torch.dtype) -> RowOp:
    """Each row's experts follow from the row, so that they move with it."""
    gate_up, down = torch.randn(6, 2 * n, k).to(dtype), torch.randn(6, k, n).to(dtype)

    def run(ops: CpuOps, x: Tensor) -> Tensor:
        ids, weights = ops.route_topk(x[:, :6].contiguous(), RouterSpec(6, 2))
        return ops.moe_ffn(x, ops.pack_experts(gate_up, down), ids, weights)

    return run


def rms_norm(k: int, n: int, dtype: torch.dtype) -> RowOp:
    weight = torch.randn(k)
    return lambda ops, x: ops.rms_norm(x, weight, 1e-6)


def glu(k: int, n: int, dtype: torch.dtype) -> RowOp:
    return lambda ops, x: ops.glu(torch.cat((x, -x), 1), Activation.SWIGLU)


def route_topk(k: int, n: int, dtype: torch.dtype) -> RowOp:
    spec = RouterSpec(k, 4, scoring="sigmoid", scale=2.5)
    bias = torch.randn(k)

    def run(ops: CpuOps, x: Tensor) -> Tensor:
        ids, weights = ops.route_topk(x, spec, bias)
        return torch.cat((ids.float(), weights), 1)

    return run


def self_attention(k: int, n: int, dtype: torch.dtype) -> RowOp:
    """Every row is the newest of 100 tokens of a sequence of its own, over a common past."""
    cache = torch.randn(7, 16, 1, k).to(dtype)

    def run(ops: CpuOps, x: Tensor) -> Tensor:
        t = len(x)
        batch = AttentionBatch(
            torch.arange(t + 1, dtype=torch.int32),
            torch.full((t,), 100, dtype=torch.int32),
            torch.arange(7, dtype=torch.int32).expand(t, 7).contiguous(),
        )
        q = x[:, None].expand(-1, 5, -1).contiguous()
        return ops.paged_attention(q, cache, cache, batch, scale=k**-0.5)

    return run


ROW_OPS = [linear, linear_heads, moe_ffn, rms_norm, glu, route_topk, self_attention]
over_row_ops = pytest.mark.parametrize("make", ROW_OPS, ids=lambda make: make.__name__)


@over_row_ops
@FEW
@given(seeds, st.integers(1, 40), st.integers(6, 150), st.integers(1, 150), dtypes)
@pytest.mark.usefixtures("two_threads")
def test_a_row_alone_is_the_row_in_any_batch(
    native: CpuOps,
    make: Callable[[int, int, torch.dtype], RowOp],
    seed: int,
    t: int,
    k: int,
    n: int,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(seed)
    run, x = make(k, n, dtype), torch.randn(t, k)
    together = run(native, x)
    order, cut = torch.randperm(t), int(torch.randint(t + 1, ()))
    assert same_bits(run(native, x[order]), together[order])
    assert same_bits(torch.cat((run(native, x[:cut]), run(native, x[cut:]))), together)
    for row in torch.randint(t, (3,)).tolist():
        assert same_bits(run(native, x[row : row + 1]), together[row : row + 1])


@over_row_ops
@pytest.mark.parametrize("t", [1, 9, 130])
def test_threads_do_not_change_a_bit(
    native: CpuOps, make: Callable[[int, int, torch.dtype], RowOp], t: int
) -> None:
    torch.manual_seed(t)
    run, x = make(290, 470, torch.bfloat16), torch.randn(t, 290)
    before, results = _cpu.threads(), []
    for count in (1, 2, 5):
        _cpu.set_threads(count)
        assert _cpu.threads() == count
        results.append(run(native, x))
    _cpu.set_threads(before)
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


@over_row_ops
@pytest.mark.parametrize("t", [1, 3, 20])
def test_every_fused_instruction_set_gives_the_same_bits(
    make: Callable[[int, int, torch.dtype], RowOp], t: int
) -> None:
    """Peers of different processors may share a cache. Plain SSE has no fused multiply-add."""
    torch.manual_seed(t)
    run, x, before = make(123, 77, torch.bfloat16), torch.randn(t, 123), _cpu.isa()
    fused = [isa for isa in _cpu.isas() if isa != "portable"] or ["portable"]
    results = []
    for isa in fused:
        _cpu.set_isa(isa)
        results.append(run(CpuOps(), x))
    _cpu.set_isa(before)
    assert all(same_bits(results[0], other) for other in results)


class Paged:
    """One sequence's keys and values laid out in blocks of a size and order of our choice."""

    def __init__(self, k_PGD: Tensor, v_PGV: Tensor, block_size: int, neighbours: int) -> None:
        length = len(k_PGD)
        self.needed = -(-length // block_size)
        free = torch.randperm(self.needed + neighbours)
        self.table, self.others = free[: self.needed].int(), free[self.needed :].int()
        shape = (len(free), block_size)
        self.k = torch.full((*shape, *k_PGD.shape[1:]), 1e9, dtype=k_PGD.dtype)
        self.v = torch.full((*shape, *v_PGV.shape[1:]), 1e9, dtype=v_PGV.dtype)
        position = torch.arange(length)
        block = self.table.long()[position // block_size]
        self.k[block, position % block_size] = k_PGD
        self.v[block, position % block_size] = v_PGV

    def attend(self, ops: CpuOps, q_TAD: Tensor, context: int, **options: object) -> Tensor:
        """The last rows of the first ``context`` tokens, between two other sequences."""
        t, other = len(q_TAD), len(self.others)
        width = max(self.needed, other)
        table = torch.zeros(3, width, dtype=torch.int32)
        table[0, :other] = table[2, :other] = self.others
        table[1, : self.needed] = self.table
        alone = 1 if other else 0
        batch = AttentionBatch(
            torch.tensor([0, alone, alone + t, 2 * alone + t], dtype=torch.int32),
            torch.tensor([alone, context, alone], dtype=torch.int32),
            table,
        )
        guest = torch.randn(alone, *q_TAD.shape[1:])
        q = torch.cat((guest, q_TAD, guest))
        out = ops.paged_attention(q, self.k, self.v, batch, **options)  # type: ignore[arg-type]
        return out[alone : alone + t]


@settings(max_examples=30, deadline=None)
@given(
    seed=seeds,
    length=st.integers(1, 200),
    group=st.integers(1, 5),
    block_sizes=st.lists(st.sampled_from([1, 3, 16, 64, 100]), min_size=2, max_size=2),
    window=st.sampled_from([None, 1, 7, 64, 90]),
    has_sinks=st.booleans(),
    dtype=dtypes,
    data=st.data(),
)
def test_attention_knows_neither_chunks_nor_blocks_nor_neighbours(
    native: CpuOps,
    seed: int,
    length: int,
    group: int,
    block_sizes: list[int],
    window: int | None,
    has_sinks: bool,
    dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    torch.manual_seed(seed)
    k, v = torch.randn(length, 2, 24).to(dtype), torch.randn(length, 2, 41).to(dtype)
    q = torch.randn(length, 2 * group, 24)
    options: dict[str, object] = {
        "scale": 0.2,
        "window": window,
        "sinks_A": torch.randn(2 * group) if has_sinks else None,
    }
    whole = Paged(k, v, block_sizes[0], neighbours=0).attend(native, q, length, **options)

    cuts = data.draw(st.lists(st.integers(0, length), max_size=4).map(sorted))
    pages = Paged(k, v, block_sizes[1], neighbours=2)
    chunks = [
        pages.attend(native, q[a:b], b, **options)
        for a, b in zip([0, *cuts], [*cuts, length], strict=True)
        if a < b
    ]
    assert same_bits(torch.cat(chunks), whole)


def test_a_neighbour_that_overflowed_stays_alone(native: CpuOps) -> None:
    """Rows of one sequence share reads of the cache, but a later row's infinite value is not
    multiplied by an earlier row's zero."""
    k, v = torch.randn(10, 1, 16), torch.randn(10, 1, 16)
    q = torch.randn(10, 1, 16)
    clean = Paged(k, v, 16, neighbours=0).attend(native, q, 10, scale=0.25)
    v[7:] = torch.inf
    spoiled = Paged(k, v, 16, neighbours=0).attend(native, q, 10, scale=0.25)
    assert same_bits(spoiled[:7], clean[:7])
    assert not spoiled[7:].isfinite().any()
