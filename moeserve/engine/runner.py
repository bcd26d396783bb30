"""Runs a planned step on this process's decoder. Owns the KV tensors.

Packs the plan's chunks into one batch, lets the decoder write their KV and return the logits
after the last token of each chunk that is to be sampled, and samples each by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from moeserve.core import Chunk, RequestId, Sampled, StepPlan, StepResult
from moeserve.engine.sampler import sample
from moeserve.errors import InternalError
from moeserve.models.batch import Span, StepBatch, pack_spans

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

    def forward(
        self, step: StepBatch, cache: Cache, observer: StepObserver | None = None
    ) -> Tensor: ...


class LocalExecutor(Generic[Cache]):
    """``on_logits`` sees each sampled chunk with its logits [V], before they are used."""

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

    def run(self, plan: StepPlan) -> StepResult:
        spans = [Span(c.token_ids, c.start, c.blocks, int(c.sample)) for c in plan.chunks]
        step = pack_spans(spans, self._block_size)
        if self._observer is not None:
            self._observer.begin(plan)
        logits_RV = self._decoder.forward(step, self._cache, self._observer)
        if self._observer is not None:
            self._observer.end()
        sampled: list[Sampled] = []
        failed: list[tuple[RequestId, str]] = []
        chosen = [chunk for chunk in plan.chunks if chunk.sample]
        for row, (chunk, logits_V) in enumerate(zip(chosen, logits_RV.numpy(), strict=True)):
            if self._on_logits is not None:
                self._on_logits(chunk, logits_RV[row])
            try:
                sampled.append(sample(logits_V, chunk, self._eos_ids))
            except InternalError as error:
                failed.append((chunk.request.id, error.message))
        return StepResult(tuple(sampled), tuple(failed))
