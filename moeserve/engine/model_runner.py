"""Runs a planned step on this process's decoder. Owns the KV tensors.

Packs the plan's chunks into one batch, or into microbatches, lets the decoder write their KV and
return the logits after the last token of each chunk that is to be sampled, and samples each by
itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from moeserve.core import Chunk, RequestId, Sampled, StepPlan, StepResult
from moeserve.engine.sampler import sample
from moeserve.errors import InternalError
from moeserve.models.batch import Span, StepBatch, pack_spans, split_spans

Cache = TypeVar("Cache")


class StepObserver(Protocol):
    """Sees the routing of a step: ``begin``, then ``record`` for each MoE layer, then ``end``.

    ``ids_TC`` has a row for every token of the plan's chunks, in order. A step that fails has no
    ``end``.
    """

    def begin(self, plan: StepPlan) -> None: ...

    def record(self, layer: int, ids_TC: Tensor) -> None: ...

    def end(self) -> None: ...


class Forward(Protocol[Cache]):
    """The part of a decoder that is needed here."""

    def new_cache(self, num_blocks: int, block_size: int) -> Cache: ...

    def forward_micro(
        self, steps: Sequence[StepBatch], cache: Cache, observer: StepObserver | None = None
    ) -> list[Tensor]: ...


class ModelRunner(Generic[Cache]):
    """``on_logits`` sees each sampled chunk with its logits [V], before they are used.

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
        rows = self._forward(plan, steps)
        chosen = [chunk for chunk in plan.chunks if chunk.sample]
        sampled: list[Sampled] = []
        failed: list[tuple[RequestId, str]] = []
        for chunk, logits_V in zip(chosen, chain.from_iterable(rows), strict=True):
            if self._on_logits is not None:
                self._on_logits(chunk, logits_V)
            try:
                sampled.append(sample(logits_V.numpy(), chunk, self._eos_ids))
            except InternalError as error:
                failed.append((chunk.request.id, error.message))
            except Exception:  # noqa: BLE001 - a row that cannot be sampled ends one request
                self._log.exception("request %s cannot be sampled", chunk.request.id)
                failed.append((chunk.request.id, f"request {chunk.request.id}: sampling failed"))
        return StepResult(tuple(sampled), tuple(failed))

    def _pack(self, chunks: Sequence[Chunk], microbatches: int) -> list[StepBatch]:
        spans = [Span(c.token_ids, c.start, c.blocks, int(c.sample)) for c in chunks]
        return [pack_spans(part, self._block_size) for part in split_spans(spans, microbatches)]

    def _forward(self, plan: StepPlan, steps: Sequence[StepBatch]) -> list[Tensor]:
        if self._observer is None:
            return self._decoder.forward_micro(steps, self._cache)
        self._observer.begin(plan)
        rows = self._decoder.forward_micro(steps, self._cache, self._observer)
        self._observer.end()
        return rows
