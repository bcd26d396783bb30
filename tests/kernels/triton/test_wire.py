"""Experts on two ranks give the bits of one, and both backends read each other's bytes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from moeserve.errors import InternalError
from moeserve.kernels.matrix import Matrix, part_of, stack, to_int8
from moeserve.kernels.ops import MoeWeights, Ops, Part, Routed
from moeserve.kernels.reference.ops import ReferenceOps
from moeserve.kernels.wire import Combine, Copies, Wire

ROWS, HIDDEN, INNER, EXPERTS, CHOSEN = 5, 34, 16, 6, 3
RANKS = ([0, 1, 2], [3, 4, 5])


def experts_of(kind: str) -> tuple[Matrix, Matrix]:
    up = torch.randn(EXPERTS, 2 * INNER, HIDDEN) / 6
    down = torch.randn(EXPERTS, HIDDEN, INNER) / 4
    if kind == "int8":
        return to_int8(up), to_int8(down)
    return up.to(getattr(torch, kind)), down.to(getattr(torch, kind))


@dataclass(frozen=True)
class House:
    """Ranks of one op table, each with its experts, and the tokens of the first."""

    ops: Ops
    weights: tuple[Matrix, Matrix]
    x: Tensor
    routed: Routed
    combine: Combine

    def part(self, experts: list[int]) -> Part[MoeWeights]:
        mine = [stack([part_of(w, e) for e in experts]) for w in self.weights]
        packed = self.ops.pack_experts(mine[0], mine[1])
        return self.ops.prepare(MoeWeights(packed, None, self.combine))

    def copies(self) -> Copies:
        tokens, slots, starts = [], [], [0]
        for mine in RANKS:
            for t, ids in enumerate(self.routed.ids_TC.tolist()):
                here = [mine.index(e) if e in mine else -1 for e in ids]
                if max(here) >= 0:
                    tokens.append(t)
                    slots.append(here)
            starts.append(len(tokens))
        return Copies(
            torch.tensor(starts, dtype=torch.int32),
            torch.tensor(tokens, dtype=torch.int32),
            torch.tensor(slots, dtype=torch.int16).view(-1, CHOSEN),
        )

    def sent(self, part: Part[MoeWeights], wire: Wire) -> list[Tensor]:
        counts = self.copies().start_R1.diff().tolist()
        areas = [torch.full((n * wire.row_bytes,), 0xA5, dtype=torch.uint8) for n in counts]
        self.ops.pack_tokens(self.x, part, self.routed, self.copies(), areas)
        return areas

    def answered(self, part: Part[MoeWeights], wire: Wire, records: Tensor) -> Tensor:
        sums = self.ops.run_experts(part, wire, [records])
        area = torch.empty(
            self.ops.sums_bytes(part, wire, len(records) // wire.row_bytes), dtype=torch.uint8
        )
        (nbytes,) = self.ops.pack_sums(part, wire, sums, [records], [area])
        return area[:nbytes]


def house(ops: Ops, kind: str, combine: Combine, scale: float = 1.0) -> House:
    torch.manual_seed(11)
    ids = torch.stack([torch.randperm(EXPERTS)[:CHOSEN] for _ in range(ROWS)]).int()
    routed = Routed(torch.randn(ROWS, HIDDEN), ids, torch.rand(ROWS, CHOSEN))
    return House(ops, experts_of(kind), torch.randn(ROWS, HIDDEN) * scale, routed, combine)


@pytest.mark.parametrize(
    ("kind", "combine", "scale"),
    [
        ("float32", Combine.EXACT, 1.0),
        ("bfloat16", Combine.EXACT, 1.0),
        ("int8", Combine.EXACT, 1.0),
        ("int8", Combine.EXACT, 1e-2),  # rows too wide for two bytes
        ("int8", Combine.ORDERED, 1.0),
    ],
)
def test_two_ranks_give_the_bits_of_one(
    ops: Ops, kind: str, combine: Combine, scale: float
) -> None:
    h, twin = (house(table, kind, combine, scale) for table in (ops, ReferenceOps()))
    parts = [h.part(experts) for experts in RANKS]
    wire = h.ops.wire(parts[0], CHOSEN)
    records = h.sent(parts[0], wire)
    assert [r.tolist() for r in records] == [
        r.tolist() for r in twin.sent(twin.part(RANKS[0]), wire)
    ]
    back = [h.answered(part, wire, r) for part, r in zip(parts, records, strict=True)]
    together, alone = h.x.clone(), h.x.clone()
    h.ops.combine(together, parts[0], h.routed, h.copies(), back, None)
    h.ops.moe(alone, h.part([*range(EXPERTS)]), h.routed)
    assert torch.equal(together, alone)
    theirs = h.x.clone()
    twin.ops.combine(theirs, twin.part(RANKS[0]), h.routed, h.copies(), back, None)
    assert combine is not Combine.EXACT or torch.equal(theirs, alone)


def test_fast_is_near_and_handed_on_sums_are_the_same(ops: Ops) -> None:
    for combine in (Combine.FAST, Combine.EXACT):
        h = house(ops, "int8", combine)
        parts = [h.part(experts) for experts in RANKS]
        wire = h.ops.wire(parts[0], CHOSEN)
        back = [
            h.answered(part, wire, r) for part, r in zip(parts, h.sent(parts[0], wire), strict=True)
        ]
        alone = h.x.clone()
        h.ops.moe(alone, h.part([*range(EXPERTS)]), h.routed)
        sums = h.ops.relay_sums(parts[0], wire, h.copies(), back, ROWS)
        every = Copies(
            torch.tensor([0, ROWS], dtype=torch.int32),
            torch.arange(ROWS, dtype=torch.int32),
            torch.zeros(ROWS, CHOSEN, dtype=torch.int16),
        )
        records = torch.zeros(ROWS * wire.row_bytes, dtype=torch.uint8)
        area = torch.empty(h.ops.sums_bytes(parts[0], wire, ROWS), dtype=torch.uint8)
        (nbytes,) = h.ops.pack_sums(parts[0], wire, sums, [records], [area])
        together = h.x.clone()
        h.ops.combine(together, parts[0], h.routed, every, [area[:nbytes]], None)
        torch.testing.assert_close(together, alone, rtol=0.02, atol=0.02)
        assert combine is Combine.FAST or torch.equal(together, alone)


def test_bytes_that_no_peer_should_send_are_errors(ops: Ops) -> None:
    h = house(ops, "int8", Combine.EXACT)
    part = h.part(RANKS[0])
    wire = h.ops.wire(part, CHOSEN)
    records = h.sent(part, wire)[0]
    with pytest.raises(InternalError, match="are not records"):
        h.ops.run_experts(part, wire, [records[:-1]])
    records[wire.slots_at : wire.slots_at + 2] = torch.tensor([3, 0], dtype=torch.uint8)
    with pytest.raises(InternalError, match=r"slot 3 is not in 0\.\.2"):
        h.ops.run_experts(part, wire, [records])
    with pytest.raises(InternalError, match="are not the sums"):
        h.ops.combine(h.x, part, h.routed, h.copies(), [records, records], None)
