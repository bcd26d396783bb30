"""Why a step has its shape: what ``StepChoice`` says of those that did not start in it. Pure."""

from __future__ import annotations

from moeserve.core import Refusal
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.kv_manager import KvManager
from moeserve.engine.sequence import SequenceState
from moeserve.engine.step_builder import StepBuilder


def what_lacks(
    builder: StepBuilder,
    seq: SequenceState,
    kv: KvManager,
    running: int,
    spare: int,
    config: SchedulerConfig,
) -> Refusal:
    """What a request lacks to start in a step: it has to have tokens left, and free blocks for the
    request beside ``spare`` for each of those ``running``. None starts where some had to stop."""
    if builder.preempted:
        return Refusal.PREEMPTED
    if running >= config.max_num_seqs:
        return Refusal.SEQUENCES
    if not builder.budget:
        return Refusal.TOKENS
    free = kv.pool.num_free - running * spare
    # One block at least is never shared.
    lacks = (free <= 0 and not seq.blocks) or kv.blocks_to_start(seq) > free
    return Refusal.BLOCKS if lacks else Refusal.NONE


def why_none(builder: StepBuilder, waiting: int) -> Refusal:
    """Why the admission picked none of those that wait."""
    if not waiting:
        return Refusal.NONE
    return Refusal.FORESEEN if builder.budget else Refusal.TOKENS
