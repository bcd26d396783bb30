"""Runs a planned step on this process's decoder. Owns the KV tensors.

Packs the plan's chunks into one batch, or into microbatches, lets the decoder write their KV and
return the logits after the tokens that are followed by a sampled one, and has the op table choose
these, all at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from moeserve.core import Chunk, RequestId, Sampled, StepPlan, StepResult
from moeserve.engine.executor import count_accepted
from moeserve.kernels.ops import Ops
from moeserve.kernels.sampling import SampledRow, SamplingRow
from moeserve.models.batch import Span, StepBatch, pack_spans, split_spans

Cache = TypeVar("Cache")


class StepObserver(Protocol):
    """Sees the routing of a step: ``begin``, then ``record`` for each MoE layer, then ``end``.

    ``ids_TC`` has a row for every token of the plan's chunks, in order. A step that fails has no
    ``end``.
    """

    def begin(self, plan: StepPlan) -> None: ...

    def record(self, layer: int, ids_TC: NDArray[Any]) -> None: ...

    def end(self) -> None: ...


class Forward(Protocol[Cache]):
    """The part of a decoder that is needed here."""

    @property
    def ops(self) -> Ops: ...

    def new_cache(self, num_blocks: int, block_size: int) -> Cache: ...

    def forward_micro(
        self, steps: Sequence[StepBatch], cache: Cache, observer: StepObserver | None = None
    ) -> list[Tensor]: ...


class ModelRunner(Generic[Cache]):
    """``on_logits`` sees every row of logits [V] that a token is sampled from, with its chunk.

    As one rank of a group it must not fall out of step with the others: what goes wrong before or
    after the decoder's turn fails requests, and the decoder has its turn all the same.
    """

    def __init__(
        self,
        decoder: Forward[Cache],
        num_blocks: int,
        block_size: int,
        eos_ids: frozenset[int] = frozenset(),
        observer: StepObserver | None = None,
        on_logits: Callable[[Chunk, Tensor], None] | None = None,
    ) -> None:
        self._decoder = decoder
        self._block_size = block_size
        self._eos_ids = eos_ids
        self._observer = observer
        self._on_logits = on_logits
        self._cache = decoder.new_cache(num_blocks, block_size)
        self._log = logging.getLogger("moeserve.engine")

    def run(self, plan: StepPlan, microbatches: int = 1) -> StepResult:
        """A plan without chunks is a step too, for others may have some."""
        try:
            steps = self._pack(plan.chunks, microbatches)
        except Exception:  # noqa: BLE001 - whatever it is, the other ranks wait for this one
            self._log.exception("a step of %d tokens cannot be packed", plan.num_tokens)
            self._decoder.forward_micro(self._pack((), microbatches), self._cache)
            return StepResult((), tuple((c.request.id, "its step failed") for c in plan.chunks))
        logits = self._forward(plan, steps)
        return self._sample(plan.chunks, logits[0] if len(logits) == 1 else torch.cat(logits))

    def _pack(self, chunks: Sequence[Chunk], microbatches: int) -> list[StepBatch]:
        spans = [Span(c.token_ids, c.start, c.blocks, c.samples) for c in chunks]
        return [pack_spans(part, self._block_size) for part in split_spans(spans, microbatches)]

    def _sample(self, chunks: Sequence[Chunk], logits_RV: Tensor) -> StepResult:
        rows = [(chunk, row) for chunk in chunks for row in sampling_rows(chunk)]
        if self._on_logits is not None:
            for (chunk, _), logits_V in zip(rows, logits_RV, strict=True):
                self._on_logits(chunk, logits_V)
        sampled_R = self._decoder.ops.sample(logits_RV, [row for _, row in rows], self._eos_ids)
        made: list[Sampled] = []
        failed: list[tuple[RequestId, str]] = []
        at = 0
        for chunk in chunks:
            if not chunk.samples:
                continue
            found = accept(chunk, sampled_R[at : at + chunk.samples])
            at += chunk.samples
            if isinstance(found, Sampled):
                made.append(found)
            else:
                failed.append((chunk.request.id, found))
        return StepResult(tuple(made), tuple(failed))

    def _forward(self, plan: StepPlan, steps: Sequence[StepBatch]) -> list[Tensor]:
        if self._observer is None:
            return self._decoder.forward_micro(steps, self._cache)
        self._observer.begin(plan)
        rows = self._decoder.forward_micro(steps, self._cache, self._observer)
        self._observer.end()
        return rows


def sampling_rows(chunk: Chunk) -> Iterator[SamplingRow]:
    """One for each of the chunk's samples, as if the drafts before it were right."""
    request, output_ids = chunk.request, chunk.output_ids
    for i in range(chunk.samples):
        history = (*output_ids, *chunk.draft_ids[:i]) if i else output_ids
        yield SamplingRow(request.id, request.params, request.prompt_ids, history)


def accept(chunk: Chunk, sampled: Sequence[SampledRow]) -> Sampled | str:
    """The tokens of a chunk's rows, up to the first that is not the draft; or why a row that
    counts has none."""
    if len(sampled) == 1:  # no drafts, as nearly always
        (token_id, logprobs, failure) = sampled[0]
        kept = () if logprobs is None else (logprobs,)
        return failure or Sampled(chunk.request.id, (token_id,), kept)
    count = count_accepted(chunk.draft_ids, [row.token_id for row in sampled])
    for row in sampled[:count]:
        if row.failure:
            return row.failure
    token_ids = tuple(row.token_id for row in sampled[:count])
    scores = tuple(row.logprobs for row in sampled[:count] if row.logprobs is not None)
    return Sampled(chunk.request.id, token_ids, scores)
