"""The cache pool as a member that computes uses it, put together: whose house to use from now on,
what is counted, and how it ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moeserve.pools.cache.cache_members import CacheMembers, ViewOfMembers
from moeserve.pools.cache.calls import Channels
from moeserve.pools.cache.keys import PAGE_TOKENS
from moeserve.pools.cache.pool import PagePool, PoolTerms
from moeserve.pools.cache.pooled_house import PooledHouse
from moeserve.pools.kv.house import KvHouse


@dataclass(frozen=True, slots=True)
class AttachedPool:
    """``house`` is to be used in place of the one that was given. ``close`` it before that one, and
    after whoever submits to it."""

    house: PooledHouse
    pool: PagePool
    unfollow: Callable[[], None]

    @property
    def counts(self) -> tuple[object, ...]:
        """Dataclasses of what is counted."""
        pool = self.pool
        return (pool.counts, pool.puts.counts, pool.policy.counts, self.house.counts)

    async def close(self, timeout_s: float = 0.0) -> None:
        """What waits to be put is sent within this time."""
        self.unfollow()
        await self.house.close()
        await self.pool.close(timeout_s)


def attach_pool(
    house: KvHouse,
    view: ViewOfMembers,
    channels: Channels,
    compute_id: str,
    *,
    page_tokens: int = PAGE_TOKENS,
    replication: int = 2,
    prefill_rate: Callable[[], float] = float,
) -> AttachedPool:
    """On the running event loop. ``view`` shows who keeps KV, ``compute_id`` is as in
    ``members.ServedTerms``, ``prefill_rate`` in tokens per second, 0 where it is not known.
    ConfigError where blocks do not fill pages."""
    members = CacheMembers()
    terms = PoolTerms(compute_id, len(house.layouts), page_tokens, replication)
    pool = PagePool(members, channels, terms)
    pooled = PooledHouse(house, pool, prefill_rate=prefill_rate)
    return AttachedPool(pooled, pool, members.follow(view))
