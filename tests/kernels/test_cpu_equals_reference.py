"""Every native op does what plain torch does, on every instruction set and odd shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeserve.errors import InternalError
from moeserve.kernels.cpu.ops import CpuOps
from moeserve.kernels.ops import Activation, RouterSpec
from moeserve.kernels.reference.ops import ReferenceOps

REFERENCE = ReferenceOps()
FEW = settings(max_examples=25, deadline=None)

seeds = st.integers(0, 2**31)
rows = st.sampled_from([0, 1, 2, 3, 5, 8, 13])
sizes = st.integers(1, 100)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype)


@FEW
@given(seeds, rows, sizes, sizes, dtypes, st.booleans())
def test_linear(
    native: CpuOps, seed: int, t: int, n: int, k: int, dtype: torch.dtype, has_bias: bool
) -> None:
    torch.manual_seed(seed)
    weight, bias = normal(n, k, scale=k**-0.5, dtype=dtype), normal(n) if has_bias else None
    x = normal(t, k)
    ours = native.linear(x, native.pack_linear(weight, bias))
    close(ours, REFERENCE.linear(x, REFERENCE.pack_linear(weight, bias)))


@FEW
@given(seeds, rows, st.integers(1, 5), sizes, sizes, dtypes)
def test_linear_heads(
    native: CpuOps, seed: int, t: int, heads: int, n: int, k: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(seed)
    weight, x = normal(heads, n, k, scale=k**-0.5, dtype=dtype), normal(t, heads, k)
    ours = native.linear_heads(x, native.pack_heads(weight))
    close(ours, REFERENCE.linear_heads(x, REFERENCE.pack_heads(weight)))


@FEW
@given(
    seeds,
    rows,
    st.integers(1, 9),
    st.integers(1, 4),
    sizes,
    sizes,
    dtypes,
    st.booleans(),
    st.sampled_from(Activation),
)
def test_moe_ffn(
    native: CpuOps,
    seed: int,
    t: int,
    experts: int,
    chosen: int,
    hidden: int,
    inner: int,
    dtype: torch.dtype,
    has_bias: bool,
    activation: Activation,
) -> None:
    torch.manual_seed(seed)
    gate_up = normal(experts, 2 * inner, hidden, scale=hidden**-0.5, dtype=dtype)
    down = normal(experts, hidden, inner, scale=inner**-0.5, dtype=dtype)
    gate_up_bias = normal(experts, 2 * inner) if has_bias else None
    down_bias = normal(experts, hidden) if has_bias else None
    x, weights = normal(t, hidden), torch.rand(t, chosen)
    ids = torch.randint(experts, (t, chosen), dtype=torch.int32)

    packed = native.pack_experts(gate_up, down, gate_up_bias, down_bias, activation)
    ours = native.moe_ffn(x, packed, ids, weights)
    packed = REFERENCE.pack_experts(gate_up, down, gate_up_bias, down_bias, activation)
    # Activations that differ in their last bit may round to neighbouring bf16.
    most = 0.02 if dtype is torch.bfloat16 else 1e-5
    theirs = REFERENCE.moe_ffn(x, packed, ids, weights)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=most)


@pytest.mark.parametrize("expert", [-1, 4])
def test_moe_ffn_refuses_an_expert_that_does_not_exist(native: CpuOps, expert: int) -> None:
    packed = native.pack_experts(normal(4, 6, 5), normal(4, 5, 3))
    with pytest.raises(InternalError, match=r"0\.\.3"):
        native.moe_ffn(normal(1, 5), packed, torch.tensor([[expert]]).int(), torch.ones(1, 1))


@FEW
@given(seeds, st.lists(st.integers(0, 4), min_size=1, max_size=2), st.integers(1, 300))
def test_rms_norm(native: CpuOps, seed: int, leading: list[int], size: int) -> None:
    torch.manual_seed(seed)
    x, weight = normal(*leading, size, scale=3.0), normal(size)
    close(native.rms_norm(x, weight, 1e-6), REFERENCE.rms_norm(x, weight, 1e-6))


@FEW
@given(seeds, rows, sizes, st.sampled_from(Activation), st.sampled_from([1.0, 10.0, 100.0]))
def test_glu(
    native: CpuOps, seed: int, t: int, inner: int, activation: Activation, scale: float
) -> None:
    torch.manual_seed(seed)
    x = normal(t, 2 * inner, scale=scale)
    ours, theirs = native.glu(x, activation), REFERENCE.glu(x, activation)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("activation", Activation)
def test_glu_at_the_ends_of_the_number_line(native: CpuOps, activation: Activation) -> None:
    gate = torch.tensor([torch.nan, 3e38, 200.0, 88.8, 0.0, -0.0, -87.0, -200.0, -3e38])
    x = torch.cat((gate, torch.ones_like(gate)))[None]
    ours, theirs = native.glu(x, activation), REFERENCE.glu(x, activation)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-30, equal_nan=True)


@FEW
@given(seeds, rows, st.integers(1, 4), st.integers(0, 40), st.integers(0, 9), st.booleans())
def test_rope(
    native: CpuOps, seed: int, t: int, heads: int, pairs: int, rest: int, interleaved: bool
) -> None:
    torch.manual_seed(seed)
    x, angle = normal(t, heads, 2 * pairs + rest), normal(t, pairs, scale=10.0)
    ours = native.rope(x, angle.cos(), angle.sin(), interleaved)
    close(ours, REFERENCE.rope(x, angle.cos(), angle.sin(), interleaved))


@st.composite
def router_specs(draw: st.DrawFn) -> RouterSpec:
    groups = draw(st.sampled_from([1, 1, 2, 4, 8]))
    experts = groups * draw(st.integers(1, 20))
    kept = draw(st.integers(1, groups))
    return RouterSpec(
        num_experts=experts,
        top_k=draw(st.integers(1, min(8, kept * experts // groups))),
        scoring=draw(st.sampled_from(["softmax", "sigmoid", "topk_softmax"])),
        normalise=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 2.5])),
        num_groups=groups,
        topk_groups=kept,
        group_score=draw(st.sampled_from(["top2", "max"])),
    )


# Always the same examples: now and then two random scores differ by less than two correct
# roundings of them, and either order is right.
@settings(max_examples=100, deadline=None, derandomize=True)
@given(seeds, rows, router_specs(), st.booleans(), st.booleans())
def test_route_topk_chooses_the_same_experts_also_among_equals(
    native: CpuOps, seed: int, t: int, spec: RouterSpec, has_bias: bool, has_ties: bool
) -> None:
    torch.manual_seed(seed)
    logits, bias = normal(t, spec.num_experts), normal(spec.num_experts, scale=0.3)
    if has_ties:
        width = spec.num_experts // spec.num_groups
        twins = torch.randint(spec.num_experts, (spec.num_experts,))
        logits, bias = logits[:, twins], bias[twins]
        logits[:, -width:], bias[-width:] = logits[:, :width].clone(), bias[:width].clone()
    args = (logits, spec, bias if has_bias else None)
    (our_ids, our_weights), (ids, weights) = native.route_topk(*args), REFERENCE.route_topk(*args)
    assert our_ids.tolist() == ids.tolist()
    close(our_weights, weights)


def test_of_equal_experts_the_lower_ids_win(native: CpuOps) -> None:
    ids, weights = native.route_topk(torch.zeros(1, 40), RouterSpec(40, 3))
    assert ids.tolist() == [[0, 1, 2]]
    close(weights, torch.full((1, 3), 1 / 3))


def test_a_strided_activation_is_read_as_it_is_seen(native: CpuOps) -> None:
    weight, x = normal(7, 5), normal(5, 9)
    packed = native.pack_linear(weight)
    assert torch.equal(native.linear(x.T, packed), native.linear(x.T.contiguous(), packed))
