"""Runs a planned step on this process's decoder. Owns the KV tensors.

Packs the plan's chunks into one batch (``input_batch``), or into microbatches, lets the decoder
write their KV and return the logits after the tokens that are followed by a sampled one, and has
the op table choose these, all at once. What grammars allow is found out meanwhile
(``grammar.masks``). Logits after tokens of a prompt that is scored come with them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from moeserve.core import Chunk, Drafted, RequestId, Sampled, Scored, StepPlan, StepResult
from moeserve.engine.executor import count_accepted
from moeserve.engine.input_batch import InputBatch
from moeserve.engine.layer_states import LayerStates, as_shown
from moeserve.grammar.masks import GrammarMasks, MaskWanted, StepMasks
from moeserve.kernels.ops import Ops
from moeserve.kernels.sampling import SampledRow, SamplingRow, allowing
from moeserve.models.batch import StepBatch, first_rows, split_step

Cache = TypeVar("Cache")


class StepObserver(Protocol):
    """Sees the routing of a step: ``begin``, then ``record`` for each MoE layer, then ``end``.

    ``ids_TC`` has a row for every token of the plan's chunks, in order. Tokens that run in a group
    of layers a step are shown with the last one, for all layers. A step that fails has no ``end``.
    """

    def begin(self, plan: StepPlan) -> None: ...

    def record(self, layer: int, ids_TC: NDArray[Any]) -> None: ...

    def end(self) -> None: ...


class StepWatcher(Protocol):
    """Is told when the layers of a step begin and end to run: its chunks, unless each has one token
    alone. ``parts`` microbatches have tokens; ``ok`` where all layers are done."""

    def begin(self, chunks: Sequence[Chunk], parts: int) -> None: ...

    def end(self, *, ok: bool) -> None: ...


class Unwatched:
    """Where nobody reads KV while a step runs."""

    def begin(self, chunks: Sequence[Chunk], parts: int) -> None: ...

    def end(self, *, ok: bool) -> None: ...


class DraftMaker(Protocol):
    """Guesses what follows the tokens that a step has sampled (``mtp_drafts``)."""

    def forget(self, request_ids: Iterable[RequestId]) -> None: ...

    def forward_micro(
        self,
        steps: Sequence[StepBatch],
        cache: Any,
        observer: StepObserver | None,
        states: list[Tensor],
    ) -> list[Tensor]:
        """The runner's decoder, and the states that ``make`` is to have."""
        ...

    def make(
        self,
        chunks: Sequence[Chunk],
        states: Sequence[Tensor],
        sampled: Collection[Sampled],
        count: int,
    ) -> tuple[Drafted, ...]: ...


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
    Without ``masks`` requests with a grammar fail. ``watcher`` is to be set before the first step.

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
        masks: GrammarMasks | None = None,
        drafts: DraftMaker | None = None,
    ) -> None:
        self.masks = masks or GrammarMasks()
        self.states = LayerStates()
        self.watcher: StepWatcher = Unwatched()
        self._decoder = decoder
        self._batch = InputBatch(block_size)
        self._eos_ids = eos_ids
        self._observer = observer
        self._on_logits = on_logits
        self._drafts = drafts
        self._cache = decoder.new_cache(num_blocks, block_size)
        self._log = logging.getLogger("moeserve.engine")

    @property
    def makes_drafts(self) -> bool:
        """Whether a step does so that is asked to."""
        return self._drafts is not None

    @property
    def cache(self) -> Cache:
        """The KV tensors. Steps write to the blocks of their requests; others may touch only blocks
        that no request writes to."""
        return self._cache

    def run(self, plan: StepPlan, microbatches: int = 1) -> StepResult:
        """A plan without chunks is a step too, for others may have some."""
        try:
            self.forget((*plan.preempted, *plan.ended))
            steps = self._pack(plan, microbatches)
            self.masks.begin(masks_wanted(plan.chunks))
        except Exception:  # noqa: BLE001 - whatever it is, the other ranks wait for this one
            self._log.exception("a step of %d tokens cannot be packed", plan.num_tokens)
            self._decoder.forward_micro(split_step(self._batch.pack(()), microbatches), self._cache)
            return StepResult((), tuple((c.request.id, "its step failed") for c in plan.chunks))
        states: list[Tensor] | None = [] if plan.draft_next and self._drafts else None
        logits = self._forward(plan, steps, states)
        result = self._sample(plan.chunks, logits[0] if len(logits) == 1 else torch.cat(logits))
        return result if states is None else self._with_drafts(plan, states, result)

    def forget(self, request_ids: Collection[RequestId]) -> None:
        """What was kept of requests, whose names others may have from here on."""
        self._batch.forget(request_ids)
        self.states.forget(request_ids)
        self.masks.forget(request_ids)
        if self._drafts is not None:
            self._drafts.forget(request_ids)

    def _with_drafts(
        self, plan: StepPlan, states: Sequence[Tensor], result: StepResult
    ) -> StepResult:
        """The result, and guesses of what follows it: a step is as good without them."""
        assert self._drafts is not None, "asked for before"
        began = time.perf_counter()
        try:
            made = self._drafts.make(plan.chunks, states, result.sampled, plan.draft_next)
        except Exception:  # noqa: BLE001 - whatever it is, the tokens are there
            self._log.exception("nothing could be guessed behind a step")
            self._drafts.forget(chunk.request.id for chunk in plan.chunks)
            return result
        return replace(result, drafted=made, draft_s=time.perf_counter() - began)

    def _pack(self, plan: StepPlan, microbatches: int) -> list[StepBatch]:
        """A step of which some rows run in a group of layers is not cut: the first microbatch has
        all rows."""
        group = self.states.begin(plan.chunks)
        if group is None:
            return split_step(self._batch.pack(plan.chunks, again=True), microbatches)
        step = replace(self._batch.pack(plan.chunks), group=group)
        return [step, *(first_rows(step, 0) for _ in range(microbatches - 1))]

    def _sample(self, chunks: Sequence[Chunk], logits_RV: Tensor) -> StepResult:
        masks = self.masks.take()
        rows = with_masks(self._batch.sampling_rows(chunks), masks)
        if self._on_logits is not None:
            owners = (c for c in chunks for _ in range(len(c.scored) + c.samples))
            for chunk, row, logits_V in zip(owners, rows, logits_RV, strict=True):
                if not row.known:
                    self._on_logits(chunk, logits_V)
        sampled_R = self._decoder.ops.sample(logits_RV, rows, self._eos_ids)
        if not self._batch.scores:
            return accept_all(chunks, sampled_R, masks)
        scored, sampled_R, failed = take_scored(chunks, sampled_R)
        result = accept_all(chunks, sampled_R, masks)
        return replace(result, failed=(*failed, *result.failed), scored=scored)

    def _forward(
        self, plan: StepPlan, steps: Sequence[StepBatch], states: list[Tensor] | None
    ) -> list[Tensor]:
        ok, sizes = False, [len(step.token_ids_T) for step in steps]
        # KV of a group of layers is nobody's before it is there in all.
        long = plan.chunks if sum(sizes) > len(plan.chunks) else ()
        if steps[0].group is not None:
            long = tuple(chunk for chunk in plan.chunks if chunk.layers is None)
        self.watcher.begin(long, sum(size > 0 for size in sizes))
        try:
            rows = self._run_layers(plan, steps, states)
            ok = True
        finally:
            self.watcher.end(ok=ok)
        return rows

    def _run_layers(
        self, plan: StepPlan, steps: Sequence[StepBatch], states: list[Tensor] | None
    ) -> list[Tensor]:
        if self._observer is not None:
            self._observer.begin(as_shown(plan))
        rows = self._forward_micro(steps, self._observer, states)
        if self._observer is not None:
            self._observer.end()
        if steps[0].group is not None:
            self.states.end(plan.chunks, steps[0].group)
        return rows

    def _forward_micro(
        self,
        steps: Sequence[StepBatch],
        observer: StepObserver | None,
        states: list[Tensor] | None,
    ) -> list[Tensor]:
        if states is None:
            return self._decoder.forward_micro(steps, self._cache, observer)
        assert self._drafts is not None, "who else wants states"
        return self._drafts.forward_micro(steps, self._cache, observer, states)


