"""Prompts of given lengths: token ids of the demo model's vocabulary, the same for a seed."""

from __future__ import annotations

import random

# Ordinary tokens of the demo model: no special ones, none outside its vocabulary.
FIRST, LAST = 300, 4000


def prompt(seed: int, tokens: int, shared: int = 0) -> list[int]:
    """The first ``shared`` tokens are those of every such prompt."""
    common = random.Random("shared")
    own = random.Random(seed)
    ids = [common.randrange(FIRST, LAST) for _ in range(shared)]
    return ids + [own.randrange(FIRST, LAST) for _ in range(tokens - shared)]
