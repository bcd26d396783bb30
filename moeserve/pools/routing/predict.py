"""How long a member would take for a request, in seconds, from what it reports.

A prompt is computed after those that wait there, at the rate that was measured. An answer takes its
tokens times the step, which was measured with the batch of then: it grows with the batch, so that
requests spread before the measurement shows them, with what waits to be prefilled, and where KV
blocks are short, for then something has to end first. Every prediction grows with each part of the
load and never falls with it. It is for comparing members, not for promising a time.
"""

from __future__ import annotations

from dataclasses import dataclass

from moeserve.pools.routing.base import RouteWanted
from moeserve.pools.routing.loads import LoadRow, LoadTable


@dataclass(frozen=True, slots=True)
class Assumed:
    """What is taken for granted. ``prefill_rate`` and ``step_s`` are of members that have measured
    nothing, where no other has either; a step of ``batch`` requests takes twice that of one that is
    empty; ``prefill_share`` is how much of the time of prefilling a running decode waits;
    ``short_answers`` is how many answers' time a whole memory of missing blocks costs;
    ``transfer_rate`` is of KV between members, in bytes per second."""

    prefill_rate: float = 1000.0
    step_s: float = 0.05
    batch: float = 32.0
    prefill_share: float = 0.5
    short_answers: float = 8.0
    transfer_rate: float = 1e9


ASSUMED = Assumed()


def prefill_s(row: LoadRow, tokens: int, table: LoadTable, assumed: Assumed = ASSUMED) -> float:
    """Until ``tokens`` more are computed."""
    return (row.waiting_tokens + tokens) / _rate(row, table, assumed)


def decode_s(
    row: LoadRow, wanted: RouteWanted, table: LoadTable, assumed: Assumed = ASSUMED
) -> float:
    """From the first token to the last that is expected."""
    load = row.load
    step_s = load.step_s or table.typical_step_s or assumed.step_s
    answer_s = max(1, wanted.output_tokens) * step_s
    seconds = answer_s * (1.0 + row.batch / assumed.batch)
    seconds += assumed.prefill_share * row.waiting_tokens / _rate(row, table, assumed)
    if load.total_blocks:
        size = max(1, row.member.terms.block_size)
        tokens = wanted.prompt_tokens + wanted.output_tokens
        short = -(-tokens // size) - row.free_blocks
        if short > 0:
            seconds += assumed.short_answers * answer_s * short / load.total_blocks
    return seconds


def transfer_s(row: LoadRow, tokens: int, assumed: Assumed = ASSUMED) -> float:
    """Until the KV of ``tokens`` has come from another member."""
    return tokens * row.member.terms.kv_bytes_per_token / assumed.transfer_rate


def _rate(row: LoadRow, table: LoadTable, assumed: Assumed) -> float:
    return row.load.prefill_rate or table.typical_prefill_rate or assumed.prefill_rate
