"""The table of NPUs over the twin of their operators, against the reference.

What is exact (int8 products, quantised rows, routing, units, combine) is equal to the bit; norms,
activations, float products and attention are within the bounds stated here. Of hardware this says
nothing beyond the operators' documentation.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeserve.errors import ConfigError, InternalError
from moeserve.kernels.ascend import calls, grid
from moeserve.kernels.ascend.limits import attention_lacks, heads_lack, routing_lacks
from moeserve.kernels.ascend.ops import AscendOps
from moeserve.kernels.ascend.schemas import read_schemas, version_of_schemas
from moeserve.kernels.ascend.twin import twins_of_all
from moeserve.kernels.matrix import Matrix, quantize_rows, to_int4, to_int8
from moeserve.kernels.ops import (
    Activation,
    AttentionBatch,
    Experts,
    KvCache,
    KvShape,
    Ops,
    RouterSpec,
)
from moeserve.kernels.reference.combine import exact_sum
from moeserve.kernels.reference.ops import ReferenceOps
from moeserve.kernels.select import TABLES

REFERENCE = ReferenceOps()
FEW = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**31)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def as_kind(weight: Tensor, kind: str) -> Matrix:
    if kind == "int8":
        return to_int8(weight)
    return to_int4(weight, 16) if kind == "int4" else weight.to(getattr(torch, kind))


# Of the greatest value of a row: fp32 differs in the order of sums, bf16 is rounded once more.
BOUND = {"float32": 2e-6, "bfloat16": 2**-7, "int8": 0.0, "int4": 0.0}


def near(a: Tensor, b: Tensor, bound: float) -> bool:
    if bound == 0:
        return torch.equal(a, b)
    return bool(((a - b).abs() <= bound * b.abs().amax(-1, keepdim=True)).all())


@pytest.mark.parametrize("kind", BOUND)
@FEW
@given(seed=seeds, t=st.integers(0, 9), bias=st.booleans())
def test_products(npu: AscendOps, kind: str, seed: int, t: int, bias: bool) -> None:
    x, weight = draw(seed, t, 64), as_kind(draw(seed + 1, 40, 64), kind)
    b = draw(seed + 2, 40) if bias else None
    mine, theirs = npu.pack_linear(weight, b), REFERENCE.pack_linear(weight, b)
    assert near(npu.linear(x, mine), REFERENCE.linear(x, theirs), BOUND[kind])
    heads = as_kind(draw(seed + 3, 4, 24, 64), kind)
    x_TAK = draw(seed + 4, t, 4, 64)
    mine, theirs = npu.pack_heads(heads), REFERENCE.pack_heads(heads)
    if t:
        found, wanted = npu.linear_heads(x_TAK, mine), REFERENCE.linear_heads(x_TAK, theirs)
        assert near(found, wanted, BOUND[kind])


def test_columns_beyond_what_an_operator_takes_are_computed_in_pieces(npu: AscendOps) -> None:
    weight = to_int8(draw(1, 65535 + 300, 8))
    x = draw(2, 3, 8)
    found = npu.linear(x, npu.pack_linear(weight))
    assert torch.equal(found, REFERENCE.linear(x, REFERENCE.pack_linear(weight)))


@FEW
@given(seed=seeds, t=st.integers(1, 9))
def test_rows_are_quantised_to_the_bit(npu: AscendOps, seed: int, t: int) -> None:
    x = draw(seed, t, 70) * draw(seed + 1, t, 1).exp()
    x[0, 3] = [torch.nan, torch.inf, 0.0, 1e-38][seed % 4]
    for mine, theirs in zip(npu.quantize_per_token(x), quantize_rows(x), strict=True):
        assert torch.equal(mine.nan_to_num(9.0), theirs.nan_to_num(9.0))


@FEW
@given(seed=seeds, hidden=st.integers(1, 100), wide=st.booleans())
def test_units_and_exact_sums_are_the_reference_s(
    npu: AscendOps, seed: int, hidden: int, wide: bool
) -> None:
    kind = "float32" if wide else "int8"
    up, down = (as_kind(draw(seed, 3, *s), kind) for s in ((8, hidden), (hidden, 4)))
    mine, theirs = npu.pack_experts(up, down), REFERENCE.pack_experts(up, down)
    x = draw(seed, 5, hidden) * 2.0 ** float(seed % 61 - 30)
    x[4] = 0.0
    units = REFERENCE.units(x, theirs)
    assert torch.equal(npu.units(x, mine), units)
    y, weights = draw(seed + 1, 5, 2, hidden) * x.abs().amax(), draw(seed + 2, 5, 2)
    sums = grid.exact_sums(y, weights, units, 2 if wide else 1)
    rows = [
        exact_sum([w * r for w, r in zip(ws, rs, strict=True)], float(u), len(s), 2, hidden)
        for rs, ws, u, s in zip(y, weights, units, sums, strict=True)
    ]
    assert torch.equal(sums, torch.stack(rows))


SPECS = (
    RouterSpec(16, 4),
    RouterSpec(16, 4, "softmax", False, 1.7, num_groups=4, topk_groups=2, group_score="max"),
    RouterSpec(16, 4, "sigmoid", scale=2.5, num_groups=4, topk_groups=2),
    RouterSpec(8, 3, "topk_softmax"),
    RouterSpec(1, 1, "sigmoid", normalise=False),
)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@FEW
@given(seed=seeds, t=st.integers(0, 6), bias=st.booleans())
def test_routing_chooses_the_same_experts(
    npu: AscendOps, spec: RouterSpec, seed: int, t: int, bias: bool
) -> None:
    logits = draw(seed, t, spec.num_experts)
    b = draw(seed + 1, spec.num_experts) * 0.1 if bias else None
    ids, weights = npu.route_topk(logits, spec, b)
    wanted_ids, wanted = REFERENCE.route_topk(logits, spec, b)
    assert torch.equal(ids, wanted_ids)
    assert torch.allclose(weights, wanted, rtol=1e-5, atol=0)


def test_of_equal_experts_the_lower_ids_win(npu: AscendOps) -> None:
    ids, _ = npu.route_topk(torch.zeros(3, 16), RouterSpec(16, 4))
    assert ids.tolist() == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_experts(npu: AscendOps, kind: str, activation: Activation) -> None:
    up, down = as_kind(draw(1, 6, 48, 64), kind), as_kind(draw(2, 6, 64, 24), kind)
    biases = draw(3, 6, 48), draw(4, 6, 64)
    found: list[Tensor] = []
    x, ids = draw(5, 7, 64), torch.stack([torch.randperm(6)[:3] for _ in range(7)]).int()
    for ops in (npu, REFERENCE):
        experts: Experts = ops.pack_experts(up, down, *biases, activation)
        weights = draw(6, 7, 3).abs()
        found += [ops.moe_ffn(x, experts, ids, weights, ops.units(x, experts))]
        found += [ops.moe_ffn(x, experts, ids, weights)]
    # An activation's last bit may move a code of the second product by one.
    bound = 2**-6 if kind == "bfloat16" else 1e-2 if kind == "int8" else 2e-6
    assert near(found[0], found[2], bound + 2**-11)
    assert near(found[1], found[3], bound)


GQA = KvShape(6, 128, 2, 128, 128, torch.bfloat16)
MLA = KvShape(20, 16, 1, 576, 512, torch.bfloat16, latent=True)


def filled(ops: Ops, shape: KvShape, slots: Tensor, seed: int = 1) -> KvCache:
    cache = ops.new_kv(shape)
    k = draw(seed, len(slots), shape.kv_heads, shape.head_size)
    v = None if shape.latent else draw(seed + 1, len(slots), shape.kv_heads, shape.value_size)
    ops.write_kv(cache, k, v, slots)
    return cache


def a_batch(shape: KvShape) -> tuple[AttentionBatch, Tensor]:
    """A prompt, a chunk of more rows than a piece may have, and one token; blocks not in order."""
    size = shape.block_size
    contexts, rows = [5, 2 * size + 3, size], [5, 20, 1]
    blocks = torch.tensor([[4, 0, 0], [1, 3, 0], [5, 0, 0]], dtype=torch.int32)
    blocks[1, 2] = 2
    starts = torch.tensor([0, *rows]).cumsum(0).int()
    return AttentionBatch(starts, torch.tensor(contexts, dtype=torch.int32), blocks), starts


@pytest.mark.parametrize(("shape", "heads"), [(GQA, 4), (MLA, 4)], ids=["gqa", "mla"])
@pytest.mark.parametrize("window", [None, 9])
def test_attention_over_pages(
    npu: AscendOps, shape: KvShape, heads: int, window: int | None
) -> None:
    assert attention_lacks(shape) == ""
    slots = torch.arange(shape.num_blocks * shape.block_size)
    batch, starts = a_batch(shape)
    q = draw(3, int(starts[-1]), heads, shape.head_size)
    found = {}
    for ops in (npu, REFERENCE):
        cache = filled(ops, shape, slots)
        found[ops.name] = ops.paged_attention(
            q, cache, batch, scale=shape.head_size**-0.5, window=window
        )
        blocks = torch.tensor([5, 1])
        found[f"{ops.name} bytes"] = ops.export_kv(cache, blocks)
        other = ops.new_kv(shape)
        ops.import_kv(other, torch.tensor([0, 2]), found[f"{ops.name} bytes"])
        assert torch.equal(ops.export_kv(other, torch.tensor([0, 2])), found[f"{ops.name} bytes"])
    assert torch.equal(found["ascend bytes"], found["reference bytes"])
    assert near(found["ascend"], found["reference"], 2e-2)
    alone = AttentionBatch(
        torch.tensor([0, 20], dtype=torch.int32), batch.context_S[1:2], batch.blocks_SM[1:2]
    )
    cache = filled(npu, shape, slots)
    by_itself = npu.paged_attention(
        q[5:25], cache, alone, scale=shape.head_size**-0.5, window=window
    )
    assert torch.equal(by_itself, found["ascend"][5:25])


def test_what_falls_back_is_named_once(npu: AscendOps, caplog: pytest.LogCaptureFixture) -> None:
    ops = AscendOps(npu.device)
    for _ in range(2):
        ops.new_kv(KvShape(4, 16, 2, 64, 64, torch.bfloat16))
        ops.pack_linear(to_int4(draw(1, 8, 16), 16))
        ops.route_topk(torch.zeros(1, 1), RouterSpec(1, 1, "sigmoid", normalise=False))
    assert ops.fallbacks == {
        "attention": "heads of 64: fused attention takes 128",
        "int4 products": "no operator keeps the sums of a group exact",
        "routing": "1 experts in a group: gating takes more than 2",
    }
    assert len(caplog.records) == 3


def test_a_torch_npu_with_the_least_operators_serves_and_names_what_it_lacks(
    npu: AscendOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "has", lambda name: name in calls.NEEDED)
    ops, x = AscendOps(npu.device), draw(1, 3, 16)
    spec, pair = RouterSpec(16, 4), (Activation.CLAMPED, Activation.SWIGLU)
    assert torch.equal(ops.route_topk(x, spec)[0], REFERENCE.route_topk(x, spec)[0])
    for activation in pair:
        assert near(ops.glu(x, activation), REFERENCE.glu(x, activation), 2e-6)
    cache = filled(ops, GQA, torch.arange(256))
    batch = AttentionBatch(*(torch.tensor(n, dtype=torch.int32) for n in ([0, 1], [9], [[0]])))
    assert ops.paged_attention(draw(2, 1, 4, 128), cache, batch, scale=0.1).isfinite().all()
    assert ops.fallbacks == {
        "routing": "this torch_npu has no npu_moe_gating_top_k",
        "clamped activation": "this torch_npu has no npu_clipped_swiglu",
        "attention": "this torch_npu has no npu_fused_infer_attention_score_v2",
    }
    assert device_table("npu") is AscendOps


def device_table(kind: str) -> object:
    module, name = TABLES[kind]
    return getattr(importlib.import_module(module), name)


def test_limits_are_those_of_the_documentation() -> None:
    wrong = {
        KvShape(1, 128, 1, 128, 128, torch.int8): "KV of torch.int8",
        KvShape(1, 16, 1, 128, 128, torch.bfloat16): "--block-size 16",
        KvShape(1, 16, 1, 40, 32, torch.bfloat16, latent=True): "a latent of 32 + 8",
        KvShape(1, 64, 1, 576, 512, torch.bfloat16, latent=True): "--block-size 64",
    }
    for shape, reason in wrong.items():
        assert attention_lacks(shape).startswith(reason)
    assert "power of two" in heads_lack(MLA, 12)
    assert "share 2" in heads_lack(GQA, 2 * 65)
    assert heads_lack(GQA, 128) == heads_lack(MLA, 128) == ""
    assert "takes no more" in routing_lacks(RouterSpec(16, 9, num_groups=4, topk_groups=2))
    assert "2048" in routing_lacks(RouterSpec(256, 8, num_groups=80))


def test_every_operator_that_is_called_has_its_schema_and_its_twin(npu: AscendOps) -> None:
    """Calls bind to the wheel's own schemas in every other test here: the twin stands behind."""
    assert read_schemas().keys() == twins_of_all().keys() == set(calls.CALLED)
    assert version_of_schemas() == "2.13.0"
    for name, line in read_schemas().items():
        known = getattr(torch.ops.npu, name).default._schema
        wanted = torch._C.parse_schema(f"npu::{line}")
        assert str(known) == str(wanted)
    assert calls.lacking() == []


