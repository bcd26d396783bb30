"""Whoever computes the experts of a token, the sum is the same bits; what is sent is counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeserve.errors import InternalError
from moeserve.kernels.ascend.ops import AscendOps
from moeserve.kernels.cpu.ops import CpuOps, _cpu
from moeserve.kernels.matrix import Matrix, part_of, stack, to_int4, to_int8
from moeserve.kernels.ops import (
    Activation,
    GatedWeights,
    MlpWeights,
    MoeWeights,
    Part,
    Routed,
)
from moeserve.kernels.reference.ops import ReferenceOps
from moeserve.kernels.wire import Combine, Copies, Sums, Wire

FEW = settings(max_examples=40, deadline=None)
FEWER = settings(max_examples=12, deadline=None)
REFERENCE = ReferenceOps()
KINDS = ["float32", "bfloat16", "int8", "int4"]

seeds = st.integers(0, 2**31)
kinds = st.sampled_from(KINDS)
NativeOrTwin = CpuOps | ReferenceOps | AscendOps


def same(a: Tensor, b: Tensor) -> bool:
    """To the bit; any NaN is a NaN."""
    lost = a.isnan()
    bits_a, bits_b = (t.view(torch.int32).masked_fill(lost, 0) for t in (a, b))
    return a.shape == b.shape and torch.equal(lost, b.isnan()) and torch.equal(bits_a, bits_b)


def as_kind(weight: Tensor, kind: str) -> Matrix:
    if kind == "int8":
        return to_int8(weight)
    if kind == "int4":
        return to_int4(weight, 16)
    return weight.to(getattr(torch, kind))


def some_of(weights: Matrix, experts: list[int]) -> Matrix:
    return stack([part_of(weights, e) for e in experts])


@dataclass(frozen=True)
class Mixture:
    """Tokens, where they were routed, and experts that any rank may hold."""

    ops: NativeOrTwin
    x_TH: Tensor
    routed: Routed
    gate_up: Matrix
    down: Matrix
    bias: Tensor | None
    shared: MlpWeights | GatedWeights | None
    combine: Combine

    @property
    def num_experts(self) -> int:
        return self.down.shape[0]

    @property
    def top_k(self) -> int:
        return self.routed.ids_TC.shape[1]

    def part(self, experts: list[int]) -> Part[MoeWeights]:
        packed = self.ops.pack_experts(
            some_of(self.gate_up, experts),
            some_of(self.down, experts),
            None,
            None if self.bias is None else self.bias[experts],
            Activation.SWIGLU,
        )
        return self.ops.prepare(MoeWeights(packed, self.shared, self.combine))

    def alone(self) -> Tensor:
        """What one process makes of it."""
        x_TH = self.x_TH.clone()
        self.ops.moe(x_TH, self.part(list(range(self.num_experts))), self.routed)
        return x_TH


def mixture(
    ops: NativeOrTwin,
    kind: str,
    combine: Combine = Combine.EXACT,
    rows: int = 5,
    hidden: int = 40,
    top_k: int = 3,
    experts: int = 6,
    scale: float = 1.0,
    shared: str = "none",
    bias: bool = False,
) -> Mixture:
    inner = 64 if hidden == 256 else 16
    beside: MlpWeights | GatedWeights | None = None
    if shared == "plain":
        beside = MlpWeights(
            ops.pack_linear(torch.randn(20, hidden)), ops.pack_linear(torch.randn(hidden, 10))
        )
    elif shared == "gated":
        one = ops.pack_experts(torch.randn(1, 20, hidden), torch.randn(1, hidden, 10))
        beside = GatedWeights(ops.pack_linear(torch.randn(1, hidden)), one)
    ids_TC = torch.stack(
        [torch.randperm(experts)[:top_k] for _ in range(rows)] or [torch.empty(0, top_k)]
    )
    ids_TC = ids_TC.view(rows, top_k).int()
    routed = Routed(torch.randn(rows, hidden), ids_TC, torch.rand(rows, top_k))
    return Mixture(
        ops,
        torch.randn(rows, hidden) * scale,
        routed,
        as_kind(torch.randn(experts, 2 * inner, hidden) / hidden**0.5, kind),
        as_kind(torch.randn(experts, hidden, inner) / inner**0.5, kind),
        torch.randn(experts, hidden) if bias else None,
        beside,
        combine,
    )


@dataclass(frozen=True)
class ShardedExperts:
    """Slot s of rank r holds ``experts[r][s]``; choice c of token t goes to ``chosen[t][c]``, a
    rank and its slot."""

    experts: list[list[int]]
    chosen: list[list[tuple[int, int]]]
    top_k: int

    @property
    def world(self) -> int:
        return len(self.experts)

    def copies(self, tokens: range, groups: list[list[int]]) -> Copies:
        """Of tokens of one home, counted from 0, one for each group of ranks it has to reach."""
        starts, token_N, slot_NC = [0], [], []
        for group in groups:
            for n, t in enumerate(tokens):
                slots = [s if r in group else -1 for r, s in self.chosen[t]]
                if any(s >= 0 for s in slots):
                    token_N.append(n)
                    slot_NC.append(slots)
            starts.append(len(token_N))
        return copies(starts, token_N, slot_NC, self.top_k)


def copies(starts: list[int], tokens: list[int], slots: list[list[int]], top_k: int) -> Copies:
    return Copies(
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(tokens, dtype=torch.int32),
        torch.tensor(slots, dtype=torch.int16).view(len(tokens), top_k),
    )


def spread(m: Mixture, world: int, spare: int) -> ShardedExperts:
    """Every expert somewhere, some of them more than once; a replica drawn for every choice."""
    slots = -(-m.num_experts // world) + spare
    extra = torch.randint(m.num_experts, (slots * world - m.num_experts,)).tolist()
    order = torch.tensor([*range(m.num_experts), *extra])[torch.randperm(slots * world)].tolist()
    homes: dict[int, list[tuple[int, int]]] = {e: [] for e in range(m.num_experts)}
    for s, e in enumerate(order):
        homes[e].append((s // slots, s % slots))
    chosen = [
        [homes[e][int(torch.randint(len(homes[e]), ()))] for e in ids]
        for ids in m.routed.ids_TC.tolist()
    ]
    return ShardedExperts(
        [order[r * slots : (r + 1) * slots] for r in range(world)], chosen, m.top_k
    )


def area(nbytes: int) -> Tensor:
    """Of an exchange: aligned, larger than needed, and not zero."""
    whole = torch.full((nbytes + 128,), 0x5A, dtype=torch.uint8)
    skip = -whole.data_ptr() % 64
    return whole[skip : skip + nbytes + 64]


def packed(m: Mixture, part: Part[MoeWeights], tokens: range, which: Copies) -> list[Tensor]:
    wire = m.ops.wire(part, m.top_k)
    counts = which.start_R1.diff().tolist()
    areas = [area(count * wire.row_bytes) for count in counts]
    rows = slice(tokens.start, tokens.stop)
    m.ops.pack_tokens(m.x_TH[rows].contiguous(), part, here(m.routed, rows), which, areas)
    return [a[: n * wire.row_bytes] for a, n in zip(areas, counts, strict=True)]


def here(routed: Routed, rows: slice) -> Routed:
    parts = (routed.normed_TH[rows], routed.ids_TC[rows], routed.weights_TC[rows])
    return Routed(*(p.contiguous() for p in parts))


def answered(
    m: Mixture, part: Part[MoeWeights], wire: Wire, sums: Sums, segments: list[Tensor]
) -> list[Tensor]:
    rows = [len(s) // wire.row_bytes for s in segments]
    areas = [area(m.ops.sums_bytes(part, wire, n)) for n in rows]
    nbytes = m.ops.pack_sums(part, wire, sums, segments, areas)
    return [a[:n] for a, n in zip(areas, nbytes, strict=True)]


def served(
    m: Mixture, parts: list[Part[MoeWeights]], rank: int, received: list[Tensor]
) -> list[Tensor]:
    wire = m.ops.wire(parts[rank], m.top_k)
    sums = m.ops.run_experts(parts[rank], wire, received)
    return answered(m, parts[rank], wire, sums, received)


def relayed(
    m: Mixture,
    s: ShardedExperts,
    parts: list[Part[MoeWeights]],
    group: list[int],
    received: list[Tensor],
    tokens: list[int],
) -> list[Tensor]:
    """A rank of the group passes records on and adds up what comes back; ``tokens`` are theirs."""
    wire = m.ops.wire(parts[0], m.top_k)
    starts, token_N, slot_NC = [0], [], []
    for rank in group:
        for n, t in enumerate(tokens):
            slots = [slot if r == rank else -1 for r, slot in s.chosen[t]]
            if any(slot >= 0 for slot in slots):
                token_N.append(n)
                slot_NC.append(slots)
        starts.append(len(token_N))
    which = copies(starts, token_N, slot_NC, m.top_k)
    counts = which.start_R1.diff().tolist()
    areas = [area(n * wire.row_bytes) for n in counts]
    m.ops.relay_tokens(wire, received, which, areas)
    back = [
        served(m, parts, rank, [a[: n * wire.row_bytes]])[0]
        for rank, a, n in zip(group, areas, counts, strict=True)
    ]
    sums = m.ops.relay_sums(parts[0], wire, which, back, len(tokens))
    return answered(m, parts[0], wire, sums, received)


def together(m: Mixture, s: ShardedExperts, groups: list[list[int]]) -> Tensor:
    """What ranks make of it, each the home of some tokens; groups of several pass tokens on."""
    parts = [m.part(experts) for experts in s.experts]
    rows = len(m.x_TH)
    cuts = sorted(torch.randint(rows + 1, (s.world - 1,)).tolist())
    homes = [range(a, b) for a, b in zip([0, *cuts], [*cuts, rows], strict=True)]
    which = [s.copies(tokens, groups) for tokens in homes]
    sent = [packed(m, parts[0], tokens, w) for tokens, w in zip(homes, which, strict=True)]
    back = []
    for g, group in enumerate(groups):
        received = [segments[g] for segments in sent]
        if len(group) == 1:
            back.append(served(m, parts, group[0], received))
            continue
        theirs = [
            homes[h][n]
            for h, w in enumerate(which)
            for n in w.token_N[int(w.start_R1[g]) : int(w.start_R1[g + 1])].tolist()
        ]
        back.append(relayed(m, s, parts, group, received, theirs))
    out = m.x_TH.clone()
    for h, tokens in enumerate(homes):
        rows_here = slice(tokens.start, tokens.stop)
        routed, x_TH = here(m.routed, rows_here), out[rows_here]
        shared_TH = m.ops.shared(parts[0], routed)
        segments = [segments[h] for segments in back]
        m.ops.combine(x_TH, parts[0], routed, which[h], segments, shared_TH)
    return out


def grouped(world: int, size: int) -> list[list[int]]:
    return [list(range(r, min(world, r + size))) for r in range(0, world, size)]


@dataclass(frozen=True)
class Case:
    """A mixture and the ranks that share it; ``size`` ranks form a node."""

    seed: int
    kind: str
    combine: Combine
    rows: int
    hidden: int
    top_k: int
    world: int
    spare: int
    size: int
    scale: float
    shared: str
    bias: bool


cases = st.builds(
    Case,
    seed=seeds,
    kind=kinds,
    combine=st.sampled_from([Combine.EXACT, Combine.EXACT, Combine.ORDERED]),
    rows=st.integers(0, 9),
    hidden=st.sampled_from([1, 7, 32, 40, 64, 130]),
    top_k=st.integers(1, 4),
    world=st.integers(1, 5),
    spare=st.integers(0, 2),
    size=st.integers(1, 3),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 50.0]),
    shared=st.sampled_from(["none", "plain", "gated"]),
    bias=st.booleans(),
)


def holds(ops: NativeOrTwin, c: Case) -> None:
    torch.manual_seed(c.seed)
    hidden = c.hidden + (c.hidden % 2 if c.kind == "int4" else 0)
    m = mixture(
        ops,
        c.kind,
        c.combine,
        c.rows,
        hidden,
        c.top_k,
        scale=c.scale,
        shared=c.shared,
        bias=c.bias,
    )
    alone = m.alone()
    for size_here in {1, c.size}:
        s = spread(m, c.world, c.spare)
        assert same(together(m, s, grouped(c.world, size_here)), alone)


@FEW
@given(cases)
@pytest.mark.usefixtures("two_threads")
def test_any_partition_gives_the_bits_of_one_process(native: CpuOps, case: Case) -> None:
    holds(native, case)


@FEWER
@given(cases)
def test_any_partition_of_the_twin_gives_its_bits(case: Case) -> None:
    holds(REFERENCE, case)


@FEWER
@given(cases)
def test_any_partition_over_npus_gives_its_bits(npu: AscendOps, case: Case) -> None:
    holds(npu, case)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("two_threads")
def test_many_rows_are_shared_among_threads_and_still_the_same(native: CpuOps, kind: str) -> None:
    torch.manual_seed(1)
    m = mixture(native, kind, rows=150, hidden=256, top_k=4, experts=12, scale=0.3)
    assert same(together(m, spread(m, 4, 1), grouped(4, 1)), m.alone())
    assert same(together(m, spread(m, 4, 0), grouped(4, 2)), m.alone())


def over_everything(m: Mixture) -> list[Tensor]:
    """By one process; by ranks; by ranks that pass tokens on."""
    found = [m.alone()]
    for size in (1, 2):
        found.append(together(m, spread(m, 4, 1), grouped(4, size)))
    return found


@pytest.fixture(params=[*_cpu.isas(), "twin", "ascend"], scope="module")
def ops(request: pytest.FixtureRequest) -> Iterator[NativeOrTwin]:
    if request.param == "twin":
        yield REFERENCE
        return
    if request.param == "ascend":
        yield request.getfixturevalue("npu")
        return
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield CpuOps()
    _cpu.set_isa(before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_contribution_that_is_too_great_or_no_number_makes_its_element_nan_everywhere(
    ops: NativeOrTwin, kind: str
) -> None:
    torch.manual_seed(3)
    m = mixture(ops, kind, rows=6, scale=0.01)
    m.x_TH[1, 7] = torch.inf
    m.x_TH[2, 0] = torch.nan
    m.routed.normed_TH[3, 5] = torch.nan
    m.routed.weights_TC[4, 1] = 3e30
    for x_TH in over_everything(m):
        assert x_TH.isnan().any(1).tolist() == [False, True, True, True, True, False]
        assert x_TH[1:4].isnan().all()
        assert same(x_TH, m.alone())


@pytest.mark.parametrize("kind", KINDS)
def test_the_greatest_contribution_is_a_number_and_the_next_is_none(
    ops: NativeOrTwin, kind: str
) -> None:
    """A bias alone, of the bound and a step beyond it; 4 choices leave 28 bits."""
    torch.manual_seed(4)
    m = mixture(ops, kind, rows=2, hidden=8, top_k=4, bias=True)
    assert m.bias is not None
    m.x_TH[:] = 1.0  # so that unit is 2^-grid_bits
    m.routed.normed_TH[:] = 0.0
    m.routed.weights_TC[:] = 1.0
    bound = 2.0 ** (28 - 20 + 16) if kind == "float32" else 2.0 ** (28 - 11)
    m.bias[:] = 0.0
    m.bias[:, 1], m.bias[:, 2], m.bias[:, 3] = bound, -bound, bound * (1 + 2**-23)
    for x_TH in over_everything(m):
        assert x_TH[:, 3].isnan().all()
        expected_3 = 1.0 + torch.tensor([0.0, 4 * bound, -4 * bound])
        assert torch.equal(x_TH[:, :3], expected_3.expand(2, 3))


@FEWER
@given(seeds, kinds, st.sampled_from([1e-3, 0.1, 1.0, 30.0]))
def test_exact_is_within_half_a_unit_of_each_contribution(
    native: CpuOps, seed: int, kind: str, scale: float
) -> None:
    torch.manual_seed(seed)
    m = mixture(native, kind, rows=7, scale=scale)
    experts = m.part(list(range(m.num_experts))).weights.experts
    units_T = native.units(m.x_TH, experts)
    size_T = m.x_TH.double().square().mean(1).sqrt()
    bits = 20 if kind == "float32" else 11
    assert torch.equal(units_T.double(), torch.exp2(size_T.log2().floor() - bits))
    routed = m.routed
    args = (routed.normed_TH, experts, routed.ids_TC, routed.weights_TC)
    chain_TH, exact_TH = native.moe_ffn(*args), native.moe_ffn(*args, units_T)
    steps_TH = exact_TH.double() / units_T.double()[:, None]
    if kind != "float32":  # there a sum may have more bits than a float
        assert torch.equal(steps_TH, steps_TH.round())
    most_T1 = (m.top_k * units_T / 2 + chain_TH.abs().amax(1) * 2**-21)[:, None]
    assert bool(((exact_TH - chain_TH).abs() <= most_T1).all())


@pytest.mark.parametrize("kind", KINDS)
def test_ordered_and_fast_in_one_process_are_the_chain(native: CpuOps, kind: str) -> None:
    torch.manual_seed(5)
    for combine in (Combine.ORDERED, Combine.FAST):
        m = mixture(native, kind, combine)
        experts = m.part(list(range(m.num_experts))).weights.experts
        routed = m.routed
        chain_TH = native.moe_ffn(routed.normed_TH, experts, routed.ids_TC, routed.weights_TC)
        assert same(m.alone(), m.x_TH + chain_TH)


@pytest.mark.parametrize("kind", KINDS)
def test_fast_is_near(ops: NativeOrTwin, kind: str) -> None:
    torch.manual_seed(6)
    m = mixture(ops, kind, Combine.FAST, rows=8)
    alone, *others = over_everything(m)
    for x_TH in others:
        torch.testing.assert_close(x_TH, alone, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_native_and_twin_write_the_same_records_and_read_the_same_rows(
    native: CpuOps, kind: str
) -> None:
    """Ranks with and without the native half would understand each other."""
    for hidden, combine in product((6, 40, 64), Combine):
        understands_its_twin(native, kind, hidden, combine)


def understands_its_twin(native: CpuOps, kind: str, hidden: int, combine: Combine) -> None:
    torch.manual_seed(7)
    m = mixture(native, kind, combine, rows=9, hidden=hidden)
    twin = Mixture(REFERENCE, m.x_TH, m.routed, m.gate_up, m.down, None, None, combine)
    s = spread(m, 3, 0)
    which = s.copies(range(9), grouped(3, 1))
    parts = [[one.part(e) for e in s.experts] for one in (m, twin)]
    sent = packed(m, parts[0][0], range(9), which)
    again = packed(twin, parts[1][0], range(9), which)
    assert all(torch.equal(a, b) for a, b in zip(sent, again, strict=True))
    wire = native.wire(parts[0][0], m.top_k)
    assert wire == REFERENCE.wire(parts[1][0], m.top_k)
    back = [served(m, parts[0], r, [segment])[0] for r, segment in enumerate(sent)]
    one, other = m.x_TH.clone(), m.x_TH.clone()
    native.combine(one, parts[0][0], m.routed, which, back, None)
    REFERENCE.combine(other, parts[1][0], m.routed, which, back, None)
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    if combine is Combine.EXACT:
        assert same(one, other)


def test_a_token_is_sent_in_as_few_bytes_as_its_experts_need(native: CpuOps) -> None:
    """Of bfloat16 and no more: 2 bytes a feature."""
    for kind, of_features in (("float32", 4), ("bfloat16", 2), ("int8", 1), ("int4", 1)):
        m = mixture(native, kind, hidden=2048, top_k=8, experts=8, rows=1)
        part = m.part([0])
        wire = native.wire(part, 8)
        assert wire.row_bytes == 2048 * of_features + 4 + 4 + 8 * 4 + 8 * 2
    assert wire.row_bytes <= 0.55 * 2 * 2048


def test_sums_are_sent_in_two_bytes_where_all_of_a_row_fit(ops: NativeOrTwin) -> None:
    torch.manual_seed(8)
    m = mixture(ops, "int8", rows=70, hidden=33)
    m.x_TH[::2] *= 1e-3  # contributions are thousands of times the residual there
    part = m.part(list(range(m.num_experts)))
    slots = m.routed.ids_TC.short()
    which = Copies(torch.tensor([0, 70]).int(), torch.arange(70).int(), slots)
    sent = packed(m, part, range(70), which)
    wire = ops.wire(part, m.top_k)
    sums = ops.run_experts(part, wire, sent)
    wide = int((sums.data.long().abs().flatten(1).amax(1) > 32767).sum())
    assert wide == 35
    (back,) = answered(m, part, wire, sums, sent)
    assert back[:70].tolist() == [4, 2] * 35
    assert len(back) == 128 + 35 * 4 * 33 + 35 * (2 * 33 + 2)
    assert len(back) <= ops.sums_bytes(part, wire, 70)


def test_two_limbs_are_always_whole(native: CpuOps) -> None:
    torch.manual_seed(9)
    m = mixture(native, "float32", rows=3, hidden=10)
    part = m.part(list(range(m.num_experts)))
    which = Copies(torch.tensor([0, 3]).int(), torch.arange(3).int(), m.routed.ids_TC.short())
    sent = packed(m, part, range(3), which)
    wire = native.wire(part, m.top_k)
    sums = native.run_experts(part, wire, sent)
    assert sums.data.shape == (3, 2, 10)
    (back,) = answered(m, part, wire, sums, sent)
    assert len(back) == 64 + 3 * 2 * 4 * 10 == native.sums_bytes(part, wire, 3)


def test_bytes_and_slots_that_no_peer_should_send_are_errors(ops: NativeOrTwin) -> None:
    torch.manual_seed(10)
    m = mixture(ops, "int8", rows=4, hidden=64)
    part, fewer = m.part(list(range(m.num_experts))), m.part([0, 1])
    slots = torch.full((4, 3), 5, dtype=torch.int16)
    which = Copies(torch.tensor([0, 4]).int(), torch.arange(4).int(), slots)
    (sent,) = packed(m, part, range(4), which)
    wire = ops.wire(part, m.top_k)
    with pytest.raises(InternalError, match="slot"):
        ops.run_experts(fewer, wire, [sent])
    with pytest.raises(InternalError, match="bytes are not"):
        ops.run_experts(part, wire, [sent[:-1]])
    sums = ops.run_experts(part, wire, [sent])
    (back,) = answered(m, part, wire, sums, [sent])
    x_TH = m.x_TH.clone()
    for wrong in (back[:-4], torch.cat((back, back[-4:]))):
        with pytest.raises(InternalError, match="bytes are not the sums of"):
            ops.combine(x_TH, part, m.routed, which, [wrong], None)
    assert same(x_TH, m.x_TH)


def test_copies_and_areas_that_cannot_be_touch_no_memory(native: CpuOps) -> None:
    m = mixture(native, "int8", rows=4, hidden=64)
    part, slots = m.part(list(range(m.num_experts))), m.routed.ids_TC.short()
    wire = native.wire(part, m.top_k)
    room = torch.zeros(4 * wire.row_bytes, dtype=torch.uint8)
    tokens = torch.arange(4).int()
    whole = Copies(torch.tensor([0, 4]).int(), tokens, slots)
    for wrong in (
        Copies(torch.tensor([0, 4]).int(), tokens + 1, slots),
        Copies(torch.tensor([0, 4]).int(), tokens - 1, slots),
        Copies(torch.tensor([0, 3]).int(), tokens, slots),
        Copies(torch.tensor([0, 5, 4]).int(), tokens, slots),
    ):
        areas = [room] * (len(wrong.start_R1) - 1)
        with pytest.raises(InternalError, match="pack_tokens"):
            native.pack_tokens(m.x_TH, part, m.routed, wrong, areas)
    with pytest.raises(InternalError, match="pack_tokens"):
        native.pack_tokens(m.x_TH, part, m.routed, whole, [room[:-1]])
    assert not room.any()
    native.pack_tokens(m.x_TH, part, m.routed, whole, [room])
    with pytest.raises(InternalError, match="relay_tokens"):
        native.relay_tokens(wire, [room[:-1]], whole, [room.clone()])
    sums = native.run_experts(part, wire, [room])
    with pytest.raises(InternalError, match="pack_sums"):
        native.pack_sums(part, wire, sums, [room], [torch.zeros(64, dtype=torch.uint8)])
