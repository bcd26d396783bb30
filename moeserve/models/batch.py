"""One forward pass as tensors: which tokens, at which positions, reading and writing which slots.

Pure packing of ``Span``; knows nothing of requests (``engine.input_batch`` packs those that come
again). Letters: T tokens, S sequences, M blocks of
the longest, R rows whose logits are wanted.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeserve.kernels.ops import AttentionBatch


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of one sequence, from position ``start``.

    ``blocks`` hold the KV of everything before, and have room for these tokens. Logits are wanted
    of the last ``logits`` of them.
    """

    token_ids: Sequence[int]
    start: int
    blocks: Sequence[int]
    logits: int = 1


@dataclass(slots=True)
class KeptPass:
    """What a decoder makes once of a step that comes again: ``run`` gives the logits with
    ``cache``, and leaves what the layers give in ``states_TH``, where there is one."""

    decoder: Any = None
    cache: Any = None
    states_TH: Tensor | None = None
    run: Callable[[], Tensor] | None = None


@dataclass(slots=True)
class GroupPass:
    """Of a step the last ``rows`` rows, which run in layers ``start .. stop - 1`` alone; the others
    run in all. ``last`` where no layers come after.

    ``states_PH`` is the residual stream of these rows: before the pass behind the layers before
    (None where there are none), after it behind these (None where no layers come after). Where an
    observer looks on, ``routed`` has the rows' choices so far, ids_PC by layer.
    """

    start: int
    stop: int
    last: bool
    rows: int
    states_PH: Tensor | None = None
    routed: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepBatch:
    """All int64, but for those in ``attention``. ``slot`` is block * block_size + offset.

    With ``kept`` it comes again, with other numbers in the same tensors. With ``group`` some of its
    rows do not run in all layers.
    """

    token_ids_T: Tensor
    positions_T: Tensor
    slot_T: Tensor
    attention: AttentionBatch
    logit_rows_R: Tensor
    kept: KeptPass | None = None
    group: GroupPass | None = None

    @property
    def decodes(self) -> bool:
        """Whether it is one token of each sequence, of which there are some, all with logits."""
        tokens = len(self.token_ids_T)
        return 0 < tokens == len(self.attention.context_S) == len(self.logit_rows_R)


def split_spans(spans: Sequence[Span], parts: int) -> list[list[Span]]:
    """The same tokens in the same order, cut into as many parts, whose sizes differ by one at most.

    A span whose tokens fall into several parts is cut: its beginning is in the earlier one.
    """
    if parts == 1:
        return [list(spans)]
    total = sum(len(span.token_ids) for span in spans)
    cut: list[list[Span]] = [[] for _ in range(parts)]
    part, done, end = -1, 0, 0  # the part being filled ends after so many tokens
    for span in spans:
        at, size = 0, len(span.token_ids)
        while at < size:
            while done == end:
                part += 1
                end = total * (part + 1) // parts
            stop = min(size, at + end - done)
            wanted = max(0, stop - max(at, size - span.logits))
            cut[part].append(Span(span.token_ids[at:stop], span.start + at, span.blocks, wanted))
            done += stop - at
            at = stop
    return cut


def split_step(step: StepBatch, parts: int) -> list[StepBatch]:
    """``split_spans`` of a step that is packed. The parts are views of it."""
    if parts == 1:
        return [step]
    ids_T, starts_S1 = step.token_ids_T, step.attention.query_start_S1.numpy()
    positions_T, rows_R = step.positions_T.numpy(), step.logit_rows_R.numpy()
    borders = [len(ids_T) * part // parts for part in range(parts + 1)]
    return [
        _slice(step, starts_S1, positions_T, rows_R, begin, end)
        for begin, end in itertools.pairwise(borders)
    ]


def first_rows(step: StepBatch, count: int) -> StepBatch:
    """The step's first ``count`` rows, which are views of it."""
    starts_S1 = step.attention.query_start_S1.numpy()
    positions_T, rows_R = step.positions_T.numpy(), step.logit_rows_R.numpy()
    return _slice(step, starts_S1, positions_T, rows_R, 0, count)


def _slice(
    step: StepBatch,
    starts_S1: NDArray[np.int32],
    positions_T: NDArray[np.int64],
    rows_R: NDArray[np.int64],
    begin: int,
    end: int,
) -> StepBatch:
    """The tokens ``begin .. end - 1`` of a step, with what the arrays beside it hold."""
    first = int(np.searchsorted(starts_S1, begin, side="right")) - 1
    last = int(np.searchsorted(starts_S1, end)) if begin < end else first
    query_start_S1 = starts_S1[first : last + 1].clip(begin, end) - np.int32(begin)
    wanted = slice(*np.searchsorted(rows_R, (begin, end)).tolist())
    attention = AttentionBatch(
        torch.from_numpy(query_start_S1),
        torch.from_numpy((positions_T[begin + query_start_S1[1:] - 1] + 1).astype(np.int32)),
        step.attention.blocks_SM[first:last],
    )
    return StepBatch(
        step.token_ids_T[begin:end],
        step.positions_T[begin:end],
        step.slot_T[begin:end],
        attention,
        torch.from_numpy(rows_R[wanted] - begin),
    )


def pack_spans(spans: Sequence[Span], block_size: int) -> StepBatch:
    """Sequences one after the other, each with its tokens in order; there may be none."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    rows: list[int] = []
    starts, contexts = [0], []
    tables: list[int] = []
    for span in spans:
        end = span.start + len(span.token_ids)
        ids.extend(span.token_ids)
        positions.extend(range(span.start, end))
        slots.extend(
            span.blocks[p // block_size] * block_size + p % block_size
            for p in range(span.start, end)
        )
        rows.extend(range(len(ids) - span.logits, len(ids)))
        starts.append(len(ids))
        contexts.append(end)
    # Two tensors, cut into views: each further one would cost as much as all this.
    wide = torch.tensor([*ids, *positions, *slots, *rows], dtype=torch.int64)
    ids_T, positions_T, slot_T, rows_R = wide.split_with_sizes(
        [len(ids), len(ids), len(ids), len(rows)]
    )
    width = max((len(s.blocks) for s in spans), default=0)
    for span in spans:
        tables += span.blocks
        tables += [0] * (width - len(span.blocks))
    narrow = torch.tensor([*starts, *contexts, *tables], dtype=torch.int32)
    starts_S1, context_S, blocks = narrow.split_with_sizes(
        [len(starts), len(contexts), len(tables)]
    )
    attention = AttentionBatch(starts_S1, context_S, blocks.view(len(spans), width))
    return StepBatch(ids_T, positions_T, slot_T, attention, rows_R)
