"""Which backend carries bytes between these ranks."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from moeserve.comm.exchange.base import Exchange, Lanes
from moeserve.comm.exchange.cards import DEVICE_BACKENDS
from moeserve.comm.exchange.collective import (
    BeginningOrder,
    CollectiveExchange,
    presence_lanes,
    size_lanes,
)
from moeserve.comm.exchange.local import LocalExchange
from moeserve.comm.exchange.mapped import CudaSharing, MappedExchange
from moeserve.comm.exchange.media import open_stream_medium
from moeserve.comm.exchange.mpi import MpiExchange
from moeserve.comm.exchange.shm import ShmExchange
from moeserve.comm.exchange.tcp import TcpExchange
from moeserve.comm.exchange.torch import TorchExchange
from moeserve.comm.group import Group, Topology
from moeserve.comm.native import native_half
from moeserve.errors import ConfigError

BACKENDS = ("auto", "tcp", "torch", "mpi", "shm", *DEVICE_BACKENDS)


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
    assert backend not in DEVICE_BACKENDS, backend  # those are ``open_device_exchange``'s
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


def open_device_exchange(
    backend: str,
    group: Group,
    topology: Topology,
    lanes: Lanes,
    device: torch.device,
    order: BeginningOrder,
    *,
    key: str = "exchange",
    address: str | None = None,
) -> Exchange:
    """Collective over ``group``: one of ``cards.DEVICE_BACKENDS``, which ``cards.meet`` has found
    to be able. Sizes go by what "auto" means between the hosts. ``order`` is one of this process.
    """
    if backend == "mapped":
        return MappedExchange(group, lanes, key, CudaSharing(device))
    with ExitStack() as undo:
        sizes, presence = open_host_exchanges(group, topology, lanes, key=key, address=address)
        undo.callback(sizes.close)
        undo.callback(presence.close)
        medium = open_stream_medium(group, key, device)
        undo.pop_all()
    return CollectiveExchange(group, lanes, sizes, presence, medium, order)


def open_host_exchanges(
    group: Group, topology: Topology, lanes: Lanes, *, key: str, address: str | None = None
) -> tuple[Exchange, Exchange]:
    """Of a ``CollectiveExchange``: what carries its sizes, and what tells who is there."""

    def opened(of: Lanes, name: str) -> Exchange:
        return open_exchange("auto", group, topology, of, key=f"{key}/{name}", address=address)

    with ExitStack() as undo:
        sizes = opened(size_lanes(lanes), "sizes")
        undo.callback(sizes.close)
        presence = opened(presence_lanes(lanes), "presence")
        undo.pop_all()
    return sizes, presence
