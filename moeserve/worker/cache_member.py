"""``moeserve peer --role cache``: a member that keeps KV of others, in memory and on disk, and runs
no model."""

from __future__ import annotations

import asyncio
import logging
import signal

from moeserve.comm.launch.environment import ALONE
from moeserve.config.cluster import PeerConfig
from moeserve.errors import ConfigError
from moeserve.pools.cache.service import CacheServer
from moeserve.pools.cache.store import PageStore, StoreLimits
from moeserve.pools.members import MemberLoad, ServedTerms
from moeserve.worker.place_in_cluster import PlaceInCluster, ServedToCluster

log = logging.getLogger("moeserve.worker")


def run_cache_member(config: PeerConfig) -> int:
    """Until a signal; the exit status."""
    if (config.cache_disk is None) != (config.cache_folder is None):
        raise ConfigError("cache_disk and cache_folder go together: give both, or neither")
    return asyncio.run(_serve(config))


async def _serve(config: PeerConfig) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    place = PlaceInCluster(config, ALONE)
    limits = StoreLimits(config.cache_memory, config.cache_disk or 0, config.cache_share)
    store = await PageStore.open(limits, config.cache_folder)

    def load() -> MemberLoad:
        return MemberLoad(
            stored_bytes=store.stored_bytes,
            capacity_bytes=store.capacity_bytes,
            draining=stop.is_set(),
        )

    try:
        member = await place.open(
            ServedToCluster([CacheServer(store).handlers()], ServedTerms(), load)
        )
        print(f"ready: {member.instance} {member.role} at {member.address}", flush=True)
        await stop.wait()
        log.info("the cache leaves with %d bytes", store.stored_bytes)
    finally:
        await place.leave()
        await place.close()
        await store.close()
    return 0