def test_a_call_outside_of_a_limit_is_an_error_before_it_is_made(npu: AscendOps) -> None:
    codes = torch.zeros(2, 8, dtype=torch.int8)
    with pytest.raises(InternalError, match="npu_quant_matmul does not take"):
        calls.quant_matmul(codes.float(), codes.T, torch.ones(1))
    with pytest.raises(InternalError, match="npu_grouped_matmul does not take"):
        calls.grouped_matmul(codes, codes[None], torch.tensor([2]))
    with pytest.raises(RuntimeError, match=r"(?i)unknown keyword"):
        torch.ops.npu.npu_swiglu(codes.float(), axis=1)
    with pytest.raises(ConfigError, match="serve the folder that was packed"):
        npu.record_layout(npu.pack_experts(draw(1, 2, 8, 4), draw(2, 2, 4, 4)))


def test_whole_int8_weights_are_cast_to_nz_once_and_no_bit_changes(
    npu: AscendOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Floats and what is not whole in blocks of 32 stay as they are, and so does KV."""
    cast: list[tuple[int, ...]] = []
    in_nz = calls.in_nz
    monkeypatch.setattr(calls, "in_nz", lambda w: cast.append(tuple(w.shape)) or in_nz(w))
    own, kinds = AscendOps(npu.device, nz=True), ("int8", "float32")
    sizes = [(64, 96), (64, 40), (33, 64)]
    pairs = [
        (own.pack_linear(weight), npu.pack_linear(weight))
        for kind in kinds
        for weight in (as_kind(draw(1, out, into), kind) for out, into in sizes)
    ]
    assert cast == [(96, 64)]
    experts = [as_kind(draw(n, 3, *size), "int8") for n, size in enumerate([(64, 32), (32, 32)])]
    packed = own.pack_experts(*experts), npu.pack_experts(*experts)
    heads = as_kind(draw(3, 4, 32, 64), "int8")
    both = own.pack_heads(heads), npu.pack_heads(heads)
    assert cast == [(96, 64), (3, 32, 64), (3, 32, 32), (4, 64, 32)]
    for mine, theirs in pairs:
        x = draw(2, 5, mine.in_features)
        assert torch.equal(own.linear(x, mine), npu.linear(x, theirs))
    x, ids = draw(4, 5, 32), torch.tensor([[0, 2]] * 5, dtype=torch.int32)
    found = [
        t.moe_ffn(x, e, ids, torch.ones(5, 2)) for t, e in zip((own, npu), packed, strict=True)
    ]
    assert torch.equal(*found)
    rows = draw(5, 5, 4, 64)
    assert torch.equal(own.linear_heads(rows, both[0]), npu.linear_heads(rows, both[1]))
    filled(own, GQA, torch.arange(256))
    assert len(cast) == 4
    assert not calls.allow_nz(npu.device)
