"""The registry that a list of addresses names: gateways', as ``host:port``.

With certificates, ``name@host:port`` says which name the gateway's is for, if that is not the one
that our own is for.
"""

from __future__ import annotations

from collections.abc import Sequence

from moeserve.comm.control.rpc import Trust, open_channel, proof_metadata
from moeserve.errors import ConfigError, InvalidRequestError
from moeserve.pools.members import split_address
from moeserve.pools.registry.base import Registry
from moeserve.pools.registry.remote import RemoteRegistry
from moeserve.pools.registry.several import SeveralRegistries

# Registries that one process joins.
MOST_REGISTRIES = 64


def connect_registry(addresses: Sequence[str], trust: Trust, run: bytes) -> Registry:
    """``run`` is the name of the cluster, which its proof is for; ConfigError for what is no
    address. Nothing is connected yet."""
    wanted = list(dict.fromkeys(addresses))
    if not 0 < len(wanted) <= MOST_REGISTRIES:
        raise ConfigError(
            f"{len(wanted)} registries to join: expected one to {MOST_REGISTRIES} addresses"
        )
    return SeveralRegistries([_remote(address, trust, run) for address in wanted])


def _remote(address: str, trust: Trust, run: bytes) -> Registry:
    name, _, place = address.rpartition("@")
    try:
        host, port = split_address(place)
    except InvalidRequestError as error:
        raise ConfigError(f"a registry to join: {error.message}") from error
    own = trust.tls.name if trust.tls else ""
    channel = open_channel(host, port, trust, name or own)
    return RemoteRegistry(address, channel, proof_metadata(trust, run))
