"""How processes of a cluster trust one another, and where each is reached."""

from __future__ import annotations

from moeserve.comm.control.rpc import Tls, Trust
from moeserve.config.cluster import EMBEDDED, ClusterOptions
from moeserve.errors import ConfigError
from moeserve.pools.registry.base import Registry
from moeserve.pools.registry.connect import connect_registry

# What members and gateways prove to be of; who is of which cluster is told by the secret.
RUN = b"moeserve cluster"
_ANY = ("0.0.0.0", "::", "[::]")


def trust_of_cluster(options: ClusterOptions) -> Trust:
    secret = options.cluster_secret
    return Trust(
        None if secret is None else secret.get_secret_value().encode(),
        None if options.cluster_tls is None else Tls.load(options.cluster_tls),
    )


def place_to_listen(options: ClusterOptions, local_rank: int = 0) -> tuple[str, int]:
    """Host and port; on one host, ports follow one another as its ranks do."""
    host, _, port = options.listen.rpartition(":")
    return host.strip("[]"), int(port) + local_rank if int(port) else 0


def place_to_reach(options: ClusterOptions, port: int) -> str:
    """What others are told. ConfigError where it is every interface, which is no place."""
    host = options.advertise or options.listen.rpartition(":")[0]
    if host in _ANY:
        raise ConfigError(
            f"--listen={options.listen!r} is every interface: say with --advertise by which host "
            "others reach this one"
        )
    host = host.strip("[]")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def joined_registry(options: ClusterOptions, trust: Trust) -> Registry | None:
    """The registries in other processes that the options name; None where there are none."""
    if options.registry != EMBEDDED:
        return connect_registry([options.registry], trust, RUN)
    return connect_registry(options.gateways, trust, RUN) if options.gateways else None
