"""What a rank's next step will likely be, before the one just planned has run.

A guess, which may be wrong: prefixes that are cached, stop tokens, drafts, aborts and requests that
arrive are not foreseen. Ranks that run in lock-step agree on microbatches from it. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NextStep:
    """``tokens`` in all; ``decode_only`` where each request has no more than its newest one."""

    tokens: int = 0
    decode_only: bool = True


def foresee_step(*, generating: int, left: int, waiting: Iterable[int], budget: int) -> NextStep:
    """The newest token of ``generating`` requests, then ``left`` tokens of prompts under way, then
    requests of ``waiting`` tokens each, as far as ``budget`` tokens go."""
    tokens = generating + left
    for length in waiting:
        if tokens >= budget:
            break
        tokens += length
    return NextStep(min(tokens, budget), tokens == generating)
