"""Triton's kernels do what plain torch does; what is whole numbers, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeserve.errors import InternalError
from moeserve.kernels.matrix import Int4Matrix, Matrix, to_int4, to_int8
from moeserve.kernels.ops import Activation, DenseWeights, MlpWeights, Ops, RouterSpec
from moeserve.kernels.reference.ops import ReferenceOps
from moeserve.kernels.wire import Combine

REFERENCE = ReferenceOps()
FEW = settings(max_examples=8, deadline=None)
KINDS = ["float32", "bfloat16", "int8", "int4"]
CODES = ("int8", "int4")

seeds = st.integers(0, 2**31)
rows = st.sampled_from([0, 1, 2, 5, 17])
sizes = st.integers(1, 80)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))


def as_kind(weight: Tensor, kind: str) -> Matrix:
    if kind == "int8":
        return to_int8(weight)
    if kind == "int4":
        return to_int4(weight, 16)
    return weight.to(getattr(torch, kind))


def close(ours: Tensor, theirs: Tensor, most: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=most)


@FEW
@given(seeds, rows, sizes, st.sampled_from([1e-30, 1.0, 1e30]))
def test_quantisation_is_the_oracles_to_the_bit(
    ops: Ops, seed: int, t: int, k: int, scale: float
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(t, k) * scale
    for odd, value in enumerate((torch.nan, torch.inf, 0.0)):
        if odd < t:
            x[odd, torch.randint(k, ())] = value
    codes, steps = ops.quantize_per_token(x)
    expected, expected_steps = REFERENCE.quantize_per_token(x)
    assert torch.equal(codes, expected)
    assert torch.equal(steps.isnan(), expected_steps.isnan())
    assert torch.equal(steps.nan_to_num(), expected_steps.nan_to_num())


@FEW
@given(seeds, rows, sizes, st.integers(1, 40), st.sampled_from(KINDS), st.booleans())
def test_products_of_codes_are_the_oracles_and_others_are_close(
    ops: Ops, seed: int, t: int, n: int, half: int, kind: str, biased: bool
) -> None:
    torch.manual_seed(seed)
    x, weight = torch.randn(t, 2 * half), as_kind(torch.randn(n, 2 * half) / half**0.5, kind)
    bias = torch.randn(n) if biased else None
    ours = ops.linear(x, ops.pack_linear(weight, bias))
    theirs = REFERENCE.linear(x, REFERENCE.pack_linear(weight, bias))
    close(ours, theirs)
    assert kind not in CODES or same_bits(ours, theirs)


def test_codes_may_stand_for_levels(ops: Ops) -> None:
    """MXFP4, whose groups are narrower than a product."""
    levels = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
    packed = torch.randint(256, (20, 32), dtype=torch.uint8)
    zero = torch.zeros(20, 2, dtype=torch.uint8)
    weight, x = Int4Matrix(packed, torch.rand(20, 2), zero, 32, levels), torch.randn(3, 64)
    ours, theirs = (t.linear(x, t.pack_linear(weight)) for t in (ops, REFERENCE))
    assert same_bits(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_matrices_of_their_own(ops: Ops, kind: str) -> None:
    weight, x = as_kind(torch.randn(3, 20, 34) / 6, kind), torch.randn(5, 3, 34)
    ours = ops.linear_heads(x, ops.pack_heads(weight))
    close(ours, REFERENCE.linear_heads(x, REFERENCE.pack_heads(weight)))


@FEW
@given(seeds, rows, sizes, st.sampled_from([1e-30, 1.0, 1e30]), st.sampled_from(CODES))
def test_a_norm_rounded_in_its_own_kernel_gives_the_bits_of_two(
    ops: Any, seed: int, t: int, k: int, scale: float, kind: str
) -> None:
    torch.manual_seed(seed)
    k += k % 2
    x, norm = torch.randn(t, k) * scale, torch.randn(k)
    if t > 1:
        x[0, 0], x[1] = torch.nan, 0.0
    weight = ops.pack_linear(as_kind(torch.randn(9, k), kind))
    found = ops.norm_linear(x, norm, 1e-6, weight)
    assert same_bits(found, ops.linear(ops.rms_norm(x, norm, 1e-6), weight))


def test_a_dense_half_of_codes_launches_one_kernel_less(
    ops: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Than norm, codes, product, activation, codes, product."""
    from moeserve.kernels.triton import experts, products
    from moeserve.kernels.triton.launch import launch

    launched: list[str] = []

    def counting(kernel: Any, *args: Any, **options: Any) -> None:
        launched.append(kernel.__name__)
        launch(kernel, *args, **options)

    for module in (experts, products):
        monkeypatch.setattr(module, "launch", counting)
    norm, w = torch.ones(32), (torch.randn(64, 32), torch.randn(32, 32))
    for kind, expected in {
        "int8": ["norm", "linear", "glu", "quantize", "linear"],
        "float32": ["norm", "linear", "glu", "linear"],
    }.items():
        gate_up, down = (ops.pack_linear(as_kind(part, kind)) for part in w)
        part = ops.prepare(DenseWeights(norm, 1e-6, MlpWeights(gate_up, down)))
        launched.clear()
        ops.dense(torch.randn(3, 32), part)
        assert launched == [f"{name}_kernel" for name in expected]


