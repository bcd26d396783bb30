"""Who holds which KV block, and which blocks can be shared.

The pool owns block ids. A block is *held* (one or more references) or *free*; a free block may
still carry the KV of a finished request and be found again by its key, until it is needed and
evicted, least recently used first. Only full blocks have keys. A key is the SHA-256 of the
parent's key and the block's tokens, and starts from the request's ``CacheScope``: equal keys mean
equal tokens from position 0 on, within one scope.

Pure: no clock, no tensors. Wrong use (double free, sharing a block nobody wrote) is an
assertion, for it can only be our own bug.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from hashlib import sha256
from itertools import islice
from typing import NewType

from moeserve.core import BlockId, CacheScope, Counters

BlockKey = NewType("BlockKey", bytes)


def root_key(scope: CacheScope) -> BlockKey:
    """The parent of a scope's first blocks; other scopes have others."""
    digest = sha256(b"moeserve.block.v2")
    for field in fields(scope):
        name, value = field.name.encode(), getattr(scope, field.name).encode()
        for part in (name, value):  # each behind its length, so that nothing runs into the next
            digest.update(len(part).to_bytes(8, "little") + part)
    return BlockKey(digest.digest())


def child_key(parent: BlockKey, token_ids: Sequence[int]) -> BlockKey:
    """The key of a full block that follows ``parent``."""
    return BlockKey(sha256(parent + array("q", token_ids).tobytes()).digest())


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """``free`` blocks are held by nobody; ``cached`` ones can be found by key, held or free."""

    total: int
    free: int
    cached: int
    size: int


class BlockPool:
    """``num_blocks`` blocks of ``block_size`` tokens each."""

    def __init__(self, num_blocks: int, block_size: int, counters: Counters) -> None:
        assert num_blocks > 0, num_blocks
        assert block_size > 0, block_size
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._counters = counters
        self._refs = [0] * num_blocks
        self._free: OrderedDict[BlockId, None] = OrderedDict.fromkeys(
            BlockId(b) for b in range(num_blocks)
        )
        self._block_of: dict[BlockKey, BlockId] = {}
        self._key_of: dict[BlockId, BlockKey] = {}

    @property
    def num_free(self) -> int:
        """Blocks nobody holds, whether or not they still carry something."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that can be found by key, held or free."""
        return len(self._block_of)

    @property
    def counts(self) -> BlockCounts:
        return BlockCounts(self.num_blocks, self.num_free, self.num_cached, self.block_size)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def is_free(self, block: BlockId) -> bool:
        return self._refs[block] == 0

    def num_holders(self, block: BlockId) -> int:
        """References to it."""
        return self._refs[block]

    def find(self, keys: Iterable[BlockKey]) -> list[BlockId]:
        """The blocks of the longest prefix of ``keys`` that is cached. Takes no reference."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def share(self, blocks: Iterable[BlockId]) -> None:
        """Take one more reference to each; they must be cached."""
        for block in blocks:
            assert block in self._key_of, f"block {block} is not cached"
            if self._refs[block] == 0:
                del self._free[block]
            self._refs[block] += 1

    def hold(self, blocks: Iterable[BlockId]) -> None:
        """Take one more reference to each; somebody holds them already, cached or private."""
        for block in blocks:
            assert self._refs[block] > 0, f"block {block} is not held"
            self._refs[block] += 1

    def allocate(self, count: int, avoid: Collection[BlockId] = ()) -> list[BlockId]:
        """Take ``count`` blocks to write to, evicting what was used least recently; none of those
        to ``avoid``."""
        if avoid:
            taken = list(islice((b for b in self._free if b not in avoid), count))
            assert len(taken) == count, f"{count} blocks wanted, {len(taken)} free beside {avoid}"
            for block in taken:
                del self._free[block]
        else:
            assert 0 <= count <= len(self._free), f"{count} blocks wanted, {len(self._free)} free"
            taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self._refs[block] = 1
            if block in self._key_of:
                self._forget(block)
                self._counters.evicted_blocks += 1
        return taken

    def publish(self, block: BlockId, key: BlockKey) -> None:
        """Let others find a full block whose KV has been computed.

        If another block has the key already this one stays private: both hold the same.
        """
        assert self._refs[block] > 0, f"block {block} is not held"
        assert self._key_of.get(block, key) == key, f"block {block} already has another key"
        if key not in self._block_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def num_references(self) -> int:
        """Of all blocks together; slowly."""
        return sum(self._refs)

    def release(self, blocks: Sequence[BlockId], *, forget: bool = False) -> None:
        """Give one reference back to each block of a sequence, listed from position 0 on.

        Ends of sequences become free, and thus are evicted, before their beginnings, which more
        requests can share. ``forget`` when the contents cannot be trusted.
        """
        for block in reversed(blocks):
            assert self._refs[block] > 0, f"block {block} is freed twice"
            self._refs[block] -= 1
            if forget and block in self._key_of:
                self._forget(block)
            if self._refs[block] == 0:
                self._free[block] = None
                if block not in self._key_of:
                    self._free.move_to_end(block, last=False)

    def check(self) -> None:
        """Every invariant, slowly; for tests."""
        free = {BlockId(b) for b, refs in enumerate(self._refs) if refs == 0}
        assert free == set(self._free), "free list and reference counts disagree"
        assert all(refs >= 0 for refs in self._refs), "negative reference count"
        assert len(self._block_of) == len(self._key_of), "keys are not one to one"
        for key, block in self._block_of.items():
            assert self._key_of[block] == key, f"block {block} and its key disagree"

    def _forget(self, block: BlockId) -> None:
        del self._block_of[self._key_of.pop(block)]
