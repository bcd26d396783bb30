"""Paged attention in Triton is the reference's, and a query's bits depend on its own past alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from moeserve.errors import InternalError
from moeserve.kernels.ops import AttentionBatch, KvCache, KvShape, Ops
from moeserve.kernels.reference.ops import ReferenceOps

PAGE = 3
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.int8: 2e-2}
Spans = list[tuple[int, int]]  # positions of each sequence, and how many of them are new


@dataclass(frozen=True)
class Case:
    """What a cache and its queries look like."""

    kv_heads: int
    group: int
    head: int
    value: int
    latent: bool
    window: int | None
    sinks: bool

    def shape(self, blocks: int, dtype: torch.dtype) -> KvShape:
        return KvShape(blocks, PAGE, self.kv_heads, self.head, self.value, dtype, self.latent)


CASES = {
    "grouped": Case(2, 3, 24, 20, False, None, False),
    "window and sinks": Case(1, 2, 32, 32, False, 5, True),
    "latent": Case(1, 5, 40, 32, True, None, False),
}


def filled(ops: Ops, case: Case, dtype: torch.dtype, lengths: list[int]) -> tuple[KvCache, Tensor]:
    """Random positions of sequences whose blocks are shuffled; others hold NaN. And the tables."""
    width = max(-(-n // PAGE) for n in lengths)
    blocks = torch.randperm(width * len(lengths)).int().view(-1, width)
    cache = ops.new_kv(case.shape(blocks.numel(), dtype))
    everything = torch.arange(blocks.numel() * PAGE)
    bad = torch.full((len(everything), case.kv_heads, case.head), torch.nan)
    ops.write_kv(cache, bad, None if case.latent else bad[..., : case.value], everything)
    for s, length in enumerate(lengths):
        p = torch.arange(length)
        k, v = (torch.randn(length, case.kv_heads, n) for n in (case.head, case.value))
        slots = blocks[s].long()[p // PAGE] * PAGE + p % PAGE
        ops.write_kv(cache, k, None if case.latent else v, slots)
    return cache, blocks


def batch_of(spans: Spans, blocks: Tensor) -> AttentionBatch:
    starts = [0]
    for _, new in spans:
        starts.append(starts[-1] + new)
    contexts = torch.tensor([context for context, _ in spans], dtype=torch.int32)
    return AttentionBatch(torch.tensor(starts, dtype=torch.int32), contexts, blocks)


def options(case: Case) -> dict[str, Any]:
    sinks = torch.linspace(-1, 1, case.kv_heads * case.group) if case.sinks else None
    return {"scale": case.head**-0.5, "window": case.window, "sinks_A": sinks}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_attention_is_the_reference(ops: Ops, name: str, dtype: torch.dtype) -> None:
    case, spans, found = CASES[name], [(9, 2), (4, 4), (70, 1)], []
    q = torch.randn(7, case.kv_heads * case.group, case.head)
    for table in (ops, ReferenceOps()):
        torch.manual_seed(7)
        cache, blocks = filled(table, case, dtype, [context for context, _ in spans])
        batch = batch_of(spans, blocks)
        found.append(table.paged_attention(q, cache, batch, **options(case)))
    assert not found[1].isnan().any()
    most = TOLERANCE[dtype]
    torch.testing.assert_close(found[0], found[1], rtol=most, atol=most)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_a_query_knows_neither_chunks_nor_neighbours(ops: Ops, dtype: torch.dtype) -> None:
    """Over two segments; in one go, and one row beside another sequence."""
    case = Case(1, 2, 16, 16, False, None, False)
    torch.manual_seed(1)
    cache, blocks = filled(ops, case, dtype, [515, 8])
    q = torch.randn(6, case.kv_heads * case.group, case.head)
    whole = ops.paged_attention(q, cache, batch_of([(515, 6), (8, 0)], blocks), **options(case))
    for row in (0, 5):
        mixed = torch.cat((q[row : row + 1], q[:2]))
        batch = batch_of([(510 + row, 1), (8, 2)], blocks)
        alone = ops.paged_attention(mixed, cache, batch, **options(case))[:1]
        assert torch.equal(alone, whole[row : row + 1]), row


def test_a_later_value_that_is_infinite_spoils_no_earlier_row(ops: Ops) -> None:
    case = Case(1, 1, 16, 16, False, None, False)
    cache, blocks = filled(ops, case, torch.bfloat16, [6])
    q, batch = torch.randn(6, 1, 16), batch_of([(6, 6)], blocks)
    clean = ops.paged_attention(q, cache, batch, scale=0.25)
    last = blocks[0, 1:2].long() * PAGE + 2
    ops.write_kv(cache, torch.ones(1, 1, 16), torch.full((1, 1, 16), torch.inf), last)
    spoiled = ops.paged_attention(q, cache, batch, scale=0.25)
    assert torch.equal(spoiled[:5], clean[:5])
    assert not spoiled[5].isfinite().any()


def test_what_does_not_fit_is_refused(ops: Ops) -> None:
    case = Case(1, 1, 16, 16, False, None, False)
    cache, q = ops.new_kv(case.shape(2, torch.float32)), torch.randn(2, 1, 16)
    for context, table in ((1, [[0, 1]]), (9, [[0, 1]]), (6, [[0, 2]]), (6, [[-1, 1]])):
        batch = batch_of([(context, 2)], torch.tensor(table, dtype=torch.int32))
        with pytest.raises(InternalError, match="do not fit"):
            ops.paged_attention(q, cache, batch, scale=1.0)
    for slot in (-1, 6):
        with pytest.raises(InternalError, match=r"0\.\.5"):
            ops.write_kv(cache, q[:1], q[:1], torch.tensor([slot]))


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_blocks_leave_as_the_reference_has_them(ops: Ops, dtype: torch.dtype, latent: bool) -> None:
    """So both round alike what is written."""
    case, found = CASES["latent" if latent else "grouped"], []
    for table in (ops, ReferenceOps()):
        torch.manual_seed(3)
        cache, blocks = filled(table, case, dtype, [2 * PAGE])
        found.append(table.export_kv(cache, blocks[0].long()))
    assert torch.equal(*found)
