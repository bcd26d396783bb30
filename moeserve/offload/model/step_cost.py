"""What a scheduler asks of a performance model: how long a step will take. Pure."""

from __future__ import annotations

from typing import Protocol


class StepCost(Protocol):
    """Predicts a step before it runs. Any thread may ask; the same question has the same answer."""

    def seconds(self, prefill_tokens: int, decode_tokens: int, context_tokens: int) -> float:
        """Of one step that computes so many tokens of prompts, and the newest token of each of
        ``decode_tokens`` sequences, which together hold ``context_tokens`` tokens of KV.

        At least 0; it does not fall as any of the three grows. A step of nothing still has the
        cost of a step.
        """
        ...
