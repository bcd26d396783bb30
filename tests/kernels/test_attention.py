"""Paged attention does what plain torch does, and a query's bits depend on its own past alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeserve.errors import InternalError
from moeserve.kernels.cpu.ops import CpuOps, _cpu
from moeserve.kernels.ops import AttentionBatch, KvCache, KvShape, Ops
from moeserve.kernels.reference.kv import round_probs
from moeserve.kernels.reference.ops import ReferenceOps

REFERENCE = ReferenceOps()
FEW = settings(max_examples=25, deadline=None)
# Where two exponentials differ in their last bit, a probability may round to its type's next value.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.int8: 2e-2}

seeds = st.integers(0, 2**31)
dtypes = st.sampled_from(list(TOLERANCE))
block_sizes = st.sampled_from([1, 3, 16, 48, 64, 100])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Stricter than ``==``: +0 is not -0."""
    return a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))


@dataclass(frozen=True)
class Case:
    """Attention of one kind: what its cache and its queries look like."""

    dtype: torch.dtype
    block_size: int = 16
    kv_heads: int = 1
    group: int = 1
    head_size: int = 24
    value_size: int = 24
    latent: bool = False
    window: int | None = None
    sinks: bool = False

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    def shape(self, blocks: int) -> KvShape:
        sizes = (self.kv_heads, self.head_size, self.value_size)
        return KvShape(blocks, self.block_size, *sizes, self.dtype, self.latent)

    def past(self, length: int) -> tuple[Tensor, Tensor | None]:
        k = torch.randn(length, self.kv_heads, self.head_size)
        return k, None if self.latent else torch.randn(length, self.kv_heads, self.value_size)

    def queries(self, rows: int) -> Tensor:
        return torch.randn(rows, self.heads, self.head_size)

    def options(self) -> dict[str, object]:
        sinks = torch.randn(self.heads) if self.sinks else None
        return {"scale": self.head_size**-0.5, "window": self.window, "sinks_A": sinks}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    latent = draw(st.booleans())
    head_size = draw(st.integers(1, 80))
    return Case(
        dtype=draw(dtypes),
        block_size=draw(block_sizes),
        kv_heads=1 if latent else draw(st.integers(1, 3)),
        group=draw(st.integers(1, 11)),
        head_size=head_size,
        value_size=draw(st.integers(1, head_size if latent else 80)),
        latent=latent,
        window=draw(st.sampled_from([None, None, 1, 5, 64, 100])),
        sinks=draw(st.booleans()),
    )


