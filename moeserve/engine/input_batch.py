"""What a model runner keeps of its requests from step to step, so that a step packs what changed.

The block table of every request is a row of one array, and what the sampler needs of it is made
once. As long as steps run the same requests in the same order, they also share one array of block
tables, to which new blocks are added. A request is known again by the identity of what its chunks
hold (see ``Chunk``), so new blocks and an id that returns are noticed without anybody telling.
``models.batch.pack_spans`` packs the same from nothing: it is the twin in tests.

Steps that were packed stay as they are: what they share is only ever added to. Whoever is done with
a step before the next is packed says so (``again``): where the same requests have one token each
time after time, or the newest and drafts, as many as some time before, it gets the same tensors
with other numbers in them, of which a decoder keeps what it has made (``StepBatch.kept``).

Letters: T tokens, S chunks, N rows, M blocks of the longest, R rows whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from operator import is_
from struct import Struct
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeserve.core import BlockId, Chunk, Request, RequestId
from moeserve.errors import InternalError
from moeserve.kernels.ops import AttentionBatch
from moeserve.kernels.sampling import SamplingRow, sampling_row
from moeserve.models.batch import KeptPass, StepBatch

Ints = NDArray[np.int64]

FIRST_ROWS, FIRST_BLOCKS = 16, 64
# Blocks by which all requests of a step can grow before their tables are copied together again.
SPARE_BLOCKS = 8
# Decodes that are packed without arrays.
FEW = 12
# Of the same requests: numbers of drafts of each whose tensors are kept.
MOST_KEPT = 8


@dataclass(slots=True)
class _Held:
    """A request as it was in its last chunk; ``blocks`` are in row ``row`` of the tables."""

    request: Request
    output_ids: Sequence[int]
    blocks: tuple[BlockId, ...]
    row: int
    sampling: SamplingRow


@dataclass(frozen=True, slots=True)
class _KeptStep:
    """``step``, and where its numbers lie: ids, positions, slots and contexts one after the other
    in ``memory``, as ``packed`` says."""

    step: StepBatch
    memory: bytearray
    packed: Struct
    ids_S: Ints
    positions_S: Ints
    slots_S: Ints
    contexts_S: NDArray[np.int32]


@dataclass(slots=True)
class _Composition:
    """The requests of a step, in order, and what steps of the same ones share.

    ``rooms_S`` are the tokens that the blocks of each can hold. ``tables`` and ``rows_S`` are the
    tensors of ``tables_SM`` and ``index_S``; ``starts_S1`` is for one token each. ``kept`` is made
    when they come ``again`` with one token each, ``checked`` by how many tokens each has whose
    drafts are checked.
    """

    requests: tuple[Request, ...]
    output_ids: tuple[Sequence[int], ...]
    blocks: tuple[tuple[BlockId, ...], ...]
    sampling: list[SamplingRow]
    tables_SM: NDArray[np.int32]
    rooms_S: Ints
    index_S: Ints
    tables: Tensor
    rows_S: Tensor
    starts_S1: Tensor
    checked: dict[tuple[int, ...], _KeptStep]
    again: bool = False
    kept: _KeptStep | None = None

    def matches(self, requests: Sequence[Request], output_ids: Sequence[Sequence[int]]) -> bool:
        """Whether these are the same requests in the same order."""
        return (
            len(requests) == len(self.requests)
            and all(map(is_, requests, self.requests))
            and all(map(is_, output_ids, self.output_ids))
        )


class InputBatch:
    """Owns the block tables of a runner's requests, whose blocks have ``block_size`` tokens."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._held: dict[RequestId, _Held] = {}
        self._free_rows: list[int] = []
        self._tables_NM: NDArray[np.int32] = np.zeros((0, FIRST_BLOCKS), np.int32)
        self._composition = self._compose(())
        self.scores = False  # whether chunks that were packed last score something
        self._one_each = True  # of what was packed last

    @property
    def num_rows(self) -> int:
        """Requests for which there is room before the tables grow."""
        return len(self._tables_NM)

    def forget(self, request_ids: Iterable[RequestId]) -> None:
        """Their rows can be used again; ids that are not known are left out."""
        for request_id in request_ids:
            held = self._held.pop(request_id, None)
            if held is not None:
                self._free_rows.append(held.row)
                self._composition = self._compose(())

    def pack(self, chunks: Sequence[Chunk], *, again: bool = False) -> StepBatch:
        """The chunks one after the other, each with its tokens in order; there may be none.

        With ``again`` what the last call gave is not needed any more.
        InternalError where a chunk's blocks have no room for its tokens.
        """
        columns = tuple(zip(*chunks, strict=True)) or ((),) * len(Chunk._fields)
        _, token_ids, starts, blocks, samples, *_ = columns
        composition = self._bring_up(chunks, columns)
        total = sum(map(len, token_ids))
        self._one_each = samples.count(1) == len(chunks)
        decodes = total == len(chunks) and self._one_each
        self.scores = not decodes and any(chunk.scored for chunk in chunks)
        if again and decodes and total:
            if composition.again:
                return self._refill(composition, token_ids, starts, blocks)
            composition.again = True  # requests that come once are not worth it
        if decodes and total <= FEW:
            return self._pack_few(composition, token_ids, starts, blocks)
        counts = tuple(map(len, token_ids))
        if not decodes and 0 < total <= FEW and samples == counts and not self.scores:
            return self._pack_checked(composition, token_ids, starts, blocks, again)
        ids_T = np.fromiter(chain.from_iterable(token_ids), np.int64, total)
        positions_T = np.array(starts, np.int64)
        if decodes:
            contexts_S, index_T = positions_T + 1, composition.index_S
            starts_S1, rows_R = composition.starts_S1, composition.rows_S
        else:
            counts_S = np.fromiter(map(len, token_ids), np.int64, len(chunks))
            ends_S, contexts_S = counts_S.cumsum(), positions_T + counts_S
            positions_T = np.arange(total) + (contexts_S - ends_S).repeat(counts_S)
            index_T = composition.index_S.repeat(counts_S)
            starts_S1 = torch.from_numpy(np.append(0, ends_S).astype(np.int32))
            rows = wanted_rows(np.array(samples, np.int64), ends_S)
            if self.scores:
                rows = np.sort(np.concatenate((rows, scored_rows(chunks))))
            rows_R = torch.from_numpy(rows)
        size = self._block_size
        if (contexts_S > composition.rooms_S).any():
            raise InternalError(no_room(blocks, contexts_S.tolist(), composition.requests, size))
        slot_T = composition.tables_SM[index_T, positions_T // size] * np.int64(size)
        slot_T += positions_T % size
        return StepBatch(
            torch.from_numpy(ids_T),
            torch.from_numpy(positions_T),
            torch.from_numpy(slot_T),
            AttentionBatch(
                starts_S1, torch.from_numpy(contexts_S.astype(np.int32)), composition.tables
            ),
            rows_R,
        )

    def _pack_few(
        self,
        composition: _Composition,
        token_ids: Iterable[tuple[int, ...]],
        starts: Sequence[int],
        blocks: Sequence[tuple[BlockId, ...]],
    ) -> StepBatch:
        """One token each of so few that array operations take longer than the interpreter."""
        slots = self._slots_of_few(composition, starts, blocks)
        numbers = torch.from_numpy(np.array([*chain(*token_ids), *starts, *slots], np.int64))
        contexts_S = torch.from_numpy(np.array([start + 1 for start in starts], np.int32))
        return _step_of(composition, numbers, contexts_S, None)

    def _slots_of_few(
        self,
        composition: _Composition,
        starts: Sequence[int],
        blocks: Sequence[tuple[BlockId, ...]],
    ) -> list[int]:
        size, slots = self._block_size, []
        for table, start in zip(blocks, starts, strict=True):
            if len(table) * size <= start:
                contexts = [start + 1 for start in starts]
                raise InternalError(no_room(blocks, contexts, composition.requests, size))
            slots.append(table[start // size] * size + start % size)
        return slots

    def _refill(
        self,
        composition: _Composition,
        token_ids: Iterable[tuple[int, ...]],
        starts: Sequence[int],
        blocks: Sequence[tuple[BlockId, ...]],
    ) -> StepBatch:
        """One token each, into tensors that were there before."""
        size, kept = self._block_size, composition.kept
        if kept is None:
            kept = composition.kept = _new_kept(composition, (1,) * len(starts))
        if len(starts) <= FEW:
            slots = self._slots_of_few(composition, starts, blocks)
            contexts = [start + 1 for start in starts]
            kept.packed.pack_into(kept.memory, 0, *chain(*token_ids, starts, slots, contexts))
            return kept.step
        positions_S, slots_S = kept.positions_S, kept.slots_S
        kept.ids_S[:] = [*chain.from_iterable(token_ids)]
        positions_S[:] = starts
        if (positions_S >= composition.rooms_S).any():
            contexts = [start + 1 for start in starts]
            raise InternalError(no_room(blocks, contexts, composition.requests, size))
        blocks_S, inner_S = np.divmod(positions_S, size)
        slots_S[:] = composition.tables_SM[composition.index_S, blocks_S]
        slots_S *= size
        slots_S += inner_S
        np.add(positions_S, 1, out=kept.contexts_S, casting="unsafe")
        return kept.step

    def _pack_checked(
        self,
        composition: _Composition,
        token_ids: Sequence[tuple[int, ...]],
        starts: Sequence[int],
        blocks: Sequence[tuple[BlockId, ...]],
        again: bool,
    ) -> StepBatch:
        """Newest tokens with drafts, of so few that array operations take longer."""
        size, counts = self._block_size, tuple(map(len, token_ids))
        contexts = [start + count for start, count in zip(starts, counts, strict=True)]
        positions: list[int] = []
        slots: list[int] = []
        for table, start, context in zip(blocks, starts, contexts, strict=True):
            if len(table) * size < context:
                raise InternalError(no_room(blocks, contexts, composition.requests, size))
            positions += range(start, context)
            slots += [table[p // size] * size + p % size for p in range(start, context)]
        kept = composition.checked.get(counts) if again else None
        if kept is None:
            keeps = again and len(composition.checked) < MOST_KEPT
            kept = _new_kept(composition, counts, keeps=keeps)
            if keeps:
                composition.checked[counts] = kept
        ids = chain.from_iterable(token_ids)
        kept.packed.pack_into(kept.memory, 0, *ids, *positions, *slots, *contexts)
        return kept.step

    def sampling_rows(self, chunks: Sequence[Chunk]) -> list[SamplingRow]:
        """One for each of the rows of the chunks that were packed last: of each chunk those that
        it scores, then its samples."""
        rows = self._composition.sampling
        if self._one_each and not self.scores:
            return rows
        return [
            row
            for chunk, first in zip(chunks, rows, strict=True)
            for row in (
                *(first._replace(known=p + 1, takes_best=False) for p in chunk.scored),
                *((first,) if chunk.samples == 1 else draft_rows(chunk, first)),
            )
        ]

    def _bring_up(
        self, chunks: Sequence[Chunk], columns: Sequence[tuple[Any, ...]]
    ) -> _Composition:
        """The composition of these chunks: the last one as far as that is possible."""
        requests, _, _, blocks, _, output_ids, *_ = columns
        composition = self._composition
        if not composition.matches(requests, output_ids):
            composition = self._composition = self._compose(chunks)
        elif not all(map(is_, blocks, composition.blocks)):
            for s, (chunk, old) in enumerate(zip(chunks, composition.blocks, strict=True)):
                new = chunk.blocks
                if new is old:
                    continue
                self._update(self._held[chunk.request.id], chunk)
                if len(new) > composition.tables_SM.shape[1] or new[: len(old)] != old:
                    composition = self._composition = self._compose(chunks)
                    break
                composition.tables_SM[s, len(old) : len(new)] = new[len(old) :]
                composition.rooms_S[s] = len(new) * self._block_size
            composition.blocks = blocks
        return composition

    def _compose(self, chunks: Sequence[Chunk]) -> _Composition:
        """From what is held of the chunks' requests, once it is up to date."""
        held = [self._look_up(chunk) for chunk in chunks]
        width = max((len(h.blocks) for h in held), default=0)
        tables_SM = np.zeros((len(held), width + SPARE_BLOCKS if held else 0), np.int32)
        if held:
            tables_SM[:, :width] = self._tables_NM[[h.row for h in held], :width]
        index_S = np.arange(len(held))
        return _Composition(
            tuple(h.request for h in held),
            tuple(h.output_ids for h in held),
            tuple(h.blocks for h in held),
            [h.sampling for h in held],
            tables_SM,
            np.array([len(h.blocks) * self._block_size for h in held], np.int64),
            index_S,
            torch.from_numpy(tables_SM),
            torch.from_numpy(index_S),
            torch.arange(len(held) + 1, dtype=torch.int32),
            {},
        )

    def _look_up(self, chunk: Chunk) -> _Held:
        held = self._held.get(chunk.request.id)
        if (
            held is not None
            and held.blocks is chunk.blocks
            and held.output_ids is chunk.output_ids
            and held.request is chunk.request
        ):
            return held
        return self._update(held, chunk)

    def _update(self, held: _Held | None, chunk: Chunk) -> _Held:
        """Take note of a chunk's request; of its block table only what is new is written."""
        request, blocks = chunk.request, chunk.blocks
        if held is None:
            row, same = self._take_row(), 0
        else:
            row, same = held.row, len(held.blocks)
            if held.blocks != blocks[:same]:
                same = 0
        if len(blocks) > self._tables_NM.shape[1]:
            self._resize(len(self._tables_NM), 2 * len(blocks))
        self._tables_NM[row, same : len(blocks)] = blocks[same:]
        sampling = sampling_row(request.id, request.params, request.prompt_ids, chunk.output_ids)
        new = _Held(request, chunk.output_ids, blocks, row, sampling)
        self._held[request.id] = new
        return new

    def _take_row(self) -> int:
        if not self._free_rows:
            rows, width = self._tables_NM.shape
            self._resize(max(FIRST_ROWS, 2 * rows), width)
            self._free_rows.extend(range(len(self._tables_NM) - 1, rows - 1, -1))
        return self._free_rows.pop()

    def _resize(self, rows: int, width: int) -> None:
        old = self._tables_NM
        self._tables_NM = np.zeros((rows, width), np.int32)
        self._tables_NM[: len(old), : old.shape[1]] = old


def _step_of(
    composition: _Composition,
    numbers: Tensor,
    contexts_S: Tensor,
    kept: KeptPass | None,
    starts_S1: Tensor | None = None,
) -> StepBatch:
    """Ids, positions and slots are ``numbers``, one after the other, of one token each unless
    ``starts_S1`` says otherwise; the rows of all are wanted."""
    ids_T, positions_T, slot_T = numbers.split_with_sizes([len(numbers) // 3] * 3)
    rows_R = composition.rows_S if starts_S1 is None else torch.arange(len(ids_T))
    starts_S1 = composition.starts_S1 if starts_S1 is None else starts_S1
    attention = AttentionBatch(starts_S1, contexts_S, composition.tables)
    return StepBatch(ids_T, positions_T, slot_T, attention, rows_R, kept)


def _new_kept(composition: _Composition, counts: Sequence[int], *, keeps: bool = True) -> _KeptStep:
    """Of a step in which each has so many tokens."""
    total = sum(counts)
    packed = Struct(f"={3 * total}q{len(counts)}i")
    memory = bytearray(packed.size)
    numbers = np.frombuffer(memory, np.int64, 3 * total)
    contexts_S = np.frombuffer(memory, np.int32, offset=numbers.nbytes)
    starts_S1 = None
    if total > len(counts):
        starts_S1 = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
    tensors = torch.from_numpy(numbers), torch.from_numpy(contexts_S)
    step = _step_of(composition, *tensors, KeptPass() if keeps else None, starts_S1)
    ids_S, positions_S, slots_S = numbers.reshape(3, total)
    return _KeptStep(step, memory, packed, ids_S, positions_S, slots_S, contexts_S)


def no_room(
    blocks: Sequence[tuple[BlockId, ...]],
    contexts: Sequence[int],
    requests: Sequence[Request],
    block_size: int,
) -> str:
    """Says whose blocks end before their tokens."""
    return "; ".join(
        f"request {request.id}: {len(table)} blocks of {block_size} tokens have no room for "
        f"position {context - 1}"
        for table, context, request in zip(blocks, contexts, requests, strict=True)
        if context > len(table) * block_size
    )


def wanted_rows(samples_S: Ints, ends_S: Ints) -> Ints:
    """The last ``samples_S[s]`` of the rows that end before ``ends_S[s]``, for all s in order."""
    behind_S = samples_S.cumsum()
    wanted_R: Ints = np.arange(samples_S.sum()) + (ends_S - behind_S).repeat(samples_S)
    return wanted_R


def scored_rows(chunks: Sequence[Chunk]) -> Ints:
    """The rows of the positions that chunks score, where each chunk's rows follow those before."""
    rows: list[int] = []
    begin = 0
    for chunk in chunks:
        rows += (begin + position - chunk.start for position in chunk.scored)
        begin += len(chunk.token_ids)
    return np.array(rows, np.int64)


def draft_rows(chunk: Chunk, first: SamplingRow) -> list[SamplingRow]:
    """One for each of a chunk's samples, as if the drafts before it were right: ``first``, and the
    same with more tokens before it."""
    if chunk.samples < 2:
        return [first] * chunk.samples
    output_ids, draft_ids = tuple(chunk.output_ids), chunk.draft_ids
    new, (request_id, params, prompt_ids, _, *rest) = tuple.__new__, first
    rows = [first]
    for i in range(1, chunk.samples):
        history = output_ids + draft_ids[:i]
        rows.append(new(SamplingRow, (request_id, params, prompt_ids, history, *rest)))
    return rows
