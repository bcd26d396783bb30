"""Which backend carries bytes between these ranks."""

from __future__ import annotations

from moeserve.comm.exchange.base import Exchange, Lanes
from moeserve.comm.exchange.local import LocalExchange
from moeserve.comm.exchange.mpi import MpiExchange
from moeserve.comm.exchange.shm import ShmExchange
from moeserve.comm.exchange.tcp import TcpExchange
from moeserve.comm.exchange.torch import TorchExchange
from moeserve.comm.group import Group, Topology
from moeserve.comm.native import native_half
from moeserve.errors import ConfigError

BACKENDS = ("auto", "tcp", "torch", "mpi", "shm")


def open_exchange(
    backend: str,
    group: Group,
    topology: Topology,
    lanes: Lanes,
    *,
    key: str = "exchange",
    address: str | None = None,
) -> Exchange:
    """Collective over ``group``, which may be a part of the run; ``topology`` is of the run.

    "auto" is shm where all ranks are of one node and can map each other's memory, else tcp, or
    torch without the native half. A group of one needs no backend. ``key`` is new for every
    exchange of a group; ``address`` is of the interface that tcp and torch listen on.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"comm backend {backend!r}: expected one of {', '.join(BACKENDS)}")
    native_half()  # is an error where it is required, before ranks wait for one another
    if group.world == 1:
        return LocalExchange(group, lanes)
    nodes = {topology.node_R[group.of_run(r)] for r in range(group.world)}
    if backend == "mpi":
        return MpiExchange(group, lanes, key)
    if backend == "shm" and len(nodes) > 1:
        raise ConfigError(
            f"comm backend 'shm': ranks are spread over {len(nodes)} nodes; choose 'auto'"
        )
    if backend == "shm":
        return ShmExchange(group, lanes, key)
    if backend == "tcp":
        return TcpExchange(group, lanes, key, address)
    if backend == "auto":
        try:
            if len(nodes) == 1:
                return ShmExchange(group, lanes, key)
            return TcpExchange(group, lanes, key, address)
        except ConfigError:  # on all ranks alike: each knows what every other lacks
            key = f"{key}/torch"
    return TorchExchange(group, lanes, key, address)
