"""The block pool: whoever holds a block keeps it, whoever asks by key gets the right one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from moeserve.core import BlockId, CacheScope, Counters
from moeserve.engine.blocks import BlockCounts, BlockKey, BlockPool, child_key, root_key

SIZE = 4


def chain(token_ids: list[int], salt: str = "") -> list[BlockKey]:
    """The keys of all full blocks of a sequence."""
    keys, parent = [], root_key(CacheScope(salt))
    for at in range(0, len(token_ids) - SIZE + 1, SIZE):
        parent = child_key(parent, token_ids[at : at + SIZE])
        keys.append(parent)
    return keys


def filled(pool: BlockPool, keys: list[BlockKey]) -> list[BlockId]:
    """Blocks that were written and published, held once."""
    blocks = pool.allocate(len(keys))
    for block, key in zip(blocks, keys, strict=True):
        pool.publish(block, key)
    return blocks


def test_a_key_names_everything_before_it() -> None:
    assert chain([1, 2, 3, 4, 5, 6, 7, 8])[1] != chain([0, 2, 3, 4, 5, 6, 7, 8])[1]
    assert chain([1, 2, 3, 4, 9, 9, 9, 9])[0] == chain([1, 2, 3, 4, 5, 6, 7, 8])[0]


short = st.text(alphabet="ab\0:", max_size=3)


@given(short, short, short, short)
def test_scopes_share_a_root_key_only_if_they_are_equal(a: str, b: str, c: str, d: str) -> None:
    """However salt and adapter run into one another."""
    one, other = CacheScope(a, b), CacheScope(c, d)
    assert (root_key(one) == root_key(other)) == (one == other)


def test_tenants_do_not_share() -> None:
    assert set(chain([1] * 12, "ours")).isdisjoint(chain([1] * 12, "theirs"))


def test_no_two_different_prefixes_have_one_key() -> None:
    keys = [k for a in range(8) for b in range(8) for k in chain([a, 1, 2, 3, b, 1, 2, 3])]
    assert len(set(keys)) == 8 + 64


def test_the_longest_cached_prefix_is_found() -> None:
    pool = BlockPool(8, SIZE, Counters())
    keys = chain(list(range(16)))
    blocks = filled(pool, keys[:3])
    assert pool.find(keys) == blocks
    assert pool.find([keys[1]]) == [blocks[1]]
    assert pool.find(chain([7] * 16)) == []


def test_released_blocks_stay_cached_and_can_be_shared_again() -> None:
    counters = Counters()
    pool = BlockPool(4, SIZE, counters)
    keys = chain(list(range(8)))
    blocks = filled(pool, keys)
    pool.release(blocks)
    assert pool.num_free == 4
    pool.share(pool.find(keys))
    assert pool.num_free == 2
    assert counters.evicted_blocks == 0


def test_empty_blocks_go_before_cached_ones_and_ends_before_beginnings() -> None:
    counters = Counters()
    pool = BlockPool(4, SIZE, counters)
    keys = chain(list(range(8)))
    pool.release(filled(pool, keys))
    pool.allocate(2)
    assert (counters.evicted_blocks, len(pool.find(keys))) == (0, 2)
    pool.allocate(1)
    assert (counters.evicted_blocks, len(pool.find(keys))) == (1, 1)
    pool.allocate(1)
    assert (counters.evicted_blocks, len(pool.find(keys))) == (2, 0)


def test_the_least_recently_used_is_evicted_first() -> None:
    pool = BlockPool(3, SIZE, Counters())
    keys = [chain([salt] * SIZE)[0] for salt in range(3)]
    for block in filled(pool, keys):
        pool.release([block])
    pool.share(pool.find([keys[0]]))
    pool.release(pool.find([keys[0]]))
    pool.allocate(1)
    assert [len(pool.find([k])) for k in keys] == [1, 0, 1]


def test_a_second_block_with_the_same_content_stays_private() -> None:
    pool = BlockPool(4, SIZE, Counters())
    keys = chain(list(range(4)))
    first, second = filled(pool, keys), filled(pool, keys)
    assert pool.find(keys) == first
    pool.release(second)
    pool.release(first)
    assert pool.find(keys) == first
    pool.check()


def test_untrusted_blocks_are_forgotten() -> None:
    pool = BlockPool(4, SIZE, Counters())
    keys = chain(list(range(8)))
    blocks = filled(pool, keys)
    pool.share(blocks)
    pool.release(blocks, forget=True)
    assert pool.find(keys) == []
    pool.release(blocks)
    assert pool.num_free == 4
    pool.check()


def test_a_double_free_is_caught() -> None:
    pool = BlockPool(2, SIZE, Counters())
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.release(blocks)


def test_more_than_there_is_cannot_be_had() -> None:
    pool = BlockPool(2, SIZE, Counters())
    with pytest.raises(AssertionError, match="3 blocks wanted, 2 free"):
        pool.allocate(3)


def test_sharing_what_nobody_published_is_caught() -> None:
    pool = BlockPool(2, SIZE, Counters())
    with pytest.raises(AssertionError, match="not cached"):
        pool.share(pool.allocate(1))


def test_holding_what_nobody_holds_is_caught() -> None:
    pool = BlockPool(2, SIZE, Counters())
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="not held"):
        pool.hold(blocks)


def test_blocks_to_avoid_are_not_taken() -> None:
    pool = BlockPool(3, SIZE, Counters())
    assert pool.allocate(2, {BlockId(1)}) == [0, 2]
    with pytest.raises(AssertionError, match="1 blocks wanted, 0 free beside"):
        pool.allocate(1, {BlockId(1)})


class PoolMachine(RuleBasedStateMachine):
    """Any order of taking, publishing, sharing and releasing, beside a plain model of it."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.counters = Counters()
        self.pool = BlockPool(6, SIZE, self.counters)
        self.refs: dict[BlockId, int] = {}
        self.content: dict[BlockId, BlockKey] = {}

    @rule(target=held, count=st.integers(0, 3))
    def take(self, count: int) -> list[BlockId]:
        count = min(count, self.pool.num_free)
        evicted, cached = self.counters.evicted_blocks, set(self.content)
        blocks = self.pool.allocate(count)
        assert self.counters.evicted_blocks - evicted == len(cached & set(blocks))
        for block in blocks:
            assert self.refs.get(block, 0) == 0
            self.refs[block] = 1
            self.content.pop(block, None)
        return blocks

    @rule(blocks=held, tokens=st.lists(st.integers(0, 1), min_size=12, max_size=12))
    def publish(self, blocks: list[BlockId], tokens: list[int]) -> None:
        for block, key in zip(blocks, chain(tokens), strict=False):
            if block not in self.content:
                self.pool.publish(block, key)
                if key not in self.content.values():
                    self.content[block] = key

    @rule(target=held, tokens=st.lists(st.integers(0, 1), min_size=12, max_size=12))
    def share(self, tokens: list[int]) -> list[BlockId]:
        keys = chain(tokens)
        found = self.pool.find(keys)
        assert [self.content[b] for b in found] == keys[: len(found)]
        if len(found) < len(keys):
            assert keys[len(found)] not in self.content.values()
        self.pool.share(found)
        for block in found:
            self.refs[block] = self.refs.get(block, 0) + 1
        return found

    @rule(target=held, blocks=held)
    def hold(self, blocks: list[BlockId]) -> list[BlockId]:
        self.pool.hold(blocks)
        for block in blocks:
            self.refs[block] += 1
        return blocks

    @rule(target=held, avoid=st.sets(st.integers(0, 5)), count=st.integers(0, 3))
    def take_others(self, avoid: set[BlockId], count: int) -> list[BlockId]:
        free = [b for b in range(6) if not self.refs.get(BlockId(b)) and b not in avoid]
        blocks = self.pool.allocate(min(count, len(free)), avoid)
        assert set(blocks) <= set(free)
        for block in blocks:
            self.refs[block] = 1
            self.content.pop(block, None)
        return blocks

    @rule(blocks=consumes(held), forget=st.booleans())
    def release(self, blocks: list[BlockId], forget: bool) -> None:
        self.pool.release(blocks, forget=forget)
        for block in blocks:
            self.refs[block] -= 1
            if forget:
                self.content.pop(block, None)

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.pool.check()
        assert self.pool.num_references() == sum(self.refs.values())
        assert self.pool.num_free == 6 - sum(r > 0 for r in self.refs.values())
        assert self.pool.num_cached == len(self.content)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_of_free_blocks_those_that_nobody_can_find_are_taken_first() -> None:
    pool = BlockPool(2, SIZE, Counters())
    keys = chain([1, 2, 3, 4])
    [cached], [plain] = filled(pool, keys), pool.allocate(1)
    pool.release([cached])
    pool.release([plain])
    assert pool.allocate(1) == [plain]
    assert pool.find(keys) == [cached]


def test_counts_tell_what_is_held_and_what_can_be_found() -> None:
    pool = BlockPool(8, SIZE, Counters())
    pool.release(filled(pool, chain(list(range(8)))))
    pool.allocate(1)
    assert pool.counts == BlockCounts(total=8, free=7, cached=2, size=SIZE)
