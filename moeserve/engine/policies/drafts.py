"""Draft tokens behind the newest ones, as many as fit. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.policies.choices import Drafter
from moeserve.engine.sequence import SequenceState
from moeserve.engine.step_builder import StepBuilder


def propose_for(
    drafter: Drafter | None,
    generating: Sequence[SequenceState],
    running: Collection[SequenceState],
    config: SchedulerConfig,
) -> Sequence[Sequence[int]]:
    """Guesses for each that generates, of all that run; nothing where there are none."""
    if drafter is None or not drafter.awake(len(generating)) or not generating:
        return ()
    beside = 0
    if len(generating) < len(running):
        beside = sum(seq.length - seq.computed for seq in running if not seq.generating)
    return drafter.propose(generating, min(beside, config.max_num_batched_tokens))


def add_with_drafts(
    builder: StepBuilder,
    generating: Sequence[SequenceState],
    drafts: Sequence[Sequence[int]],
    pool: BlockPool,
    config: SchedulerConfig,
) -> None:
    """One token each, and its drafts as far as the others' one token leaves room."""
    others = len(generating)
    for seq, guessed in zip(generating, drafts, strict=True):
        others -= 1
        builder.add(seq, _fitting(seq, guessed, builder.budget - 1 - others, pool, config))


def _fitting(
    seq: SequenceState, guessed: Sequence[int], most: int, pool: BlockPool, config: SchedulerConfig
) -> tuple[int, ...]:
    """Guesses that fit: into the step, the answer, and blocks that nobody else needs now. There
    are none where a grammar says, one token after the other, what may come."""
    if not guessed or seq.request.params.grammar is not None:
        return ()
    size, params = pool.block_size, seq.request.params
    room = (len(seq.blocks) + pool.num_free) * size - len(seq)
    answer = min(params.max_tokens - len(seq.output_ids), config.max_model_len - len(seq))
    most = max(0, min(most, room, answer - 1))  # the last token of an answer is not computed
    draft_ids = tuple(guessed[:most])
    more = pool.blocks_for(len(seq) + len(draft_ids)) - len(seq.blocks)
    if more > 0:
        seq.blocks += tuple(pool.allocate(more))
    return draft_ids
