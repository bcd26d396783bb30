"""Which rank probably has the KV of a prompt's beginning, as far as a door can know.

A door does not see the prefix caches of ranks; it remembers where it sent which blocks, and forgets
those it met longest ago. So what it says is an estimate: a rank may have evicted a block, or have
got it from another door. Keys are those of ``engine.blocks``. Pure.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moeserve.engine.blocks import BlockKey


class PrefixIndex:
    """Ranks by block key, for ``most`` keys at most; asking costs as much as the prefix is long."""

    def __init__(self, ranks: int, most: int) -> None:
        assert most > 0, most
        self._num_ranks = ranks
        self._most = most
        self._ranks_of: OrderedDict[BlockKey, int] = OrderedDict()  # rank r is bit r

    def __len__(self) -> int:
        return len(self._ranks_of)

    def cached_blocks(self, keys: Sequence[BlockKey]) -> NDArray[np.int64]:
        """By rank, how many of the first blocks it probably has."""
        blocks_R = np.zeros(self._num_ranks, np.int64)
        holders = (1 << self._num_ranks) - 1
        depth = 0
        for depth, key in enumerate(keys):
            known = self._ranks_of.get(key, 0)
            if depth:
                _fill(blocks_R, holders & ~known, depth)
            holders &= known
            if not holders:
                return blocks_R
        if keys:
            _fill(blocks_R, holders, depth + 1)
        return blocks_R

    def record(self, keys: Sequence[BlockKey], rank: int) -> None:
        """These blocks, from position 0 on, are sent to a rank. Ends are forgotten first."""
        for key in reversed(keys):
            self._ranks_of[key] = self._ranks_of.pop(key, 0) | 1 << rank
        while len(self._ranks_of) > self._most:
            self._ranks_of.popitem(last=False)


def _fill(blocks_R: NDArray[np.int64], ranks: int, value: int) -> None:
    """Set the entries whose bits are set."""
    while ranks:
        lowest = ranks & -ranks
        blocks_R[lowest.bit_length() - 1] = value
        ranks ^= lowest