def masks_wanted(chunks: Iterable[Chunk]) -> list[MaskWanted]:
    """Of those whose grammars say which token may follow. They have no drafts."""
    wanted = []
    for chunk in chunks:
        if chunk.samples and chunk.request.params.grammar is not None:
            assert chunk.samples == 1, f"{chunk.request.id} has a grammar, and drafts"
            wanted.append(MaskWanted(chunk.request, chunk.output_ids))
    return wanted


def with_masks(rows: list[SamplingRow], masks: StepMasks) -> list[SamplingRow]:
    """The rows, of which some allow no more than their masks."""
    if not masks.allowed:
        return rows
    allowed = masks.allowed.get
    return [row if row.known else allowing(row, allowed(row.request_id)) for row in rows]


def accept_all(
    chunks: Sequence[Chunk], sampled_R: Sequence[SampledRow], masks: StepMasks
) -> StepResult:
    """From the rows of the chunks' samples; those that have no mask have failed."""
    made: list[Sampled] = []
    failed: list[tuple[RequestId, str]] = []
    refused, told = masks.failed, set(masks.failed) - masks.unserved
    new, at = tuple.__new__, 0
    for chunk in chunks:
        count = chunk.samples
        if count == 1:  # no drafts, as nearly always
            token_id, logprobs, problem, asked = sampled_R[at]
            if not problem and chunk.request.id not in refused:
                scores = () if logprobs is None else (logprobs,)
                made.append(new(Sampled, (chunk.request.id, (token_id,), scores)))
        elif count:
            rows = sampled_R[at : at + count]
            found = accept(chunk, rows)
            problem = found if isinstance(found, str) else ""
            asked = any(row.asked and row.failure == problem for row in rows)
            if isinstance(found, Sampled):
                made.append(found)
        else:
            continue
        if problem and chunk.request.id not in refused:
            failed.append((chunk.request.id, problem))
            if asked:
                told.add(chunk.request.id)
        at += count
    return StepResult(tuple(made), (*failed, *refused.items()), told=frozenset(told))


