"""Weights laid over any memory that has their bytes compute what they compute where they were
packed, to the bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeserve.errors import InternalError
from moeserve.kernels.cpu import _cpu
from moeserve.kernels.cpu.ops import CpuOps
from moeserve.kernels.matrix import Int4Matrix, Source, to_int4, to_int8
from moeserve.kernels.ops import Activation, Experts, Ops, RecordLayout
from moeserve.kernels.records import PAGE
from moeserve.kernels.reference.ops import ReferenceOps

FORMS = ("float32", "bfloat16", "int8", "int4", "int4 zeros", "mxfp4")
LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
FEW = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.fixture(params=[*_cpu.isas(), "reference"], scope="module")
def ops(request: pytest.FixtureRequest) -> Iterator[Ops]:
    if request.param == "reference":
        yield ReferenceOps()
        return
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield CpuOps()
    _cpu.set_isa(before)


def weights(form: str, *shape: int) -> Source:
    w = torch.randn(shape) * shape[-1] ** -0.5
    if form == "int8":
        return to_int8(w)
    if not form.startswith(("int4", "mxfp4")):
        return w.to(getattr(torch, form))
    four = to_int4(w, 32)
    if form == "int4":
        return four
    if form == "int4 zeros":
        zero = torch.randint(0, 16, four.zero.shape, dtype=torch.uint8)
        return Int4Matrix(four.packed, four.scale, zero, 32)
    return Int4Matrix(four.packed, four.scale, torch.zeros_like(four.zero), 32, LEVELS)


def experts_of(
    ops: Ops, form: str, count: int, hidden: int, inner: int, *, biased: bool
) -> Experts:
    return ops.pack_experts(
        weights(form, count, 2 * inner, hidden),
        weights(form, count, hidden, inner),
        torch.randn(count, 2 * inner) if biased else None,
        torch.randn(count, hidden) if biased else None,
        Activation.CLAMPED if biased else Activation.SWIGLU,
    )


def aligned(nbytes: int) -> Tensor:
    """Memory that is not zero, as any that was used before."""
    whole = torch.randint(256, (nbytes + PAGE,), dtype=torch.uint8)
    skip = -whole.data_ptr() % PAGE
    return whole[skip : skip + nbytes]


def records_of(ops: Ops, experts: Experts) -> tuple[RecordLayout, Tensor]:
    layout = ops.record_layout(experts)
    memory = aligned(experts.num_experts * layout.nbytes)
    for e, record in enumerate(memory.view(experts.num_experts, -1)):
        ops.write_record(experts, e, record)
    return layout, memory


@FEW
@given(
    form=st.sampled_from(FORMS),
    count=st.integers(1, 5),
    sizes=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    rows=st.integers(1, 9),
    biased=st.booleans(),
    exact=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_experts_over_their_records_are_the_same_to_the_bit(
    ops: Ops,
    form: str,
    count: int,
    sizes: tuple[int, int],
    rows: int,
    biased: bool,
    exact: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    hidden, inner = (2 * size for size in sizes)
    packed = experts_of(ops, form, count, hidden, inner, biased=biased)
    layout, memory = records_of(ops, packed)
    order = torch.randint(count, (count + 2,)).tolist()
    laid = ops.experts_over(memory, layout, count)
    picked = ops.experts_over(memory, layout, len(order), order)
    assert ops.record_layout(laid) == ops.record_layout(picked) == layout
    assert layout.nbytes % PAGE == 0

    x, weight = torch.randn(rows, hidden), torch.rand(rows, 2)
    slots = torch.randint(len(order), (rows, 2), dtype=torch.int32)
    ids = torch.tensor(order, dtype=torch.int32)[slots.long()]
    units = ops.units(x, packed) if exact else None
    expected = ops.moe_ffn(x, packed, ids, weight, units)
    assert torch.equal(ops.moe_ffn(x, laid, ids, weight, units), expected)
    assert torch.equal(ops.moe_ffn(x, picked, slots, weight, units), expected)


@FEW
@given(
    form=st.sampled_from(FORMS),
    heads=st.one_of(st.none(), st.integers(1, 4)),
    sizes=st.tuples(st.integers(1, 90), st.integers(1, 60)),
    biased=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_a_matrix_over_its_bytes_is_the_same_to_the_bit(
    ops: Ops, form: str, heads: int | None, sizes: tuple[int, int], biased: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    out, into = sizes[0], 2 * sizes[1]
    if heads is None:
        packed = ops.pack_linear(weights(form, out, into), torch.randn(out) if biased else None)
    else:
        packed = ops.pack_heads(weights(form, heads, out, into))
    matrix_form = ops.matrix_form(packed)
    memory = aligned(ops.matrix_bytes(matrix_form))
    ops.write_matrix(packed, memory)
    laid = ops.linear_over(memory, matrix_form)
    assert ops.matrix_form(laid) == matrix_form
    if heads is None:
        x = torch.randn(3, into)
        assert torch.equal(ops.linear(x, laid), ops.linear(x, packed))
    else:
        x = torch.randn(3, heads, into)
        assert torch.equal(ops.linear_heads(x, laid), ops.linear_heads(x, packed))


def test_what_is_written_depends_on_nothing_that_lay_there(ops: Ops) -> None:
    packed = experts_of(ops, "int8", 2, 34, 18, biased=True)
    assert torch.equal(records_of(ops, packed)[1], records_of(ops, packed)[1])


def test_records_are_used_where_they_lie(ops: Ops) -> None:
    """Another expert's record in a slot makes it that expert: what a cache of slots does."""
    packed = experts_of(ops, "int4", 2, 64, 32, biased=False)
    layout, memory = records_of(ops, packed)
    slot = aligned(layout.nbytes)
    laid = ops.experts_over(slot, layout, 1)
    x, weight = torch.randn(1, 64), torch.ones(1, 1)
    for e, record in enumerate(memory.view(2, -1)):
        slot.copy_(record)
        alone = ops.moe_ffn(x, laid, torch.tensor([[0]]).int(), weight)
        assert torch.equal(alone, ops.moe_ffn(x, packed, torch.tensor([[e]]).int(), weight))


def test_memory_that_does_not_fit_is_refused(ops: Ops) -> None:
    packed = experts_of(ops, "float32", 2, 8, 4, biased=False)
    layout, memory = records_of(ops, packed)
    for wrong in (memory[:-1], memory[1:], memory.view(torch.int8), memory.view(2, -1).T):
        with pytest.raises(InternalError, match="do not fit"):
            ops.experts_over(wrong, layout, 2)
    with pytest.raises(InternalError, match="do not fit"):
        ops.experts_over(memory, layout, 1, [2])
    with pytest.raises(InternalError, match="record -1"):
        ops.experts_over(memory, layout, 2, [0, -1])
    with pytest.raises(InternalError, match="2 slots"):
        ops.experts_over(memory, layout, 2, [0])
