"""A row's result is the same bits whatever is computed beside it, by whom and in what pieces."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeserve.kernels.cpu.ops import CpuOps, _cpu
from moeserve.kernels.matrix import Matrix, to_int4, to_int8
from moeserve.kernels.ops import Activation, RouterSpec

FEW = settings(max_examples=10, deadline=None)
seeds = st.integers(0, 2**31)
kinds = st.sampled_from(["float32", "bfloat16", "int8", "int4"])

RowOp = Callable[[CpuOps, Tensor], Tensor]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Stricter than ``==``: +0 is not -0."""
    return a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))


def as_kind(weight: Tensor, kind: str) -> Matrix:
    if kind == "int8":
        return to_int8(weight)
    if kind == "int4":
        return to_int4(weight, 32)
    return weight.to(getattr(torch, kind))


def linear(k: int, n: int, kind: str) -> RowOp:
    weight, bias = as_kind(torch.randn(n, k), kind), torch.randn(n)
    return lambda ops, x: ops.linear(x, ops.pack_linear(weight, bias))


def linear_heads(k: int, n: int, kind: str) -> RowOp:
    weight = as_kind(torch.randn(3, n, k), kind)
    return lambda ops, x: ops.linear_heads(
        x[:, None].expand(-1, 3, -1).contiguous(), ops.pack_heads(weight)
    )


def moe_ffn(k: int, n: int, kind: str) -> RowOp:
    """Each row's experts follow from the row, so that they move with it."""
    n += n % 2
    gate_up = as_kind(torch.randn(6, 2 * n, k), kind)
    down = as_kind(torch.randn(6, k, n), kind)

    def run(ops: CpuOps, x: Tensor) -> Tensor:
        ids, weights = ops.route_topk(x[:, :6].contiguous(), RouterSpec(6, 2))
        return ops.moe_ffn(x, ops.pack_experts(gate_up, down), ids, weights)

    return run


def exact_moe_ffn(k: int, n: int, kind: str) -> RowOp:
    """As above, added on the grid of the row."""
    n += n % 2
    gate_up = as_kind(torch.randn(6, 2 * n, k), kind)
    down = as_kind(torch.randn(6, k, n), kind)

    def run(ops: CpuOps, x: Tensor) -> Tensor:
        ids, weights = ops.route_topk(x[:, :6].contiguous(), RouterSpec(6, 2))
        experts = ops.pack_experts(gate_up, down)
        return ops.moe_ffn(x, experts, ids, weights, ops.units(x, experts))

    return run


def rms_norm(k: int, n: int, kind: str) -> RowOp:
    weight = torch.randn(k)
    return lambda ops, x: ops.rms_norm(x, weight, 1e-6)


def glu(k: int, n: int, kind: str) -> RowOp:
    return lambda ops, x: ops.glu(torch.cat((x, -x), 1), Activation.SWIGLU)


def route_topk(k: int, n: int, kind: str) -> RowOp:
    spec = RouterSpec(k, 4, scoring="sigmoid", scale=2.5)
    bias = torch.randn(k)

    def run(ops: CpuOps, x: Tensor) -> Tensor:
        ids, weights = ops.route_topk(x, spec, bias)
        return torch.cat((ids.float(), weights), 1)

    return run


ROW_OPS = [linear, linear_heads, moe_ffn, exact_moe_ffn, rms_norm, glu, route_topk]
over_row_ops = pytest.mark.parametrize("make", ROW_OPS, ids=lambda make: make.__name__)


@over_row_ops
@FEW
@given(seeds, st.integers(1, 40), st.integers(6, 150), st.integers(1, 150), kinds)
@pytest.mark.usefixtures("two_threads")
def test_a_row_alone_is_the_row_in_any_batch(
    native: CpuOps,
    make: Callable[[int, int, str], RowOp],
    seed: int,
    t: int,
    k: int,
    n: int,
    kind: str,
) -> None:
    torch.manual_seed(seed)
    k += k % 2 if kind == "int4" else 0
    run, x = make(k, n, kind), torch.randn(t, k)
    together = run(native, x)
    order, cut = torch.randperm(t), int(torch.randint(t + 1, ()))
    assert same_bits(run(native, x[order]), together[order])
    assert same_bits(torch.cat((run(native, x[:cut]), run(native, x[cut:]))), together)
    for row in torch.randint(t, (3,)).tolist():
        assert same_bits(run(native, x[row : row + 1]), together[row : row + 1])


# Rows and sizes whose work is just worth sharing, so that every thread gets some.
SHARED = ((1, 290, 470), (9, 170, 230), (130, 90, 110))


@over_row_ops
@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_threads_do_not_change_a_bit(
    native: CpuOps, make: Callable[[int, int, str], RowOp], kind: str
) -> None:
    before = _cpu.threads()
    for t, k, n in SHARED:
        torch.manual_seed(t)
        run, x, results = make(k, n, kind), torch.randn(t, k), []
        for count in (1, 2, 5):
            _cpu.set_threads(count)
            assert _cpu.threads() == count
            results.append(run(native, x))
        _cpu.set_threads(before)
        assert same_bits(results[0], results[1]), t
        assert same_bits(results[0], results[2]), t


@over_row_ops
def test_every_instruction_set_gives_the_same_bits(
    make: Callable[[int, int, str], RowOp],
) -> None:
    """Peers of different processors may share a cache."""
    before = _cpu.isa()
    for kind, t in product(("float32", "bfloat16", "int8", "int4"), (1, 3, 20)):
        torch.manual_seed(t)
        run, x, results = make(124, 77, kind), torch.randn(t, 124), []
        for isa in _cpu.isas():
            _cpu.set_isa(isa)
            results.append(run(CpuOps(), x))
        _cpu.set_isa(before)
        assert all(same_bits(results[0], other) for other in results), (kind, t)