class Paged:
    """Sequences in a cache of one table, in blocks of a random order.

    Positions that no sequence has written hold NaN: whoever reads one shows it.
    """

    def __init__(self, ops: Ops, case: Case, pasts: list[tuple[Tensor, Tensor | None]]) -> None:
        self.ops, self.case = ops, case
        needed = [-(-len(k) // case.block_size) for k, _ in pasts]
        free = torch.randperm(sum(needed) + 1).tolist()
        self.cache = ops.new_kv(case.shape(len(free)))
        spoil(ops, self.cache)
        self.tables = [[free.pop() for _ in range(count)] for count in needed]
        for table, (k, v) in zip(self.tables, pasts, strict=True):
            self.write(table, k, v)

    def write(self, table: list[int], k: Tensor, v: Tensor | None) -> None:
        position, size = torch.arange(len(k)), self.case.block_size
        blocks = torch.tensor(table, dtype=torch.int64)
        slots = blocks[position // size] * size + position % size
        self.ops.write_kv(self.cache, k, v, slots)

    def batch(self, spans: list[tuple[int, int]]) -> AttentionBatch:
        """(context, new tokens) of each sequence; the table names no block beyond its last."""
        width = max((len(t) for t in self.tables), default=0) + 1
        table = torch.full((len(self.tables), width), 10**6, dtype=torch.int32)
        for row, blocks in zip(table, self.tables, strict=True):
            row[: len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        starts = [0]
        for _, new in spans:
            starts.append(starts[-1] + new)
        return AttentionBatch(
            torch.tensor(starts, dtype=torch.int32),
            torch.tensor([context for context, _ in spans], dtype=torch.int32),
            table,
        )

    def attend(self, q: Tensor, spans: list[tuple[int, int]], options: dict[str, object]) -> Tensor:
        batch = self.batch(spans)
        return self.ops.paged_attention(q, self.cache, batch, **options)  # type: ignore[arg-type]


def spoil(ops: Ops, cache: KvCache) -> None:
    shape = cache.shape
    slots = shape.num_blocks * shape.block_size
    k = torch.full((slots, shape.kv_heads, shape.head_size), torch.nan)
    v = None if shape.latent else torch.full((slots, shape.kv_heads, shape.value_size), torch.nan)
    ops.write_kv(cache, k, v, torch.arange(slots))


def one(ops: Ops, case: Case, k: Tensor, v: Tensor | None, q: Tensor, **options: object) -> Tensor:
    """Attention of a sequence's last tokens."""
    return Paged(ops, case, [(k, v)]).attend(q, [(len(k), len(q))], options)


MLA = Case(torch.bfloat16, 16, 1, 16, 576, 512, True)
GPT_OSS = Case(torch.bfloat16, 16, 2, 8, 64, 64, False, 128, True)
WIDEST = Case(torch.float32, 16, 1, 1, 1024, 1024)
LAST = 130  # tokens of a sequence that ask; where it is longer than a segment, on both sides of it


@FEW
@given(
    seeds,
    cases(),
    st.lists(
        st.tuples(st.sampled_from([0, 1, 15, 63, 64, 70, 130, 530]), st.integers(0, 7)), max_size=3
    ),
)
@example(0, MLA, [(600, 2), (0, 5)])
@example(0, replace(MLA, dtype=torch.int8), [(600, 2), (0, 5)])
@example(0, GPT_OSS, [(199, 1), (0, 9)])
@example(0, replace(GPT_OSS, dtype=torch.int8), [(199, 1), (0, 9)])
@example(0, WIDEST, [(63, 3)])
def test_attention_is_the_reference(
    native: CpuOps, seed: int, case: Case, sequences: list[tuple[int, int]]
) -> None:
    torch.manual_seed(seed)
    spans = [(past + new, new) for past, new in sequences]
    pasts = [case.past(context) for context, _ in spans]
    q, options = case.queries(sum(new for _, new in spans)), case.options()
    ours, theirs = (
        Paged(ops, case, pasts).attend(q, spans, options) for ops in (native, REFERENCE)
    )
    assert not theirs.isnan().any()
    most = TOLERANCE[case.dtype]
    torch.testing.assert_close(ours, theirs, rtol=most, atol=most)


@pytest.mark.parametrize("latent", [False, True])
def test_a_smaller_cache_costs_little_accuracy(native: CpuOps, latent: bool) -> None:
    """Relative to attention in fp64 over the unrounded past, of random queries, keys and values."""
    for dtype, error in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.int8, 1.5e-2)):
        torch.manual_seed(0)
        case = Case(dtype, group=4, head_size=128, value_size=96 if latent else 128, latent=latent)
        k, v = case.past(700)
        q = case.queries(2)
        out = one(native, case, k, v, q, scale=128**-0.5)
        values = k[:, 0, :96] if v is None else v[:, 0]
        for row, context in enumerate((699, 700)):
            prob = (q[row].double() @ k[:context, 0].double().T * 128**-0.5).softmax(-1)
            exact = prob @ values[:context].double()
            assert (out[row] - exact).norm() < error * exact.norm(), dtype


@settings(max_examples=60, deadline=None)
@given(seeds, cases(), st.integers(1, 200) | st.sampled_from([513, 600]), block_sizes, st.data())
@example(1, replace(MLA, group=4), 520, 3, None)
@example(1, replace(MLA, group=4, dtype=torch.int8), 520, 3, None)
@example(2, GPT_OSS, 300, 48, None)
@pytest.mark.usefixtures("two_threads")
def test_attention_knows_neither_chunks_nor_blocks_nor_neighbours(
    native: CpuOps,
    seed: int,
    case: Case,
    length: int,
    other_block_size: int,
    data: st.DataObject | None,
) -> None:
    torch.manual_seed(seed)
    rows = min(length, LAST)
    (k, v), q, options = case.past(length), case.queries(rows), case.options()
    whole = Paged(native, case, [(k, v)]).attend(q, [(length, rows)], options)

    places = st.lists(st.integers(0, rows), max_size=4).map(sorted)
    cuts = [1, rows // 2] if data is None else data.draw(places)
    pages = Paged(native, replace(case, block_size=other_block_size), [case.past(70), (k, v)])
    chunks = []
    for a, b in zip([0, *cuts], [*cuts, rows], strict=True):
        if a < b:
            guest = case.queries(1)
            spans = [(70, 1), (length - rows + b, b - a)]
            chunks.append(pages.attend(torch.cat((guest, q[a:b])), spans, options)[1:])
    assert same_bits(torch.cat(chunks), whole)


@settings(max_examples=20, deadline=None)
@given(seeds, cases(), st.sampled_from([1, 40, 600, 1100]), st.integers(1, 40))
@example(3, MLA, 1100, 1)
@example(3, replace(MLA, dtype=torch.int8), 1100, 1)
def test_threads_and_instruction_sets_do_not_change_a_bit(
    restored: None, seed: int, case: Case, length: int, rows: int
) -> None:
    """Peers of different processors may share a cache. Plain SSE has no fused multiply-add."""
    torch.manual_seed(seed)
    (k, v), q, options = case.past(length), case.queries(min(rows, length)), case.options()
    results = []
    for isa in [isa for isa in _cpu.isas() if isa != "portable"] or ["portable"]:
        for threads in (1, 2, 5):
            _cpu.set_isa(isa)
            _cpu.set_threads(threads)
            torch.manual_seed(seed)
            results.append(one(CpuOps(), case, k, v, q, **options))
    assert all(same_bits(results[0], other) for other in results)


@pytest.fixture(scope="module")
def restored() -> Iterator[None]:
    isa, threads = _cpu.isa(), _cpu.threads()
    yield
    _cpu.set_isa(isa)
    _cpu.set_threads(threads)


@pytest.mark.parametrize("where", ["q", "k", "v", "latent"])
def test_a_row_that_overflowed_stays_alone(native: CpuOps, where: str) -> None:
    """Rows of one sequence share reads of the cache, but a later row's infinite value is not
    multiplied by an earlier row's zero."""
    for dtype, bad in product(TOLERANCE, (torch.nan, torch.inf, -torch.inf)):
        case = Case(dtype, group=3, latent=where == "latent", value_size=20)
        (k, v), q = case.past(85), case.queries(85)
        clean = one(native, case, k, v, q, scale=0.25)
        if where == "q":
            q[77] = bad
        elif where == "v" and v is not None:
            v[77:] = bad
        else:
            k[77:] = bad
        spoiled = one(native, case, k, v, q, scale=0.25)
        assert same_bits(spoiled[:77], clean[:77]), (dtype, bad)
        may_be_a_number = where in ("k", "latent") and bad != torch.nan
        assert may_be_a_number or not spoiled[77].isfinite().any(), (dtype, bad)
        if where == "q":
            assert same_bits(spoiled[78:], clean[78:]), (dtype, bad)


def test_a_nan_shows_in_its_row_whatever_the_cache_holds(native: CpuOps) -> None:
    for dtype in TOLERANCE:
        case = Case(dtype, group=2)
        (k, v), q = case.past(40), case.queries(40)
        k[20, 0, 3] = torch.nan
        out = one(native, case, k, v, q, scale=0.25)
        assert out[:20].isfinite().all()
        assert out[20:].isnan().all()


@FEW
@given(seeds, cases(), st.integers(2, 30))
def test_a_slot_written_twice_holds_the_last(
    native: CpuOps, seed: int, case: Case, length: int
) -> None:
    torch.manual_seed(seed)
    (k, v), old, q, options = case.past(length), case.past(length), case.queries(2), case.options()
    pages = Paged(native, case, [old])
    pages.write(pages.tables[0], k, v)
    fresh = one(native, case, k, v, q, **options)
    assert same_bits(pages.attend(q, [(length, 2)], options), fresh)


def test_write_kv_refuses_a_slot_outside_the_cache(native: CpuOps) -> None:
    case = Case(torch.float32, block_size=2)
    cache = native.new_kv(case.shape(3))
    for slot in (-1, 6):
        with pytest.raises(InternalError, match=r"0\.\.5"):
            native.write_kv(cache, *case.past(1), torch.tensor([slot]))


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
    batch = AttentionBatch(
        torch.tensor([0, 2], dtype=torch.int32),
        torch.tensor([context], dtype=torch.int32),
        torch.tensor(table, dtype=torch.int32),
    )
    for dtype in TOLERANCE:
        case = Case(dtype, block_size=4)
        with pytest.raises(InternalError, match="do not fit"):
            native.paged_attention(case.queries(2), native.new_kv(case.shape(2)), batch, scale=1.0)


@FEW
@given(cases(), st.integers(1, 5))
def test_a_cache_takes_what_was_said(native: CpuOps, case: Case, blocks: int) -> None:
    for ops in (native, REFERENCE):
        cache = ops.new_kv(case.shape(blocks))
        assert cache.nbytes == blocks * ops.kv_bytes_per_block(case.shape(1))
        token = ops.kv_bytes_per_block(replace(case, block_size=1).shape(1))
        assert ops.kv_bytes_per_block(case.shape(1)) == case.block_size * token


def test_int8_takes_half_and_a_scale(native: CpuOps) -> None:
    case = Case(torch.bfloat16, kv_heads=4, head_size=128, value_size=128)
    small = replace(case, dtype=torch.int8)
    assert native.kv_bytes_per_block(case.shape(1)) == 16 * 4 * 256 * 2
    assert native.kv_bytes_per_block(small.shape(1)) == 16 * 4 * (256 + 8)


def test_probabilities_over_int8_values_are_codes_to_255_of_the_steps_greatest() -> None:
    prob_P = torch.tensor([1.0, 0.45, 0.25, 0.001])
    rounded_P, counted_P = round_probs(prob_P, torch.full((4,), 2.0), torch.int8)
    # 255, 114.75, 63.75 and 0.255 of 2 / 255 each.
    assert (rounded_P * 255 / 2).tolist() == pytest.approx([255, 115, 64, 0])
    assert counted_P.tolist() == prob_P.tolist()
