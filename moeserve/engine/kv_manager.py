"""Which blocks a sequence has: what it shares, what it gets, and what is left when it has ended.

The blocks of a sequence are its own references into a ``BlockPool``. It gets them when it starts,
or comes with some (``History.kv``); it gives them back when it ends or is preempted, or leaves them
to whoever asked to ``keep`` them. Others borrow blocks from here to write to, which come back as
those of a sequence or are released. Pure; wrong use is an assertion, as in ``blocks``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from moeserve.core import BlockId, CacheScope, FinishReason, RequestId
from moeserve.engine.blocks import BlockKey, BlockPool, child_key, root_key
from moeserve.engine.sequence import HeldKv, SequenceState

ENDED_WELL = frozenset({FinishReason.STOP, FinishReason.LENGTH})


class KvManager:
    """Without ``prefix_cache`` nothing is shared or found again."""

    def __init__(self, pool: BlockPool, *, prefix_cache: bool) -> None:
        self.pool = pool
        self._prefix_cache = prefix_cache
        self._kept: dict[RequestId, HeldKv] = {}

    def cached_prefix(self, seq: SequenceState) -> list[BlockId]:
        """Of a sequence without blocks, those that others have computed."""
        if not self._prefix_cache:
            return []
        usable = (len(seq) - 1) // self.pool.block_size  # one token must be left to compute
        if seq.request.params.prompt_logprobs is not None:
            # A token's log-probability is known only where the one before it was computed.
            usable = min(usable, seq.reached // self.pool.block_size)
        found = self.pool.find(seq.full_keys(self.pool.block_size)[:usable])
        # What was swapped comes back whole, unless nearly all of it is here.
        whole = seq.swapped - len(found) * self.pool.block_size >= self.pool.block_size
        return [] if whole else found

    def blocks_to_start(self, seq: SequenceState) -> int:
        """How many of the free blocks are held once it has started."""
        wanted = self.pool.blocks_for(len(seq))
        if seq.blocks:
            return max(0, wanted - len(seq.blocks))
        return wanted - self._held_by_others(self.cached_prefix(seq))

    def take(self, seq: SequenceState, kv: HeldKv) -> None:
        """A sequence that comes with blocks gets the references to them."""
        size = self.pool.block_size
        seq.blocks, seq.computed = kv.blocks, kv.computed
        if seq.request.params.prompt_logprobs is not None and seq.reached < kv.computed:
            # What is not scored yet is computed here, in blocks that nobody else has.
            usable = seq.reached // size
            self.pool.release(kv.blocks[usable:])
            seq.blocks, seq.computed = kv.blocks[:usable], usable * size

    def start(self, seq: SequenceState) -> None:
        """Blocks for all its tokens."""
        if not seq.blocks:
            shared = self.cached_prefix(seq)
            self.pool.share(shared)
            seq.blocks, seq.computed = tuple(shared), len(shared) * self.pool.block_size
        more = self.pool.blocks_for(len(seq)) - len(seq.blocks)
        if more > 0:
            seq.blocks += tuple(self.pool.allocate(more))

    def publish(self, seq: SequenceState, before: int) -> None:
        """It had computed ``before`` tokens: the blocks that were filled since can be shared."""
        size = self.pool.block_size
        first, last = before // size, seq.computed // size
        if first == last or not self._prefix_cache:
            return
        keys = seq.full_keys(size)
        for block, key in zip(seq.blocks[first:last], keys[first:last], strict=True):
            self.pool.publish(block, key)

    def held_beside(self, seq: SequenceState) -> int:
        """How many of its leading blocks others hold, too."""
        mine = (self.pool.num_holders(block) == 1 for block in seq.blocks)
        return next((i for i, own in enumerate(mine) if own), len(seq.blocks))

    def keep_first(self, seq: SequenceState, tokens: int) -> None:
        """It gives up all blocks but those of so many tokens, which fill them."""
        count = tokens // self.pool.block_size
        self.pool.release(seq.blocks[count:])
        seq.blocks, seq.computed = seq.blocks[:count], tokens

    def free(self, seq: SequenceState, *, forget: bool = False) -> None:
        self.pool.release(seq.blocks, forget=forget)
        seq.blocks = ()
        seq.computed = 0

    def end(self, seq: SequenceState, reason: FinishReason) -> None:
        """Its blocks are free, or kept where that was asked for and it has ended well."""
        if seq.keep and reason in ENDED_WELL and seq.computed:
            self._kept[seq.request.id] = held = self._computed_of(seq)
            self.pool.release(seq.blocks[len(held.blocks) :])
            seq.blocks = ()
            return
        self.free(seq, forget=reason is FinishReason.ERROR)

    def keeps(self, request_id: RequestId) -> bool:
        return request_id in self._kept

    def take_kept(self, request_id: RequestId) -> HeldKv | None:
        """The references, once."""
        return self._kept.pop(request_id, None)

    def release_kept(self) -> None:
        """Nobody will come for them."""
        while self._kept:
            self.pool.release(self._kept.popitem()[1].blocks)

    def look(self, seq: SequenceState) -> HeldKv:
        """One more reference to each block that has something computed."""
        held = self._computed_of(seq)
        self.pool.hold(held.blocks)
        return held

    def borrow(
        self,
        token_ids: Sequence[int],
        scope: CacheScope,
        *,
        spare: int,
        avoid: Collection[BlockId],
    ) -> HeldKv | None:
        """Blocks for so many tokens, the cached ones of their beginning shared; None unless
        ``spare`` blocks are free beside them. None of those to ``avoid`` is written to."""
        assert token_ids, "no tokens to borrow blocks for"
        size = self.pool.block_size
        keys = self._keys(token_ids, scope, (len(token_ids) - 1) // size)
        shared = self.pool.find(keys)
        wanted = self.pool.blocks_for(len(token_ids))
        avoided = {b for b in avoid if self.pool.is_free(b) and b not in shared}
        if wanted - self._held_by_others(shared) + spare + len(avoided) > self.pool.num_free:
            return None
        self.pool.share(shared)
        fresh = self.pool.allocate(wanted - len(shared), avoided)
        return HeldKv((*shared, *fresh), len(shared) * size)

    def publish_held(self, held: HeldKv, token_ids: Sequence[int], scope: CacheScope) -> None:
        """The full blocks of what is computed can be found."""
        full = held.computed // self.pool.block_size
        for block, key in zip(held.blocks, self._keys(token_ids, scope, full), strict=False):
            self.pool.publish(block, key)

    def _keys(self, token_ids: Sequence[int], scope: CacheScope, count: int) -> list[BlockKey]:
        keys: list[BlockKey] = []
        size, parent = self.pool.block_size, root_key(scope)
        for b in range(count if self._prefix_cache else 0):
            parent = child_key(parent, token_ids[b * size : (b + 1) * size])
            keys.append(parent)
        return keys

    def _held_by_others(self, blocks: Sequence[BlockId]) -> int:
        return sum(not self.pool.is_free(block) for block in blocks)

    def _computed_of(self, seq: SequenceState) -> HeldKv:
        return HeldKv(seq.blocks[: self.pool.blocks_for(seq.computed)], seq.computed)
