"""KV of an accelerator's table that lies in host memory, in a cache of the host's table."""

from __future__ import annotations

from dataclasses import dataclass

from moeserve.kernels.ops import KvCache, KvShape, Ops


@dataclass(slots=True)
class HostKv:
    """A cache of the host's table; ``passes`` of attention were done over it."""

    cache: KvCache
    passes: int = 0


def host_cache(host: Ops, shape: KvShape) -> KvCache:
    cache = host.new_kv(shape)
    return KvCache(shape, cache.nbytes, HostKv(cache))


def hosted(cache: KvCache) -> KvCache | None:
    """The host's cache; None where it lies on the device."""
    return cache.data.cache if isinstance(cache.data, HostKv) else None
