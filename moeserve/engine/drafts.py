"""Draft tokens behind the newest ones, as many as fit. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.policies import Drafter
from moeserve.engine.sequence import SequenceState
from moeserve.engine.step_builder import StepBuilder


def add_with_drafts(
    builder: StepBuilder,
    generating: Sequence[SequenceState],
    drafter: Drafter,
    pool: BlockPool,
    config: SchedulerConfig,
) -> None:
    """One token each, and drafts as far as the others' one token leaves room."""
    others = len(generating)
    for seq in generating:
        others -= 1
        builder.add(seq, _drafts(seq, builder.budget - 1 - others, drafter, pool, config))


def _drafts(
    seq: SequenceState, most: int, drafter: Drafter, pool: BlockPool, config: SchedulerConfig
) -> tuple[int, ...]:
    """Guesses that fit: into the step, the answer, and blocks that nobody else needs now."""
    size, params = pool.block_size, seq.request.params
    room = (len(seq.blocks) + pool.num_free) * size - len(seq)
    answer = min(params.max_tokens - len(seq.output_ids), config.max_model_len - len(seq))
    most = max(0, min(most, room, answer - 1))  # the last token of an answer is not computed
    draft_ids = tuple(drafter.propose(seq.request, seq.output_ids)[:most])
    more = pool.blocks_for(len(seq) + len(draft_ids)) - len(seq.blocks)
    if more > 0:
        seq.blocks += tuple(pool.allocate(more))
    return draft_ids
