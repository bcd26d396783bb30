"""The registry that a list of addresses names: gateways', as ``host:port``, or etcd's, as
``etcd://host:port,host:port/name``.

Clusters that share an etcd have different names; without one, it is that of the run. To etcd our
certificate is shown if we have one, and its own must be of the same authority. To gateways, with
certificates, ``name@host:port`` says which name the gateway's is for, if that is not the one
that our own is for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import grpc

from moeserve.comm.control.rpc import Trust, open_channel, proof_metadata
from moeserve.errors import ConfigError, InvalidRequestError
from moeserve.pools.members import split_address
from moeserve.pools.registry.base import Registry
from moeserve.pools.registry.etcd import EtcdRegistry
from moeserve.pools.registry.remote import RemoteRegistry
from moeserve.pools.registry.several import SeveralRegistries

# Registries that one process joins, and endpoints of one etcd.
MOST_REGISTRIES = 64
_ETCD = "etcd://"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")


def connect_registry(addresses: Sequence[str], trust: Trust, run: bytes) -> Registry:
    """``run`` is the name of the cluster, which its proof is for; ConfigError for what is no
    address. Nothing is connected yet."""
    wanted = list(dict.fromkeys(addresses))
    if not 0 < len(wanted) <= MOST_REGISTRIES:
        raise ConfigError(
            f"{len(wanted)} registries to join: expected one to {MOST_REGISTRIES} addresses"
        )
    return SeveralRegistries([_open(address, trust, run) for address in wanted])


def _open(address: str, trust: Trust, run: bytes) -> Registry:
    if not address.startswith(_ETCD):
        return RemoteRegistry(address, _channel(address, trust), proof_metadata(trust, run))
    hosts, _, name = address.removeprefix(_ETCD).partition("/")
    name = name or run.hex()
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{address}: expected a name of letters, digits or ._- behind the hosts")
    channels = [_channel(host, trust) for host in hosts.split(",")[:MOST_REGISTRIES]]
    return EtcdRegistry(channels, f"/moeserve/{name}")


def _channel(address: str, trust: Trust) -> grpc.aio.Channel:
    name, _, place = address.rpartition("@")
    try:
        host, port = split_address(place)
    except InvalidRequestError as error:
        raise ConfigError(f"a registry to join: {error.message}") from error
    return open_channel(host, port, trust, name or (trust.tls.name if trust.tls else ""))
