"""Policies by the names that settings give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from moeserve.errors import ConfigError
from moeserve.pools.routing.base import RoutingPolicy
from moeserve.pools.routing.freeness import MostFree
from moeserve.pools.routing.kv_local import KvLocal
from moeserve.pools.routing.locality_free import LocalityFree

DEFAULT_POLICY = "locality_free"

# Each takes where it begins to look, which differs between gateways.
POLICIES: Mapping[str, Callable[[int], RoutingPolicy]] = MappingProxyType(
    {
        "locality_free": lambda start: LocalityFree(start=start),
        "kv_local": lambda start: KvLocal(start=start),
        "freeness": lambda start: MostFree(start=start),
    }
)
# Those that want the keys of prompts (``RequestRouter.use_keys``).
WANT_KEYS = frozenset({"kv_local"})


def policy_named(name: str, start: int = 0) -> RoutingPolicy:
    """ConfigError where there is none of this name."""
    if name not in POLICIES:
        raise ConfigError(f"routing policy {name!r}: expected one of {sorted(POLICIES)}")
    return POLICIES[name](start)
