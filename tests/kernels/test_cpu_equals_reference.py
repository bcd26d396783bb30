"""Every native op does what plain torch does, on every instruction set and odd shapes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeserve.errors import InternalError
from moeserve.kernels.cpu import CpuOps
from moeserve.kernels.ops import Activation, AttentionBatch, RouterSpec
from moeserve.kernels.reference import ReferenceOps

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
    close(ours, REFERENCE.moe_ffn(x, packed, ids, weights))


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


@FEW
@given(seeds, dtypes, st.integers(1, 7), st.integers(1, 3), st.integers(1, 40), st.booleans())
def test_write_kv_rounds_as_torch_does(
    native: CpuOps, seed: int, dtype: torch.dtype, size: int, heads: int, width: int, view: bool
) -> None:
    torch.manual_seed(seed)
    whole = torch.zeros(5, size, heads, 2 * width if view else width, dtype=dtype)
    twin = whole.clone()
    slots = torch.randperm(5 * size)[: size + 1]
    x = normal(len(slots), heads, width)
    x.view(-1)[:1] = 1 + 2**-8  # halfway between two bf16: even wins
    native.write_kv(whole[..., -width:], x, slots)
    REFERENCE.write_kv(twin[..., -width:], x, slots)
    assert torch.equal(whole, twin)


def test_write_kv_keeps_infinity_and_nan(native: CpuOps) -> None:
    cache = torch.zeros(1, 1, 1, 4, dtype=torch.bfloat16)
    x = torch.tensor([[[torch.inf, -torch.inf, torch.nan, 3.4e38]]])
    native.write_kv(cache, x, torch.tensor([0]))
    torch.testing.assert_close(cache[0, 0], x[0].bfloat16(), equal_nan=True)


@pytest.mark.parametrize("slot", [-1, 6])
def test_write_kv_refuses_a_slot_outside_the_cache(native: CpuOps, slot: int) -> None:
    cache = torch.zeros(3, 2, 1, 4)
    with pytest.raises(InternalError, match=r"0\.\.5"):
        native.write_kv(cache, normal(1, 1, 4), torch.tensor([slot]))
    assert not cache.any()


@dataclass(frozen=True)
class Attention:
    """A drawn case: (context, new tokens) per sequence, and what the cache looks like."""

    sequences: tuple[tuple[int, int], ...]
    block_size: int
    kv_heads: int
    group: int
    head_size: int
    value_size: int
    layout: str
    dtype: torch.dtype
    window: int | None
    sinks: bool

    def caches(self, blocks: int) -> tuple[Tensor, Tensor]:
        """Never-written positions hold NaN: whoever reads one shows it."""
        shape = (blocks, self.block_size, self.kv_heads)
        if self.layout == "latent":
            k = torch.full((*shape, self.head_size), torch.nan, dtype=self.dtype)
            return k, k[..., : self.value_size]
        if self.layout == "blockwise":
            both = torch.full((blocks, 2, self.kv_heads, self.block_size, 80), torch.nan)
            k, v = both.to(self.dtype).transpose(2, 3).unbind(1)
            return k[..., : self.head_size], v[..., 80 - self.value_size :]
        return (
            torch.full((*shape, self.head_size), torch.nan, dtype=self.dtype),
            torch.full((*shape, self.value_size), torch.nan, dtype=self.dtype),
        )


@st.composite
def attentions(draw: st.DrawFn) -> Attention:
    layout = draw(st.sampled_from(["separate", "latent", "blockwise"]))
    head_size = draw(st.integers(1, 80))
    new = st.integers(0, 7)
    past = st.sampled_from([0, 1, 15, 63, 64, 70, 130])
    pairs = draw(st.lists(st.tuples(past, new), max_size=3))
    return Attention(
        sequences=tuple((before + n, n) for before, n in pairs),
        block_size=draw(st.sampled_from([1, 3, 16, 64, 100])),
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 6)),
        head_size=head_size,
        value_size=draw(st.integers(1, head_size if layout == "latent" else 80)),
        layout=layout,
        dtype=draw(dtypes),
        window=draw(st.sampled_from([None, None, 1, 5, 64, 100])),
        sinks=draw(st.booleans()),
    )


MLA = Attention(((130, 2), (5, 5)), 16, 1, 5, 576, 512, "latent", torch.bfloat16, None, False)
GPT_OSS = Attention(((200, 1), (9, 9)), 16, 2, 8, 64, 64, "separate", torch.float32, 128, True)
WIDEST = Attention(((66, 3),), 16, 1, 1, 1024, 1024, "separate", torch.float32, None, False)


@FEW
@given(seeds, attentions())
@example(0, MLA)
@example(0, GPT_OSS)
@example(0, WIDEST)
def test_paged_attention(native: CpuOps, seed: int, case: Attention) -> None:
    torch.manual_seed(seed)
    width = max((-(-context // case.block_size) for context, _ in case.sequences), default=0) + 1
    free = torch.randperm(width * len(case.sequences) + 1).int().tolist()
    k, v = case.caches(len(free))
    # Past a sequence's last block the table names none that exists.
    table = torch.full((len(case.sequences), width), 10**6, dtype=torch.int32)
    starts = [0]
    for s, (context, new) in enumerate(case.sequences):
        starts.append(starts[-1] + new)
        for block in range(-(-context // case.block_size)):
            table[s, block] = free.pop()
        for p in range(context):
            block, offset = int(table[s, p // case.block_size]), p % case.block_size
            v[block, offset] = normal(case.kv_heads, case.value_size)
            k[block, offset] = normal(case.kv_heads, case.head_size)
    heads = case.kv_heads * case.group
    q = normal(starts[-1], heads, case.head_size)
    contexts = torch.tensor([context for context, _ in case.sequences], dtype=torch.int32)
    batch = AttentionBatch(torch.tensor(starts, dtype=torch.int32), contexts, table)
    sinks = normal(heads) if case.sinks else None
    ours, theirs = (
        ops.paged_attention(
            q, k, v, batch, scale=case.head_size**-0.5, window=case.window, sinks_A=sinks
        )
        for ops in (native, REFERENCE)
    )
    assert not theirs.isnan().any()
    close(ours, theirs)


@pytest.mark.parametrize(
    ("context", "table"),
    [
        pytest.param(1, [[0, 1]], id="more rows than tokens"),
        pytest.param(9, [[0, 1]], id="more tokens than the table holds"),
        pytest.param(8, [[0, 2]], id="a block the cache does not have"),
        pytest.param(8, [[-1, 1]], id="a block nobody allocated"),
    ],
)
def test_paged_attention_refuses(native: CpuOps, context: int, table: list[list[int]]) -> None:
    cache = normal(2, 4, 1, 8)
    batch = AttentionBatch(
        torch.tensor([0, 2], dtype=torch.int32),
        torch.tensor([context], dtype=torch.int32),
        torch.tensor(table, dtype=torch.int32),
    )
    with pytest.raises(InternalError, match="do not fit"):
        native.paged_attention(normal(2, 1, 8), cache, cache, batch, scale=1.0)


def test_a_strided_activation_is_read_as_it_is_seen(native: CpuOps) -> None:
    weight, x = normal(7, 5), normal(5, 9)
    packed = native.pack_linear(weight)
    assert torch.equal(native.linear(x.T, packed), native.linear(x.T.contiguous(), packed))
