"""A part of a layer is one native call, and the bits are those of the primitives it is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeserve.errors import InternalError
from moeserve.kernels import fused
from moeserve.kernels.cpu import _cpu
from moeserve.kernels.cpu.ops import CpuOps
from moeserve.kernels.guesses import GuessModule, GuessRows
from moeserve.kernels.ops import (
    AttentionBatch,
    DenseWeights,
    GatedWeights,
    GqaWeights,
    HeadWeights,
    KvCache,
    KvShape,
    Layer,
    MlaWeights,
    MlpWeights,
    MoeWeights,
    Rope,
    RouterSpec,
    RouterWeights,
    Step,
    Trunk,
)
from moeserve.kernels.reference.ops import ReferenceOps

FEW = settings(max_examples=25, deadline=None)
BLOCK = 4

seeds = st.integers(0, 2**31)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
sizes = st.integers(1, 40)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))


@dataclass(frozen=True)
class Spans:
    """Sequences as (tokens before, tokens of this step), each with blocks of its own."""

    pairs: list[tuple[int, int]]

    @property
    def rows(self) -> int:
        return sum(new for _, new in self.pairs)

    def step(self, ops: CpuOps | ReferenceOps, cos: Tensor, sin: Tensor, inter: bool) -> Step:
        width = max(-(-(old + new) // BLOCK) for old, new in self.pairs)
        blocks = torch.randperm(width * len(self.pairs)).int().view(-1, width)
        starts, contexts, slots = [0], [], []
        for s, (old, new) in enumerate(self.pairs):
            starts.append(starts[-1] + new)
            contexts.append(old + new)
            slots += [int(blocks[s, p // BLOCK]) * BLOCK + p % BLOCK for p in range(old, old + new)]
        batch = AttentionBatch(
            torch.tensor(starts, dtype=torch.int32),
            torch.tensor(contexts, dtype=torch.int32),
            blocks,
        )
        rope = Rope(cos, sin, inter)
        return ops.new_step(rope, torch.arange(self.rows), torch.tensor(slots), batch)


spans = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5)), min_size=1, max_size=4).map(Spans)


def linear(ops: Any, n: int, k: int, dtype: torch.dtype, bias: bool = False) -> Any:
    weight = (torch.randn(n, k) / k**0.5).to(dtype)
    return ops.pack_linear(weight, torch.randn(n) if bias else None)


def filled(ops: CpuOps, shape: KvShape) -> KvCache:
    """Every slot of it written."""
    cache, slots = ops.new_kv(shape), shape.num_blocks * BLOCK
    k = torch.randn(slots, shape.kv_heads, shape.head_size)
    v = None if shape.latent else torch.randn(slots, shape.kv_heads, shape.value_size)
    ops.write_kv(cache, k, v, torch.arange(slots))
    return cache


def attends_alike(
    ops: CpuOps, weights: GqaWeights | MlaWeights, step: Step, shape: KvShape, hidden: int
) -> None:
    """Also what is left in the cache: a second step reads what the first one wrote."""
    seed = int(torch.randint(2**31, ()))
    torch.manual_seed(seed)
    mine = filled(ops, shape)
    torch.manual_seed(seed)
    theirs = filled(ops, shape)
    part = ops.prepare(weights)
    x = torch.randn(step.rows, hidden)
    y = x.clone()
    for _ in range(2):
        ops.attend(x, part, step, mine)
        fused.attend(ops, y, weights, step, theirs)
        assert x.isfinite().all()
        assert same_bits(x, y)


@dataclass(frozen=True)
class GqaCase:
    hidden: int
    kv_heads: int
    group: int
    pairs: int
    rest: int
    norm: str
    clip: float | None
    window: int | None
    bias: bool
    sinks: bool
    interleaved: bool
    dtype: torch.dtype


gqa_cases = st.builds(
    GqaCase,
    hidden=sizes,
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    pairs=st.integers(0, 12),
    rest=st.integers(1, 9),
    norm=st.sampled_from(["none", "head", "row"]),
    clip=st.sampled_from([None, 0.5]),
    window=st.sampled_from([None, 3]),
    bias=st.booleans(),
    sinks=st.booleans(),
    interleaved=st.booleans(),
    dtype=dtypes,
)


@FEW
@given(seeds, spans, gqa_cases)
@pytest.mark.usefixtures("two_threads")
def test_grouped_query_attention_is_its_composition(
    native: CpuOps, seed: int, batch: Spans, c: GqaCase
) -> None:
    torch.manual_seed(seed)
    heads, size, kv_heads = c.kv_heads * c.group, 2 * c.pairs + c.rest, c.kv_heads
    of = {"none": (0, 0), "head": (size, size), "row": (heads * size, kv_heads * size)}[c.norm]
    weights = GqaWeights(
        norm_H=torch.randn(c.hidden),
        eps=1e-6,
        heads=heads,
        kv_heads=kv_heads,
        head_size=size,
        scale=size**-0.5,
        qkv=linear(native, (heads + 2 * kv_heads) * size, c.hidden, c.dtype, c.bias),
        o=linear(native, c.hidden, heads * size, c.dtype, c.bias),
        q_norm=torch.randn(of[0]) if of[0] else None,
        k_norm=torch.randn(of[1]) if of[1] else None,
        clip=c.clip,
        window=c.window,
        sinks_A=torch.randn(heads) if c.sinks else None,
    )
    cos, sin = torch.randn(batch.rows, c.pairs), torch.randn(batch.rows, c.pairs)
    step = batch.step(native, cos, sin, c.interleaved)
    blocks = step.attention.blocks_SM.numel()
    shape = KvShape(blocks, BLOCK, kv_heads, size, size, c.dtype)
    attends_alike(native, weights, step, shape, c.hidden)


@dataclass(frozen=True)
class MlaCase:
    hidden: int
    heads: int
    nope: int
    pairs: int
    latent: int
    value: int
    low: int
    bias: bool
    interleaved: bool
    dtype: torch.dtype


mla_cases = st.builds(
    MlaCase,
    hidden=sizes,
    heads=st.integers(1, 5),
    nope=st.integers(1, 20),
    pairs=st.integers(1, 8),
    latent=st.integers(1, 40),
    value=st.integers(1, 20),
    low=st.integers(0, 30),
    bias=st.booleans(),
    interleaved=st.booleans(),
    dtype=dtypes,
)


@FEW
@given(seeds, spans, mla_cases)
@pytest.mark.usefixtures("two_threads")
def test_latent_attention_is_its_composition(
    native: CpuOps, seed: int, batch: Spans, c: MlaCase
) -> None:
    torch.manual_seed(seed)
    rotated, queries, low = 2 * c.pairs, c.heads * (c.nope + 2 * c.pairs), c.low
    down = (low or queries) + c.latent + rotated
    weights = MlaWeights(
        norm_H=torch.randn(c.hidden),
        eps=1e-6,
        heads=c.heads,
        nope=c.nope,
        rotated=rotated,
        latent=c.latent,
        scale=(c.nope + rotated) ** -0.5,
        latent_eps=1e-5,
        down=linear(native, down, c.hidden, c.dtype, c.bias),
        latent_norm=torch.randn(c.latent),
        into_latent=native.pack_heads(torch.randn(c.heads, c.latent, c.nope).to(c.dtype)),
        out_of_latent=native.pack_heads(torch.randn(c.heads, c.value, c.latent).to(c.dtype)),
        o=linear(native, c.hidden, c.heads * c.value, c.dtype, c.bias),
        q_norm=torch.randn(low) if low else None,
        q_up=linear(native, queries, low, c.dtype) if low else None,
    )
    cos, sin = torch.randn(batch.rows, c.pairs), torch.randn(batch.rows, c.pairs)
    step = batch.step(native, cos, sin, c.interleaved)
    blocks, width = step.attention.blocks_SM.numel(), c.latent + rotated
    shape = KvShape(blocks, BLOCK, 1, width, c.latent, c.dtype, latent=True)
    attends_alike(native, weights, step, shape, c.hidden)


@FEW
@given(seeds, st.integers(1, 40), sizes, sizes, dtypes)
@pytest.mark.usefixtures("two_threads")
def test_a_dense_half_is_its_composition(
    native: CpuOps, seed: int, rows: int, hidden: int, inner: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(seed)
    mlp = MlpWeights(linear(native, 2 * inner, hidden, dtype), linear(native, hidden, inner, dtype))
    weights = DenseWeights(torch.randn(hidden), 1e-6, mlp)
    x = torch.randn(rows, hidden)
    y = x.clone()
    native.dense(x, native.prepare(weights))
    fused.dense(native, y, weights)
    assert same_bits(x, y)


@FEW
@given(
    seed=seeds,
    rows=st.integers(1, 40),
    hidden=sizes,
    inner=sizes,
    experts=st.integers(1, 9),
    shared=st.sampled_from(["none", "plain", "gated"]),
    scoring=st.sampled_from(["softmax", "sigmoid", "topk_softmax"]),
    bias=st.booleans(),
    dtype=dtypes,
)
@pytest.mark.usefixtures("two_threads")
def test_routing_and_mixing_are_their_composition(
    native: CpuOps,
    seed: int,
    rows: int,
    hidden: int,
    inner: int,
    experts: int,
    shared: str,
    scoring: str,
    bias: bool,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(seed)
    beside: MlpWeights | GatedWeights | None = None
    if shared == "plain":
        beside = MlpWeights(
            linear(native, 2 * inner + 2, hidden, dtype), linear(native, hidden, inner + 1, dtype)
        )
    elif shared == "gated":
        beside = GatedWeights(
            linear(native, 1, hidden, torch.float32),
            native.pack_experts(
                torch.randn(1, 2 * inner, hidden).to(dtype), torch.randn(1, hidden, inner).to(dtype)
            ),
        )
    spec = RouterSpec(experts, min(3, experts), scoring, scale=2.5)
    router = RouterWeights(
        torch.randn(hidden),
        1e-6,
        linear(native, experts, hidden, torch.float32, bias),
        spec,
        torch.randn(experts) if bias else None,
    )
    mixture = MoeWeights(
        native.pack_experts(
            torch.randn(experts, 2 * inner, hidden).to(dtype),
            torch.randn(experts, hidden, inner).to(dtype),
        ),
        beside,
    )
    x = torch.randn(rows, hidden)
    y = x.clone()
    step = decode_step(native, rows)
    mine = native.route(x, native.prepare(router), step)
    theirs = fused.route(native, y, router)
    assert same_bits(mine.normed_TH, theirs.normed_TH)
    assert torch.equal(mine.ids_TC, theirs.ids_TC)
    assert same_bits(mine.weights_TC, theirs.weights_TC)
    native.moe(x, native.prepare(mixture), mine)
    fused.moe(native, y, mixture, theirs)
    assert same_bits(x, y)


@FEW
@given(seeds, st.integers(1, 20), sizes, sizes, dtypes, st.data())
def test_embedding_and_head_are_their_composition(
    native: CpuOps,
    seed: int,
    rows: int,
    hidden: int,
    vocabulary: int,
    dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    torch.manual_seed(seed)
    table = torch.randn(vocabulary, hidden).to(dtype)
    ids = torch.randint(vocabulary, (rows,))
    x = native.embed(table, ids)
    assert same_bits(x, table[ids].float())
    wanted = data.draw(st.lists(st.integers(0, rows - 1), max_size=5))
    rows_R = torch.tensor(wanted, dtype=torch.int64)
    weights = HeadWeights(torch.randn(hidden), 1e-6, linear(native, vocabulary, hidden, dtype))
    logits = native.head(x, rows_R, native.prepare(weights))
    assert logits.shape == (len(wanted), vocabulary)
    assert same_bits(logits, fused.head(native, x, rows_R, weights))


@FEW
@given(seed=seeds, batch=spans, kinds=st.lists(st.booleans(), min_size=1, max_size=4))
@pytest.mark.usefixtures("two_threads")
def test_a_stack_is_its_layers_in_turn(
    native: CpuOps, seed: int, batch: Spans, kinds: list[bool]
) -> None:
    torch.manual_seed(seed)
    layers = [layer(native, top_k=2 + i if routes else 0) for i, routes in enumerate(kinds)]
    step = batch.step(native, torch.randn(batch.rows, 3), torch.randn(batch.rows, 3), False)
    shape = KvShape(step.attention.blocks_SM.numel(), BLOCK, 1, 8, 8, torch.bfloat16)
    caches = [filled(native, shape) for _ in kinds]
    x = torch.randn(batch.rows, 24)
    y, routed = x.clone(), list[Tensor]()
    # What a pass reads of this step's slots it has written itself: caches can be shared.
    native.forward_layers(x, native.stack_layers(layers), step, caches, routed)
    expected = fused.forward_layers(native, y, layers, step, caches)
    assert same_bits(x, y)
    assert len(routed) == sum(kinds)
    assert all(torch.equal(a, b) for a, b in zip(routed, expected, strict=True))


@dataclass
class OneTokenEach:
    """A pass over sequences of one token each, and all that it reads."""

    ops: CpuOps
    rows: int
    kinds: list[bool]

    def __post_init__(self) -> None:
        ops, rows = self.ops, self.rows
        stack = ops.stack_layers([layer(ops, 2 if routes else 0) for routes in self.kinds])
        norm, head = torch.randn(24), linear(ops, 17, 24, torch.bfloat16)
        self.trunk = Trunk(
            torch.randn(17, 24),
            Rope(torch.randn(9, 3), torch.randn(9, 3), False),
            stack,
            ops.prepare(HeadWeights(norm, 1e-6, head)),
        )
        self.ids, self.positions = torch.zeros(2, rows, dtype=torch.int64)
        self.slots, self.wanted = torch.arange(rows) * BLOCK, torch.arange(rows)
        self.contexts = torch.ones(rows, dtype=torch.int32)
        self.tables = torch.arange(2 * rows, dtype=torch.int32).view(rows, 2)
        starts = torch.arange(rows + 1, dtype=torch.int32)
        self.attention = AttentionBatch(starts, self.contexts, self.tables)

    def cache(self) -> list[KvCache]:
        shape = KvShape(2 * self.rows, BLOCK, 1, 8, 8, torch.bfloat16)
        return [self.ops.new_kv(shape) for _ in self.kinds]

    def go(self, step: int) -> None:
        """The numbers of another step."""
        self.ids.copy_(torch.randint(17, (self.rows,)))
        self.positions.fill_(step)
        self.contexts.fill_(step + 1)
        self.slots.copy_(self.tables[:, step // BLOCK] * BLOCK + step % BLOCK)

    def new_pass(
        self, table: Any, caches: list[KvCache], states_TH: Tensor | None = None
    ) -> Callable[[], Tensor]:
        inputs = self.ids, self.positions, self.slots, self.attention, self.wanted
        run: Callable[[], Tensor] = table.new_pass(self.trunk, caches, *inputs, states_TH)
        return run


@FEW
@given(seed=seeds, rows=st.integers(1, 5), kinds=st.lists(st.booleans(), min_size=1, max_size=3))
@pytest.mark.usefixtures("two_threads")
def test_a_pass_that_is_run_again_is_its_operations_in_turn(
    native: CpuOps, seed: int, rows: int, kinds: list[bool]
) -> None:
    torch.manual_seed(seed)
    tokens = OneTokenEach(native, rows, kinds)
    states, others = torch.zeros(2, rows, 24)
    run = tokens.new_pass(native, tokens.cache(), states)
    slow = fused.Composed.new_pass.__get__(native)
    twin = slow(tokens.trunk, tokens.cache(), tokens.ids, tokens.positions, tokens.slots,
                tokens.attention, tokens.wanted, others)  # fmt: skip
    for step in range(2 * BLOCK):
        tokens.go(step)
        calls = _cpu.calls()
        logits = run()
        assert _cpu.calls() == calls + 1
        assert same_bits(logits, twin())
        assert same_bits(states, others)


def test_a_pass_says_which_of_its_numbers_do_not_fit(native: CpuOps) -> None:
    tokens = OneTokenEach(native, 2, [False])
    run = tokens.new_pass(native, tokens.cache())
    tokens.go(1)
    whole = run().clone()
    for numbers, wrong, error, match in (
        (tokens.positions, 9, IndexError, "outside the rotary tables"),
        (tokens.positions, -1, IndexError, "outside the rotary tables"),
        (tokens.ids, 17, InternalError, r"embed: a token id is not in 0\.\.16"),
        (tokens.slots, 99, InternalError, "do not fit the caches of 1 layers"),
        (tokens.contexts, 99, InternalError, "do not fit the caches of 1 layers"),
        (tokens.wanted, 2, InternalError, r"head: a row of \[0, 2\] is not one of the step"),
    ):
        right = int(numbers[1])
        numbers[1] = wrong
        with pytest.raises(error, match=match):
            run()
        numbers[1] = right
        assert same_bits(run(), whole)


def layer(ops: CpuOps, top_k: int) -> Layer:
    """24 features, two query heads on one KV head of 8; dense where ``top_k`` is 0."""
    dtype, norm = torch.bfloat16, torch.randn(24)
    attention = GqaWeights(
        norm_H=norm,
        eps=1e-6,
        heads=2,
        kv_heads=1,
        head_size=8,
        scale=0.3,
        qkv=linear(ops, 32, 24, dtype),
        o=linear(ops, 24, 16, dtype),
    )
    if not top_k:
        mlp = MlpWeights(linear(ops, 20, 24, dtype), linear(ops, 24, 10, dtype))
        return Layer(ops.prepare(attention), ops.prepare(DenseWeights(norm, 1e-6, mlp)))
    router = RouterWeights(norm, 1e-6, linear(ops, 7, 24, torch.float32), RouterSpec(7, top_k))
    experts = ops.pack_experts(torch.randn(7, 20, 24).to(dtype), torch.randn(7, 24, 10).to(dtype))
    mixture = ops.prepare(MoeWeights(experts))
    return Layer(ops.prepare(attention), (ops.prepare(router), mixture))


def test_a_position_beyond_the_rotary_tables_is_an_error(native: CpuOps) -> None:
    step = decode_step(native, 2)
    with pytest.raises(IndexError, match="outside the rotary tables"):
        native.new_step(step.rope, torch.tensor([0, 2]), step.slot_T, step.attention)


def decode_step(ops: CpuOps, rows: int) -> Step:
    """One token of each sequence, at position 0 of a block of its own."""
    return Spans([(0, 1)] * rows).step(ops, torch.ones(rows, 1), torch.zeros(rows, 1), False)


def test_wrong_indices_are_errors_and_touch_no_memory(native: CpuOps) -> None:
    x = torch.randn(3, 8)
    head = native.prepare(HeadWeights(torch.ones(8), 1e-6, linear(native, 5, 8, torch.float32)))
    with pytest.raises(InternalError, match=r"head: a row of \[0, 3\] is not in 0\.\.2"):
        native.head(x, torch.tensor([0, 3]), head)
    with pytest.raises(InternalError, match=r"embed: a token id is not in 0\.\.4"):
        native.embed(torch.randn(5, 8), torch.tensor([5]))
    weights = GqaWeights(
        norm_H=torch.ones(8),
        eps=1e-6,
        heads=2,
        kv_heads=1,
        head_size=4,
        scale=1.0,
        qkv=linear(native, 16, 8, torch.float32),
        o=linear(native, 8, 8, torch.float32),
    )
    step, part = decode_step(native, 3), native.prepare(weights)
    small = native.new_kv(KvShape(2, BLOCK, 1, 4, 4, torch.float32))
    other = native.new_kv(KvShape(3, BLOCK, 1, 6, 6, torch.float32))
    for cache in (small, other):
        before = x.clone()
        with pytest.raises(InternalError, match="do not fit"):
            native.attend(x, part, step, cache)
        assert same_bits(x, before)


def guess_module(ops: CpuOps, routes: bool) -> GuessModule:
    return GuessModule(
        trunk_norm_H=torch.randn(24),
        embedding_WH=torch.randn(17, 24).bfloat16(),
        embedding_norm_H=torch.randn(24),
        hidden_norm_H=torch.randn(24),
        eps=1e-6,
        project=linear(ops, 24, 48, torch.bfloat16),
        rope=Rope(torch.randn(40, 3), torch.randn(40, 3), False),
        stack=ops.stack_layers([layer(ops, 2 if routes else 0)]),
        head=ops.prepare(HeadWeights(torch.randn(24), 1e-6, linear(ops, 17, 24, torch.bfloat16))),
    )


@FEW
@given(
    seed=seeds,
    pairs=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4)), min_size=1, max_size=3),
    routes=st.booleans(),
    count=st.integers(1, 4),
    lost=st.booleans(),
)
@pytest.mark.usefixtures("two_threads")
def test_a_chain_of_guesses_is_its_operations_in_turn(
    native: CpuOps, seed: int, pairs: list[tuple[int, int]], routes: bool, count: int, lost: bool
) -> None:
    """Also one behind the other over the same cache, and where a state is no number."""
    torch.manual_seed(seed)
    module, total = guess_module(native, routes), sum(new for _, new in pairs)
    blocks = torch.randperm(4 * len(pairs)).view(-1, 4).tolist()
    shape = KvShape(4 * len(pairs), BLOCK, 1, 8, 8, torch.bfloat16)
    chain = native.new_guesser(module, native.new_kv(shape), BLOCK)
    slow = fused.Composed.new_guesser.__get__(native)
    twin = slow(module, native.new_kv(shape), BLOCK)
    starts = [0] * len(pairs)
    for news in ([max(1, old) for old, _ in pairs], [new for _, new in pairs]):
        states = torch.randn(sum(news) + 2, 24)
        if lost and total == sum(news):
            states[2] = torch.nan
        rows = GuessRows(
            states,
            [r + 2 for r in range(sum(news))],
            torch.randint(17, (sum(news),)).tolist(),
            news,
            starts,
            [BLOCK * i for i in range(len(pairs))],
            blocks,
        )
        calls = _cpu.calls()
        found = chain(rows, count)
        assert _cpu.calls() == calls + 1
        assert found == twin(rows, count)
        starts = [start + new for start, new in zip(starts, news, strict=True)]


def test_a_chain_of_guesses_says_what_does_not_fit(native: CpuOps) -> None:
    chain = native.new_guesser(
        guess_module(native, routes=False),
        native.new_kv(KvShape(2, BLOCK, 1, 8, 8, torch.bfloat16)),
        BLOCK,
    )
    fits = GuessRows(torch.randn(1, 24), [0], [3], [1], [0], [0], [[1, 0]])
    assert len(chain(fits, 8)) == 8
    for wrong, count in (
        (fits, 9),
        (replace(fits, token_ids=[17]), 1),
        (replace(fits, token_ids=[-1]), 1),
        (replace(fits, shifts=[40]), 1),
        (replace(fits, blocks=[[2, 0]]), 1),
    ):
        with pytest.raises(InternalError, match="guess: tokens, positions or blocks"):
            chain(wrong, count)
