"""Products of every kind of weight: what ``ops`` promises, to the bit, on every instruction set."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeserve.kernels.cpu.ops import CpuOps, _cpu
from moeserve.kernels.matrix import (
    Int4Matrix,
    Int8Matrix,
    Matrix,
    part_of,
    quantize_rows,
    to_int4,
    to_int8,
)
from moeserve.kernels.ops import Activation
from moeserve.kernels.reference.ops import ReferenceOps
from moeserve.kernels.reference.products import fused

REFERENCE = ReferenceOps()
FEW = settings(max_examples=20, deadline=None)

seeds = st.integers(0, 2**31)
rows = st.sampled_from([0, 1, 2, 3, 5, 13, 14, 15, 31])
sizes = st.one_of(st.integers(1, 70), st.sampled_from([96, 127, 128, 200]))
kinds = st.sampled_from(["float32", "bfloat16", "int8", "int4"])
MXFP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """+0 is not -0; one NaN is as good as another."""
    numbers = ~(a.isnan() & b.isnan())
    return a.shape == b.shape and torch.equal(
        a.view(torch.int32)[numbers], b.view(torch.int32)[numbers]
    )


def as_kind(weight: Tensor, kind: str) -> Matrix:
    if kind == "int8":
        return to_int8(weight)
    if kind == "int4":
        return to_int4(weight, 32)
    return weight.to(getattr(torch, kind))


def random_int8(*shape: int) -> Int8Matrix:
    """Also -128, which we never make but a checkpoint may hold."""
    codes = torch.randint(-128, 128, shape, dtype=torch.int8)
    return Int8Matrix(codes, torch.rand(shape[:-1]) * 0.01)


def random_int4(shape: tuple[int, ...], group: int, zeros: str) -> Int4Matrix:
    *leading, k = shape
    groups = -(-k // group)
    packed = torch.randint(256, (*leading, k // 2), dtype=torch.uint8)
    scale = torch.rand(*leading, groups) * 0.1
    same = 0 if zeros == "levels" else int(torch.randint(16, ()))
    zero = torch.full((*leading, groups), same, dtype=torch.uint8)
    if zeros == "each":
        zero = torch.randint(16, (*leading, groups), dtype=torch.uint8)
    return Int4Matrix(packed, scale, zero, group, MXFP4 if zeros == "levels" else None)


def activations(t: int, k: int) -> Tensor:
    """Rows of very different sizes, one of zeros, one with NaN, one with an infinity."""
    x = torch.randn(t, k) * torch.logspace(-3, 3, max(t, 1))[:t, None]
    for row, value in ((2, torch.nan), (3, -torch.inf)):
        if row < t:
            x[row, k // 2] = value
    if t > 4:
        x[4] = 0
    return x


@FEW
@given(seeds, rows, sizes)
def test_quantize_per_token(native: CpuOps, seed: int, t: int, k: int) -> None:
    torch.manual_seed(seed)
    x = activations(t, k)
    (codes, scale), (their_codes, their_scale) = native.quantize_per_token(x), quantize_rows(x)
    assert torch.equal(codes, their_codes)
    assert same_bits(scale, their_scale)


def test_quantize_per_token_at_the_ends_of_the_number_line(native: CpuOps) -> None:
    for most in (1e-45, 1e-38, 2.0**-101, 2.0**-100, 1.0, 3.4e38):
        x = torch.linspace(-1, 1, 255).mul(most)[None]
        codes, scale = native.quantize_per_token(x)
        their_codes, their_scale = quantize_rows(x)
        assert torch.equal(codes, their_codes), most
        assert same_bits(scale, their_scale), most
        small = most < 2.0**-100
        assert codes.abs().max() == (0 if small else 127), most
        assert (scale == 0).all() == small, most


def test_half_a_code_rounds_to_even(native: CpuOps) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert native.quantize_per_token(x)[0].tolist() == [[127, 0, 2, 2, 0, -2, -2]]


@FEW
@given(seeds, rows, sizes, sizes, st.booleans())
@example(seed=0, t=5, n=40, k=1, has_bias=False)
def test_int8_equals_the_reference(
    native: CpuOps, seed: int, t: int, n: int, k: int, has_bias: bool
) -> None:
    torch.manual_seed(seed)
    weight, bias = random_int8(n, k), torch.randn(n) if has_bias else None
    x = activations(t, k)
    ours = native.linear(x, native.pack_linear(weight, bias))
    assert same_bits(ours, REFERENCE.linear(x, REFERENCE.pack_linear(weight, bias)))


def test_int8_sums_do_not_overflow(native: CpuOps) -> None:
    k = 1 << 17
    for sign in (1, -1):
        weight = Int8Matrix(torch.full((3, k), 127 * sign, dtype=torch.int8), torch.ones(3))
        out = native.linear(torch.full((1, k), 127.0), native.pack_linear(weight))
        assert out.tolist() == [[float(127 * 127 * k * sign)] * 3]


@FEW
@example(132572, 2, 96, 200, 64, "same", True)  # a code on the brink, where 127 / max is off a bit
@given(
    seeds,
    rows,
    sizes,
    sizes.map(lambda k: k + k % 2),
    st.sampled_from([1, 5, 16, 32, 64, 96, 128, 1000]),
    st.sampled_from(["same", "each", "levels"]),
    st.booleans(),
)
def test_int4_equals_the_reference(
    native: CpuOps, seed: int, t: int, n: int, k: int, group: int, zeros: str, has_bias: bool
) -> None:
    torch.manual_seed(seed)
    weight, bias = random_int4((n, k), group, zeros), torch.randn(n) if has_bias else None
    x = activations(t, k)
    ours = native.linear(x, native.pack_linear(weight, bias))
    assert same_bits(ours, REFERENCE.linear(x, REFERENCE.pack_linear(weight, bias)))


def bf16_chain(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    """Two fused multiply-adds per pair of features, the odd one first; denormals are zero."""
    x, w = (torch.nn.functional.pad(m, (0, m.shape[1] % 2)) for m in (x_TK.bfloat16(), weight_NK))
    x, w = (m.double().where(m.abs() >= 2.0**-126, 0.0) for m in (x, w))
    total = torch.zeros(len(x), len(w))
    for k in range(0, x.shape[1], 2):
        for feature in (k + 1, k):
            # The product of two bf16 is exact in 16 bits, so rounding twice is rounding once.
            exact = x[:, feature, None] * w[:, feature] + total.double()
            # A processor flushes what is below the least normal after rounding to 24 bits.
            total = exact.float().where(exact.abs() >= 2.0**-126 * (1 - 2.0**-25), 0.0)
    return total


@FEW
@given(seeds, rows, sizes, sizes, st.sampled_from([1.0, 1e-19, 3e18]))
def test_bf16_is_the_chain_that_ops_tells_of(
    native: CpuOps, seed: int, t: int, n: int, k: int, size: float
) -> None:
    """Also where products and sums are denormal, and where they nearly overflow."""
    torch.manual_seed(seed)
    x, weight = torch.randn(t, k) * size, (torch.randn(n, k) * size).bfloat16()
    ours = native.linear(x, native.pack_linear(weight))
    assert torch.equal(ours, bf16_chain(x, weight))


@FEW
@given(seeds, rows, st.integers(1, 4), sizes, sizes, kinds)
def test_heads_are_matrices_of_their_own(
    native: CpuOps, seed: int, t: int, heads: int, n: int, k: int, kind: str
) -> None:
    torch.manual_seed(seed)
    k += k % 2
    weight, x = as_kind(torch.randn(heads, n, k), kind), torch.randn(t, heads, k)
    ours = native.linear_heads(x, native.pack_heads(weight))
    alone = [native.linear(x[:, a], native.pack_linear(part_of(weight, a))) for a in range(heads)]
    assert same_bits(ours, torch.stack(alone, 1))


def compose_moe(
    ops: CpuOps,
    x: Tensor,
    parts: tuple[Matrix, Matrix, Tensor | None, Tensor | None],
    activation: Activation,
    ids: Tensor,
    weights: Tensor,
) -> Tensor:
    """Experts from the other ops of the table, one (token, expert) pair at a time."""
    gate_up, down, gate_up_bias, down_bias = parts
    out = torch.zeros(x.shape)
    for t, chosen in enumerate(ids.tolist()):
        total = torch.zeros(1, x.shape[1])
        for c, e in enumerate(chosen):
            up = ops.pack_linear(
                part_of(gate_up, e), None if gate_up_bias is None else gate_up_bias[e]
            )
            last = ops.pack_linear(part_of(down, e), None if down_bias is None else down_bias[e])
            inner = ops.glu(ops.linear(x[t : t + 1], up), activation)
            total = fused(weights[t, c].expand_as(total), ops.linear(inner, last), total)
        out[t] = total
    return out


@FEW
@given(
    seeds,
    st.sampled_from([0, 1, 2, 5, 16]),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(1, 50).map(lambda k: 2 * k),
    st.integers(1, 50).map(lambda k: 2 * k),
    kinds,
    st.booleans(),
    st.sampled_from(Activation),
)
@example(0, 130, 1, 1, 64, 48, "int8", True, Activation.SWIGLU)
@example(0, 130, 2, 1, 34, 66, "int4", False, Activation.CLAMPED)
@pytest.mark.usefixtures("two_threads")
def test_experts_are_the_composition_of_linear_and_glu(
    native: CpuOps,
    seed: int,
    t: int,
    experts: int,
    chosen: int,
    hidden: int,
    inner: int,
    kind: str,
    has_bias: bool,
    activation: Activation,
) -> None:
    """Also with experts nobody chose, and more rows for one than are taken at once."""
    torch.manual_seed(seed)
    parts = (
        as_kind(torch.randn(experts, 2 * inner, hidden) * hidden**-0.5, kind),
        as_kind(torch.randn(experts, hidden, inner) * inner**-0.5, kind),
        torch.randn(experts, 2 * inner) if has_bias else None,
        torch.randn(experts, hidden) if has_bias else None,
    )
    x, weights = activations(t, hidden), torch.rand(t, chosen)
    ids = torch.randint(experts, (t, chosen), dtype=torch.int32)
    packed = native.pack_experts(*parts, activation)
    ours = native.moe_ffn(x, packed, ids, weights)
    assert same_bits(ours, compose_moe(native, x, parts, activation, ids, weights))


@FEW
@given(seeds, st.integers(1, 9), st.sampled_from(["int8", "int4"]))
def test_quantised_experts_are_close_to_the_reference(
    native: CpuOps, seed: int, t: int, kind: str
) -> None:
    """Not to the bit: where two exponentials differ in their last bit, a code may."""
    torch.manual_seed(seed)
    parts = as_kind(torch.randn(5, 80, 64) / 8, kind), as_kind(torch.randn(5, 64, 40) / 6, kind)
    x, weights = torch.randn(t, 64), torch.rand(t, 2)
    ids = torch.randint(5, (t, 2), dtype=torch.int32)
    ours = native.moe_ffn(x, native.pack_experts(*parts), ids, weights)
    theirs = REFERENCE.moe_ffn(x, REFERENCE.pack_experts(*parts), ids, weights)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_row_spoils_itself_alone(native: CpuOps, kind: str, bad: float) -> None:
    torch.manual_seed(0)
    weight = as_kind(torch.randn(50, 96), kind)
    experts = native.pack_experts(
        as_kind(torch.randn(4, 80, 96), kind), as_kind(torch.randn(4, 96, 40), kind)
    )
    packed, x = native.pack_linear(weight), torch.randn(20, 96)
    ids, weights = torch.randint(4, (20, 2), dtype=torch.int32), torch.rand(20, 2)
    clean = native.linear(x, packed), native.moe_ffn(x, experts, ids, weights)
    x[7, 30] = bad
    spoiled = native.linear(x, packed), native.moe_ffn(x, experts, ids, weights)
    others = torch.arange(20) != 7
    for before, after in zip(clean, spoiled, strict=True):
        assert same_bits(before[others], after[others])
        assert not after[7].isfinite().any()


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_every_instruction_set_reads_what_another_packed(kind: str) -> None:
    torch.manual_seed(1)
    weight, x = as_kind(torch.randn(70, 150), kind), torch.randn(20, 150)
    before, results = _cpu.isa(), []
    for packer in _cpu.isas():
        _cpu.set_isa(packer)
        packed = CpuOps().pack_linear(weight)
        for isa in _cpu.isas():
            _cpu.set_isa(isa)
            results.append(CpuOps().linear(x, packed))
    _cpu.set_isa(before)
    assert all(same_bits(results[0], other) for other in results)


def test_a_row_that_stands_for_zero_is_only_its_bias(native: CpuOps) -> None:
    weight, bias = random_int8(40, 64), torch.randn(40)
    out = native.linear(torch.zeros(2, 64), native.pack_linear(weight, bias))
    assert torch.equal(out, bias.expand(2, 40))


def test_weights_in_a_strided_view_are_read_as_they_are_seen(native: CpuOps) -> None:
    codes = torch.randint(-127, 128, (64, 40), dtype=torch.int8)
    weight, x = Int8Matrix(codes.T, torch.rand(40)), torch.randn(3, 64)
    whole = replace(weight, codes=codes.T.contiguous())
    ours = native.linear(x, native.pack_linear(weight))
    assert same_bits(ours, native.linear(x, native.pack_linear(whole)))


def rounded_once(a: float, b: float, c: float) -> float:
    """The fp32 nearest to a * b + c, by exact arithmetic; of two as near, the even one."""
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    near = np.float32(float(exact))
    around = (np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf)))
    return float(min(around, key=lambda x: (abs(Fraction(float(x)) - exact), x.view(np.int32) & 1)))


def test_a_fused_multiply_add_is_rounded_once() -> None:
    half, tiny = 2.0**-24, 2.0**-23  # half a step of fp32 above 1; one step
    cases = []
    for step in range(40):
        c = 1 + step * tiny
        # The product is just below half a step, by less than fp64 shows beside c.
        cases += [(s * half * (1 + tiny), t * (1 - tiny), c) for s in (1, -1) for t in (1, -1)]
        cases += [(s * half, 1.0, c) for s in (1, -1)]  # ties
        cases += [(0.1 * (step + 1), -3.7 / (step + 1), 0.37), (1e30, 1e-3 * step, -1e27 * step)]
    cases += [(-a, b, -c) for a, b, c in cases]
    abc = np.asarray(cases, np.float32)
    found = fused(*(torch.from_numpy(abc[:, i].copy()) for i in range(3)))
    wanted = [rounded_once(*map(float, case)) for case in abc]
    wrong = [
        (tuple(c), f, w) for c, f, w in zip(abc, found.tolist(), wanted, strict=True) if f != w
    ]
    assert not wrong, wrong[:3]
    twice = (abc[:, 0].astype(np.float64) * abc[:, 1] + abc[:, 2]).astype(np.float32)
    assert (twice != np.asarray(wanted, np.float32)).sum() >= 20, "the cases would show no fault"
