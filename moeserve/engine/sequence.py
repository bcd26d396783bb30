"""A request under way: its tokens, the KV blocks it holds, and how far it is computed.

Pure, like ``scheduler``, which owns these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from moeserve.core import BlockId, FinishReason, Request
from moeserve.engine.blocks import BlockKey, child_key, root_key


@dataclass(slots=True)
class SequenceState:
    """The KV of the first ``computed`` tokens lies in ``blocks``.

    ``reached`` is the most it ever had computed: below it, work is done again. ``arrival`` counts
    requests where several schedulers share a queue.
    """

    request: Request
    output_ids: list[int] = field(default_factory=list)
    blocks: list[BlockId] = field(default_factory=list)
    keys: list[BlockKey] = field(default_factory=list)
    computed: int = 0
    reached: int = 0
    admissions: int = 0
    finish: FinishReason | None = None
    arrival: int = 0

    def __len__(self) -> int:
        return len(self.request.prompt_ids) + len(self.output_ids)

    @property
    def generating(self) -> bool:
        """Only its newest token is still to be computed."""
        return bool(self.output_ids) and self.computed == len(self) - 1

    def late(self, now: float) -> bool:
        """Whether its deadline has come."""
        return self.request.deadline is not None and self.request.deadline <= now

    def tokens(self, start: int, stop: int) -> tuple[int, ...]:
        """Those at positions ``start .. stop - 1``."""
        return tokens_between(self.request.prompt_ids, self.output_ids, start, stop)

    def full_keys(self, block_size: int) -> list[BlockKey]:
        """The keys of all full blocks, each computed once."""
        for b in range(len(self.keys), len(self) // block_size):
            parent = self.keys[-1] if b else root_key(self.request.scope)
            self.keys.append(child_key(parent, self.tokens(b * block_size, (b + 1) * block_size)))
        return self.keys


def tokens_between(
    prompt_ids: tuple[int, ...], output_ids: Sequence[int], start: int, stop: int
) -> tuple[int, ...]:
    """Positions ``start .. stop - 1`` of the prompt followed by the outputs, without joining
    them."""
    length = len(prompt_ids)
    if stop <= length:
        return prompt_ids[start:stop]
    return prompt_ids[start:] + tuple(output_ids[max(0, start - length) : stop - length])