def test_norm_glu_and_rope(ops: Ops) -> None:
    for size in (1, 24, 130, 5000):
        x, weight = torch.randn(3, 2, size) * 3, torch.randn(size)
        close(ops.rms_norm(x, weight, 1e-6), REFERENCE.rms_norm(x, weight, 1e-6))
    gate = torch.tensor([torch.nan, 3e38, 200.0, 88.8, 0.0, -0.0, -87.0, -200.0, -3e38])
    edges = torch.cat((gate, torch.ones_like(gate)))[None]
    for activation in Activation:
        for x in (torch.randn(4, 60) * 10, edges):
            ours, theirs = ops.glu(x, activation), REFERENCE.glu(x, activation)
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-30, equal_nan=True)
    x, angle = torch.randn(4, 3, 21), torch.randn(4, 8) * 10
    for interleaved in (False, True):
        turned = ops.rope(x, angle.cos(), angle.sin(), interleaved)
        assert same_bits(turned, REFERENCE.rope(x, angle.cos(), angle.sin(), interleaved))


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


# Always the same examples: two random scores may differ by less than roundings of them.
@settings(max_examples=20, deadline=None, derandomize=True)
@given(seeds, router_specs(), st.booleans(), st.booleans())
def test_routing_chooses_the_same_experts_also_among_equals(
    ops: Ops, seed: int, spec: RouterSpec, has_bias: bool, has_ties: bool
) -> None:
    torch.manual_seed(seed)
    logits, bias = torch.randn(5, spec.num_experts), torch.randn(spec.num_experts) * 0.3
    if has_ties:
        twins = torch.randint(spec.num_experts, (spec.num_experts,))
        logits, bias = logits[:, twins], bias[twins]
    args = (logits, spec, bias if has_bias else None)
    (our_ids, our_weights), (ids, weights) = ops.route_topk(*args), REFERENCE.route_topk(*args)
    assert our_ids.tolist() == ids.tolist()
    close(our_weights, weights)


def test_a_row_without_numbers_has_experts_all_the_same(ops: Ops) -> None:
    spec = RouterSpec(12, 3, "sigmoid", num_groups=3, topk_groups=1)
    ids, weights = ops.route_topk(torch.full((1, 12), torch.nan), spec)
    assert ids.tolist() == [[0, 1, 2]]
    assert weights.isnan().all()


@FEW
@given(
    seeds,
    rows,
    st.integers(1, 7),
    st.integers(1, 3),
    st.sampled_from(KINDS),
    st.booleans(),
    st.sampled_from(Activation),
)
def test_experts_are_close_and_exact_where_they_are_whole_numbers(
    ops: Ops, seed: int, t: int, num: int, chosen: int, kind: str, biased: bool, act: Activation
) -> None:
    torch.manual_seed(seed)
    gate_up = as_kind(torch.randn(num, 52, 34) / 6, kind)
    down = as_kind(torch.randn(num, 34, 26) / 5, kind)
    biases = (torch.randn(num, 52), torch.randn(num, 34)) if biased else (None, None)
    x, weights = torch.randn(t, 34), torch.rand(t, chosen)
    ids = torch.randint(num, (t, chosen), dtype=torch.int32)
    found = []
    for table in (ops, REFERENCE):
        packed = table.pack_experts(gate_up, down, *biases, act)
        units = table.units(x, packed)
        made = [table.moe_ffn(x, packed, ids, weights, u) for u in (None, units)]
        found.append((units, *made))
    (units, chained, exact), (their_units, their_chain, their_exact) = found
    assert same_bits(units, their_units)
    # Activations that differ in their last bit may round to neighbouring codes.
    close(chained, their_chain, 1e-5 if kind == "float32" else 0.03)
    close(exact, their_exact, 1e-5 if kind == "float32" else 0.03)


