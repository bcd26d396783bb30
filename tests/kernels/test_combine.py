"""Whoever computes the experts of a token, the sum is the same bits; what travels is counted."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeserve.kernels.cpu import CpuOps
from moeserve.kernels.matrix import Matrix, part_of, stack, to_int4, to_int8
from moeserve.kernels.ops import (
    Activation,
    GatedWeights,
    MlpWeights,
    MoeWeights,
    Part,
    Routed,
)
from moeserve.kernels.reference import ReferenceOps
from moeserve.kernels.wire import Combine, Copies, Sums, Wire

FEW = settings(max_examples=40, deadline=None)
FEWER = settings(max_examples=12, deadline=None)
REFERENCE = ReferenceOps()
KINDS = ["float32", "bfloat16", "int8", "int4"]

seeds = st.integers(0, 2**31)
kinds = st.sampled_from(KINDS)
combines = st.sampled_from(Combine)
NATIVE_AND_TWIN = CpuOps | ReferenceOps


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

    ops: NATIVE_AND_TWIN
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
        self.ops.mix(x_TH, self.part(list(range(self.num_experts))), self.routed)
        return x_TH


def mixture(
    ops: NATIVE_AND_TWIN,
    kind: str,
    combine: Combine = Combine.EXACT,
    rows: int = 5,
    hidden: int = 40,
    top_k: int = 3,
    experts: int = 6,
    inner: int = 16,
    scale: float = 1.0,
    shared: str = "none",
    bias: bool = False,
) -> Mixture:
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
class Spread:
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


def spread(m: Mixture, world: int, spare: int) -> Spread:
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
    return Spread([order[r * slots : (r + 1) * slots] for r in range(world)], chosen, m.top_k)


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
    m: Mixture, parts: list[Part[MoeWeights]], rank: int, came: list[Tensor]
) -> list[Tensor]:
    wire = m.ops.wire(parts[rank], m.top_k)
    sums = m.ops.run_experts(parts[rank], wire, came)
    return answered(m, parts[rank], wire, sums, came)


def relayed(
    m: Mixture,
    s: Spread,
    parts: list[Part[MoeWeights]],
    group: list[int],
    came: list[Tensor],
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
    m.ops.relay_tokens(wire, came, which, areas)
    back = [
        served(m, parts, rank, [a[: n * wire.row_bytes]])[0]
        for rank, a, n in zip(group, areas, counts, strict=True)
    ]
    sums = m.ops.relay_sums(parts[0], wire, which, back, len(tokens))
    return answered(m, parts[0], wire, sums, came)


def together(m: Mixture, s: Spread, groups: list[list[int]]) -> Tensor:
    """What ranks make of it, each the home of some tokens; groups of several pass tokens on."""
    parts = [m.part(experts) for experts in s.experts]
    rows = len(m.x_TH)
    cuts = sorted(torch.randint(rows + 1, (s.world - 1,)).tolist())
    homes = [range(a, b) for a, b in zip([0, *cuts], [*cuts, rows], strict=True)]
    which = [s.copies(tokens, groups) for tokens in homes]
    sent = [packed(m, parts[0], tokens, w) for tokens, w in zip(homes, which, strict=True)]
    back = []
    for g, group in enumerate(groups):
        came = [segments[g] for segments in sent]
        if len(group) == 1:
            back.append(served(m, parts, group[0], came))
            continue
        theirs = [
            homes[h][n]
            for h, w in enumerate(which)
            for n in w.token_N[int(w.start_R1[g]) : int(w.start_R1[g + 1])].tolist()
        ]
        back.append(relayed(m, s, parts, group, came, theirs))
    out = m.x_TH.clone()
    for h, tokens in enumerate(homes):
        rows_here = slice(tokens.start, tokens.stop)
        routed, x_TH = here(m.routed, rows_here), out[rows_here]
        shared_TH = m.ops.shared(parts[0], routed)
        segments = [segments[h] for segments in back]
        m.ops.collect(x_TH, parts[0], routed, which[h], segments, shared_TH)
    return out


def grouped(world: int, size: int) -> list[list[int]]:
    return [list(range(r, min(world, r + size))) for r in range(0, world, size)]


CASE = {
    "seed": seeds,
    "kind": kinds,
    "combine": st.sampled_from([Combine.EXACT, Combine.EXACT, Combine.ORDERED]),
    "rows": st.integers(0, 9),
    "hidden": st.sampled_from([1, 7, 32, 40, 64, 130]),
    "top_k": st.integers(1, 4),
    "world": st.integers(1, 5),
    "spare": st.integers(0, 2),
    "size": st.integers(1, 3),
    "scale": st.sampled_from([0.0, 1e-3, 1.0, 50.0]),
    "shared": st.sampled_from(["none", "plain", "gated"]),
    "bias": st.booleans(),
}


def holds(
    ops: NATIVE_AND_TWIN,
    seed: int,
    kind: str,
    combine: Combine,
    rows: int,
    hidden: int,
    top_k: int,
    world: int,
    spare: int,
    size: int,
    scale: float,
    shared: str,
    bias: bool,
) -> None:
    torch.manual_seed(seed)
    hidden += hidden % 2 if kind == "int4" else 0
    m = mixture(ops, kind, combine, rows, hidden, top_k, scale=scale, shared=shared, bias=bias)
    alone = m.alone()
    for size_here in {1, size}:
        s = spread(m, world, spare)
        assert same(together(m, s, grouped(world, size_here)), alone)


@FEW
@given(**CASE)
@pytest.mark.usefixtures("two_threads")
def test_any_partition_gives_the_bits_of_one_process(native: CpuOps, **case: object) -> None:
    holds(native, **case)  # type: ignore[arg-type]


@FEWER
@given(**CASE)
def test_any_partition_of_the_twin_gives_its_bits(**case: object) -> None:
    holds(REFERENCE, **case)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("two_threads")
def test_many_rows_are_shared_among_threads_and_still_the_same(native: CpuOps, kind: str) -> None:
    torch.manual_seed(1)
    m = mixture(native, kind, rows=150, hidden=256, top_k=4, experts=12, inner=64, scale=0.3)
    assert same(together(m, spread(m, 4, 1), grouped(4, 1)), m.alone())
    assert same(together(m, spread(m, 4, 0), grouped(4, 2)), m.alone())
