"""The runner packs a plan, runs it, and samples each row by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moeserve.core import BlockId, Chunk, LayerGroup, Request, RequestId, SamplingParams, StepPlan
from moeserve.engine.model_runner import ModelRunner
from moeserve.kernels.reference.ops import ReferenceOps
from moeserve.models.batch import StepBatch

GREEDY = SamplingParams(temperature=0)
V = 8


class Echo:
    """A decoder that answers each token with itself; after token 3 its logits are no numbers."""

    ops = ReferenceOps()

    def __init__(self) -> None:
        self.steps: list[StepBatch] = []

    def new_cache(self, num_blocks: int, block_size: int) -> None:
        return None

    def forward_micro(
        self, steps: Sequence[StepBatch], cache: None, observer: object = None
    ) -> list[torch.Tensor]:
        self.steps += steps
        return [self.answer(step) for step in steps]

    def answer(self, step: StepBatch) -> torch.Tensor:
        last_R = step.token_ids_T[step.logit_rows_R]
        logits_RV = torch.nn.functional.one_hot(last_R, V).float()
        logits_RV[last_R == 3, 5] = torch.nan
        return logits_RV


def chunk(name: str, token_ids: list[int], start: int, blocks: list[int], samples: int) -> Chunk:
    request = Request(RequestId(name), tuple(range(start)) + tuple(token_ids), GREEDY)
    return Chunk(request, tuple(token_ids), start, tuple(map(BlockId, blocks)), samples)


def test_chunks_of_prefill_and_decode_share_a_batch() -> None:
    decoder = Echo()
    plan = StepPlan((chunk("a", [1, 2], 3, [5, 0], 0), chunk("b", [4], 6, [2, 7], 1)))
    result = ModelRunner(decoder, 8, 4).run(plan)
    (step,) = decoder.steps
    assert step.token_ids_T.tolist() == [1, 2, 4]
    assert step.positions_T.tolist() == [3, 4, 6]
    assert step.slot_T.tolist() == [23, 0, 30]
    assert step.attention.query_start_S1.tolist() == [0, 2, 3]
    assert step.attention.context_S.tolist() == [5, 7]
    assert step.logit_rows_R.tolist() == [2]
    assert [(s.request_id, s.token_ids) for s in result.sampled] == [("b", (4,))]


def test_logits_that_are_no_numbers_fail_one_request_of_the_step() -> None:
    seen: list[str] = []
    executor = ModelRunner(Echo(), 4, 4, on_logits=lambda c, _: seen.append(c.request.id))
    plan = StepPlan(
        tuple(
            chunk(n, [t], 0, [i], 1) for i, (n, t) in enumerate(zip("abc", [1, 3, 6], strict=True))
        )
    )
    result = executor.run(plan)
    assert [(s.request_id, s.token_ids) for s in result.sampled] == [("a", (1,)), ("c", (6,))]
    assert result.failed == (("b", "request b: the logits after position 0 hold nan at token 5"),)
    assert seen == ["a", "b", "c"]


def test_end_tokens_are_banned_before_min_tokens() -> None:
    params = SamplingParams(temperature=0, min_tokens=1)
    request = Request(RequestId("a"), (6,), params)
    plan = StepPlan((Chunk(request, (6,), 0, (BlockId(0),), 1),))
    result = ModelRunner(Echo(), 4, 4, eos_ids=frozenset({6})).run(plan)
    assert [s.token_ids for s in result.sampled] == [(0,)]


def test_microbatches_sample_the_same_rows() -> None:
    chunks = (chunk("a", [1, 2, 4], 0, [0], 1), chunk("b", [4], 3, [1], 1))
    plain, cut = Echo(), Echo()
    result = ModelRunner(plain, 8, 4).run(StepPlan(chunks))
    assert ModelRunner(cut, 8, 4).run(StepPlan(chunks), microbatches=2) == result
    assert [s.token_ids_T.tolist() for s in cut.steps] == [[1, 2], [4, 4]]
    ModelRunner(cut, 8, 4).run(StepPlan(()), microbatches=3)
    assert [s.token_ids_T.tolist() for s in cut.steps[2:]] == [[], [], []]


class Told:
    """Keeps whose chunks others may read while a step runs."""

    def __init__(self) -> None:
        self.names: list[list[str]] = []

    def begin(self, chunks: Sequence[Chunk], parts: int) -> None:
        self.names.append([chunk.request.id for chunk in chunks])

    def end(self, *, ok: bool) -> None: ...


def test_rows_of_a_group_of_layers_stand_last_and_nobody_reads_them_meanwhile() -> None:
    decoder, told = Echo(), Told()
    runner = ModelRunner(decoder, 8, 4)
    runner.watcher = told
    chunks = (chunk("d", [5], 2, [4], 1), chunk("long", [1, 2, 4], 0, [0], 0))
    some = chunk("some", [6, 7], 0, [1], 0)._replace(layers=LayerGroup(0, 1, 2))
    result = runner.run(StepPlan((*chunks, some)), microbatches=2)
    whole, empty = decoder.steps
    assert whole.token_ids_T.tolist() == [5, 1, 2, 4, 6, 7]
    assert whole.group is not None
    assert (whole.group.rows, whole.group.last) == (2, False)
    assert (len(empty.token_ids_T), empty.group) == (0, None)
    assert [s.request_id for s in result.sampled] == ["d"]
    assert told.names == [["d", "long"]]


def test_a_step_that_cannot_be_packed_fails_its_requests_after_the_decoders_turn() -> None:
    decoder = Echo()
    plan = StepPlan((chunk("a", [1], 9, [0], 1), chunk("b", [2], 0, [1], 1)))
    result = ModelRunner(decoder, 8, 4).run(plan, microbatches=2)
    assert [request_id for request_id, _ in result.failed] == ["a", "b"]
    assert [s.token_ids_T.tolist() for s in decoder.steps] == [[], []]


def test_a_row_that_cannot_be_sampled_fails_one_request() -> None:
    odd = SamplingParams(temperature=0, logit_bias=((V + 5, 1.0),))
    request = Request(RequestId("odd"), (1,), odd)
    plan = StepPlan((Chunk(request, (1,), 0, (BlockId(0),), 1), chunk("b", [2], 0, [1], 1)))
    result = ModelRunner(Echo(), 8, 4).run(plan)
    assert [i for i, _ in result.failed] == ["odd"]
    assert [(s.request_id, s.token_ids) for s in result.sampled] == [("b", (2,))]