def accept(chunk: Chunk, sampled: Sequence[SampledRow]) -> Sampled | str:
    """The tokens of a chunk's rows, up to the first that is not the draft; or why a row that
    counts has none."""
    count = count_accepted(chunk.draft_ids, [row.token_id for row in sampled])
    for row in sampled[:count]:
        if row.failure:
            return row.failure
    token_ids = tuple(row.token_id for row in sampled[:count])
    scores = tuple(row.logprobs for row in sampled[:count] if row.logprobs is not None)
    return Sampled(chunk.request.id, token_ids, scores)


def take_scored(
    chunks: Sequence[Chunk], sampled: Sequence[SampledRow]
) -> tuple[tuple[Scored, ...], list[SampledRow], list[tuple[RequestId, str]]]:
    """What chunks scored, the rows of their samples, and the requests that failed without any.

    A chunk with a scored row that failed has nothing else: its samples fail likewise.
    """
    scored: list[Scored] = []
    left: list[SampledRow] = []
    failed: list[tuple[RequestId, str]] = []
    at = 0
    for chunk in chunks:
        middle = at + len(chunk.scored)
        known, at = sampled[at:middle], middle + chunk.samples
        problem = next((row.failure for row in known if row.failure), "")
        if problem:
            left += [SampledRow(failure=problem)] * chunk.samples
            if not chunk.samples:
                failed.append((chunk.request.id, problem))
            continue
        left += sampled[middle:at]
        if known:
            found = tuple(row.logprobs for row in known if row.logprobs is not None)
            scored.append(Scored(chunk.request.id, found))
    return tuple(scored), left, failed