def test_a_contribution_that_is_too_great_or_no_number_makes_its_element_nan(ops: Ops) -> None:
    for kind in KINDS:
        weight = torch.ones(1, 64, 4)
        packed = ops.pack_experts(as_kind(weight, kind), as_kind(torch.ones(1, 4, 32), kind))
        x, ids = torch.ones(3, 4), torch.zeros(3, 1, dtype=torch.int32)
        weights = torch.tensor([[1.0], [torch.nan], [1e30]])
        out = ops.moe_ffn(x, packed, ids, weights, ops.units(x, packed))
        assert out.isnan().all(1).tolist() == [False, True, True], kind


def test_an_expert_that_does_not_exist_is_refused(ops: Ops) -> None:
    packed = ops.pack_experts(torch.randn(4, 6, 5), torch.randn(4, 5, 3))
    for expert in (-1, 4):
        with pytest.raises(InternalError, match=r"0\.\.3"):
            ops.moe_ffn(torch.randn(1, 5), packed, torch.tensor([[expert]]), torch.ones(1, 1))


def test_the_best_of_rows_is_the_first_and_a_number(ops: Ops) -> None:
    from moeserve.kernels.reference.sampling import best_of_rows
    from moeserve.kernels.triton import products

    logits = torch.randint(0, 40, (9, 6000)).float()
    logits[1, 7], logits[2, 5], logits[3] = torch.nan, torch.inf, -torch.inf
    assert products.best_of_rows(logits) == best_of_rows(logits)


def a_row_alone(ops: Ops, kind: str, combine: Combine) -> None:
    gate_up = as_kind(torch.randn(6, 52, 34) / 6, kind)
    packed = ops.pack_experts(gate_up, as_kind(torch.randn(6, 34, 26) / 5, kind))
    linear = ops.pack_linear(as_kind(torch.randn(40, 34), kind), torch.randn(40))
    weight = torch.randn(34)

    def run(x: Tensor) -> Tensor:
        normed = ops.rms_norm(x, weight, 1e-6)
        ids, weights = ops.route_topk(normed[:, :6].contiguous(), RouterSpec(6, 2))
        units = ops.units(x, packed) if combine is Combine.EXACT else None
        mixed = ops.moe_ffn(normed, packed, ids, weights, units)
        return torch.cat((ops.linear(normed, linear), mixed), 1)

    x = torch.randn(19, 34)
    together, order = run(x), torch.randperm(19)
    assert same_bits(run(x[order]), together[order])
    assert same_bits(run(x[5:6]), together[5:6])


@pytest.mark.parametrize(
    ("kind", "combine"), [*((kind, Combine.EXACT) for kind in KINDS), ("int8", Combine.ORDERED)]
)
def test_a_row_alone_is_the_row_in_any_batch(ops: Ops, kind: str, combine: Combine) -> None:
    """Of 19 rows some are in another tile, or in one of another size."""
    a_row_alone(ops, kind, combine)


def test_the_order_of_programs_does_not_show(ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    packed = ops.pack_experts(to_int8(torch.randn(5, 52, 34)), to_int8(torch.randn(5, 34, 26)))
    x, ids = torch.randn(9, 34), torch.randint(5, (9, 2), dtype=torch.int32)
    weights, units = torch.rand(9, 2), ops.units(x, packed)
    forwards = ops.moe_ffn(x, packed, ids, weights, units)

    def backwards(self: Any, *place: int) -> None:
        self.grid_idx = tuple(n - 1 - i for n, i in zip(self.grid_dim, place, strict=True))

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", backwards)
    assert same_bits(ops.moe_ffn(x, packed, ids, weights, units), forwards)
