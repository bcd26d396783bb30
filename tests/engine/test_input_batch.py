"""What the runner keeps between steps gives the same batch as packing from nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeserve.core import (
    BlockId,
    Chunk,
    Counters,
    FinishReason,
    Request,
    RequestId,
    SamplingParams,
    StepPlan,
)
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.input_batch import FEW, InputBatch
from moeserve.engine.null import NullExecutor
from moeserve.engine.policies.choices import Drafter
from moeserve.engine.scheduler import Scheduler
from moeserve.errors import InternalError
from moeserve.kernels.sampling import SamplingRow, sampling_row
from moeserve.models.batch import Span, StepBatch, pack_spans

BLOCK = 4
GREEDY = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)


def columns(step: StepBatch) -> dict[str, Tensor]:
    """All but the block tables, which may be wider than they need be."""
    return {
        "ids": step.token_ids_T,
        "positions": step.positions_T,
        "slots": step.slot_T,
        "rows": step.logit_rows_R,
        "starts": step.attention.query_start_S1,
        "contexts": step.attention.context_S,
    }


def tables(step: StepBatch, chunks: tuple[Chunk, ...]) -> list[list[int]]:
    rows = step.attention.blocks_SM.tolist()
    assert len(rows) == len(chunks)
    return [row[: len(c.blocks)] for row, c in zip(rows, chunks, strict=True)]


def rows_from_nothing(chunks: tuple[Chunk, ...]) -> list[SamplingRow]:
    return [
        sampling_row(c.request.id, c.request.params, c.request.prompt_ids, history)
        for c in chunks
        for i in range(c.samples)
        for history in [[*c.output_ids, *c.draft_ids[:i]]]
    ]


@dataclass
class Packed:
    """An input batch beside its twin; what it packed is looked at again later. ``again`` is of one
    whose steps are used up when the next one comes."""

    batch: InputBatch = field(default_factory=lambda: InputBatch(BLOCK))
    again: InputBatch = field(default_factory=lambda: InputBatch(BLOCK))
    earlier: list[tuple[StepBatch, dict[str, list[int]], tuple[Chunk, ...]]] = field(
        default_factory=list
    )

    def check(self, plan: StepPlan) -> StepBatch:
        for batch in (self.batch, self.again):
            batch.forget(plan.preempted + plan.ended)
        step = self.batch.pack(plan.chunks)
        used_up = self.again.pack(plan.chunks, again=True)
        spans = [Span(c.token_ids, c.start, c.blocks, c.samples) for c in plan.chunks]
        twin = columns(pack_spans(spans, BLOCK))
        for name, got in [*columns(step).items(), *columns(used_up).items()]:
            assert got.dtype is twin[name].dtype, name
            assert got.tolist() == twin[name].tolist(), name
        assert tables(used_up, plan.chunks) == [list(c.blocks) for c in plan.chunks]
        assert used_up.attention.blocks_SM.is_contiguous()
        assert self.again.sampling_rows(plan.chunks) == self.batch.sampling_rows(plan.chunks)
        assert step.attention.blocks_SM.is_contiguous()
        rows = self.batch.sampling_rows(plan.chunks)
        flat = [row._replace(output_ids=[*row.output_ids]) for row in rows]
        assert flat == rows_from_nothing(plan.chunks)
        self.earlier.append((step, {n: x.tolist() for n, x in columns(step).items()}, plan.chunks))
        for old, values, chunks in self.earlier[-4:]:
            assert {n: x.tolist() for n, x in columns(old).items()} == values
            assert tables(old, chunks) == [list(c.blocks) for c in chunks]
        return step


@settings(max_examples=120, deadline=None)
@given(
    arrivals=st.lists(
        st.tuples(st.integers(0, 12), st.integers(1, 14), st.integers(1, 30)),
        min_size=1,
        max_size=7,
    ),
    num_blocks=st.integers(11, 16),
    drafts=st.integers(0, 3),
    budget=st.integers(4, 20),
    aborts=st.lists(st.integers(0, 30), max_size=3),
    data=st.data(),
)
def test_steps_are_packed_as_from_nothing(
    arrivals: list[tuple[int, int, int]],
    num_blocks: int,
    drafts: int,
    budget: int,
    aborts: list[int],
    data: st.DataObject,
    guessers: Callable[..., Drafter],
) -> None:
    """Under prompts in pieces, preemption, drafts, ends and aborts, and ids that return."""
    counters = Counters()
    drafter = guessers(50, drafts, 3) if drafts else None
    config = SchedulerConfig(44, 4, budget)
    scheduler = Scheduler(config, BlockPool(num_blocks, BLOCK, counters), counters, drafter=drafter)
    executor, packed = NullExecutor(num_blocks, BLOCK, 50), Packed()
    for now in range(400):
        for i, (at, prompt, answer) in enumerate(arrivals):
            if at == now or (now == 200 and not scheduler.owns(RequestId(f"r{i}"))):
                params = SamplingParams(max_tokens=answer, temperature=i % 2, ignore_eos=True)
                scheduler.add(Request(RequestId(f"r{i}"), tuple(range(now, now + prompt)), params))
        if now in aborts:
            which = data.draw(st.integers(0, len(arrivals) - 1))
            scheduler.abort(RequestId(f"r{which}"), FinishReason.ABORT)
        if now > 200 and not scheduler.has_work:
            break
        plan = scheduler.plan(0.0)
        if plan.chunks:
            packed.check(plan)
            scheduler.apply(executor.run(plan))


def one(asked: Request, start: int, blocks: list[int], outputs: list[int]) -> Chunk:
    known = (*asked.prompt_ids, *outputs)
    table = tuple(map(BlockId, blocks))
    return Chunk(asked, (known[start],), start, table, int(start + 1 == len(known)), outputs)


def test_an_id_that_returns_with_other_tokens_is_another_request() -> None:
    """Also where nobody says that the first one ended."""
    packed = Packed()
    first = Request(RequestId("a"), (5, 6), GREEDY)
    again = Request(RequestId("a"), (7, 8), SamplingParams(temperature=1.0))
    for asked, blocks in ((first, [3]), (again, [1]), (again, [1])):
        packed.check(StepPlan((one(asked, 1, blocks, []),)))


def test_blocks_that_changed_behind_the_same_length_are_noticed() -> None:
    packed = Packed()
    asked, outputs = Request(RequestId("a"), tuple(range(9)), GREEDY), [1]
    for blocks in ([3, 4, 5], [3, 6, 5], [0, 1, 2, 3], [0]):
        packed.check(StepPlan((one(asked, min(9, 4 * len(blocks) - 3), blocks, outputs),)))


def test_more_blocks_than_there_was_room_for_widen_the_tables() -> None:
    packed = Packed()
    asked, outputs = Request(RequestId("a"), (1,), GREEDY), [2] * 999
    other = Request(RequestId("b"), (1, 2), GREEDY)
    for count in (1, 2, 3, 20, 21, 63, 64, 65, 140):
        long = one(asked, 4 * count - 1, list(range(500, 500 + count)), outputs)
        packed.check(StepPlan((long, one(other, 0, [7], outputs))))


@pytest.mark.parametrize("count", [2, FEW, FEW + 1])
def test_a_step_comes_again_as_long_as_the_same_requests_have_one_token_each(count: int) -> None:
    batch = InputBatch(BLOCK)
    asked = [Request(RequestId(str(i)), (9, i), GREEDY) for i in range(count)]
    outputs: list[list[int]] = [[] for _ in asked]

    def pack(step: int, blocks: int) -> StepBatch:
        chunks = [
            one(r, step, [i + 100 * b for b in range(blocks)], outputs[i])
            for i, r in enumerate(asked)
        ]
        for made in outputs:
            made.append(step)
        return batch.pack(chunks, again=True)

    first, second = pack(1, 1), pack(2, 1)
    assert first.kept is None
    assert second.kept is not None
    assert pack(3, 1) is second
    assert pack(4, 2) is second  # one more block each
    asked.reverse()
    outputs.reverse()
    assert pack(5, 2).kept is None
    assert pack(6, 2) is not second


def test_rows_are_used_again_when_requests_are_forgotten() -> None:
    packed = Packed()
    for step in range(60):
        chunks = [
            one(Request(RequestId(f"{step}-{i}"), (1, 2), GREEDY), 1, [i], []) for i in range(9)
        ]
        ended = tuple(RequestId(f"{step - 1}-{i}") for i in range(9))
        packed.check(StepPlan(tuple(chunks), ended=ended))
    assert packed.batch.num_rows == 16


@pytest.mark.parametrize("others", [0, FEW, 3 * FEW])
def test_many_and_few_decodes_are_packed_alike(others: int) -> None:
    packed = Packed()
    asked = [Request(RequestId(str(i)), (9, i), GREEDY) for i in range(others + 1)]
    outputs: list[list[int]] = [[] for _ in asked]
    for step in range(10):
        chunks = tuple(
            one(r, step + 1, [i, 90 + i, 190 + i][: (step + 1) // BLOCK + 1], outputs[i])
            for i, r in enumerate(asked)
        )
        packed.check(StepPlan(chunks))
        for i, made in enumerate(outputs):
            made.append(10 * i + step)


@pytest.mark.parametrize("others", [1, FEW])
def test_a_chunk_without_room_for_its_tokens_is_named(others: int) -> None:
    batch = InputBatch(BLOCK)
    asked, outputs = Request(RequestId("a"), tuple(range(9)), GREEDY), [1]
    fits = [one(Request(RequestId(f"b{i}"), (1,), GREEDY), 0, [i], []) for i in range(others)]
    with pytest.raises(InternalError, match=r"request a: 2 blocks of 4 tokens .* position 9$"):
        batch.pack((*fits, one(asked, 9, [1, 2], outputs)))
    step = batch.pack((*fits, one(asked, 9, [1, 2, 30], outputs)))
    assert step.slot_T.tolist() == [*range(0, BLOCK * others, BLOCK), 121]


def test_a_step_may_be_empty() -> None:
    packed = Packed()
    for chunks in ((), (one(Request(RequestId("a"), (1,), GREEDY), 0, [2], []),), ()):
        packed.check(StepPlan(chunks))
    assert packed.earlier[0][0].attention.blocks_SM.shape == (0, 0)
