"""A process in its cluster: the server by which others reach it, its lease, and its end.

Whatever a member does for others comes as handlers. It leaves in this order: what it has is drained
by its owner; the lease ends, so that gateways let go; then the server does.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc

from moeserve.comm.control.rpc import open_server
from moeserve.comm.launch.environment import Launch
from moeserve.config.cluster import PeerConfig
from moeserve.errors import ConfigError
from moeserve.pools.members import Member, MemberLoad, Role, ServedTerms
from moeserve.pools.registry.heartbeat import Heartbeat, HeartbeatCounts
from moeserve.worker.cluster_trust import (
    RUN,
    joined_registry,
    place_to_listen,
    place_to_reach,
    trust_of_cluster,
)

# What calls get to end when the server closes.
CLOSING_S = 1.0


@dataclass(frozen=True, slots=True)
class ServedToCluster:
    """What a member answers, of which terms, and how loaded it says that it is."""

    handlers: Sequence[grpc.GenericRpcHandler]
    terms: ServedTerms
    load: Callable[[], MemberLoad]


class PlaceInCluster:
    """From ``open`` to ``close``, on the event loop that runs when it is made. ConfigError where
    the settings name no cluster."""

    def __init__(self, config: PeerConfig, launch: Launch) -> None:
        self._config = config
        self._launch = launch
        self.trust = trust_of_cluster(config)
        registry = joined_registry(config, self.trust)
        if registry is None:
            raise ConfigError("no cluster to be a member of: give --join HOST:PORT or --registry")
        self.registry = registry
        self._server: grpc.aio.Server | None = None
        self._heartbeat: Heartbeat | None = None

    @property
    def counts(self) -> HeartbeatCounts:
        """Once it is open."""
        assert self._heartbeat is not None
        return self._heartbeat.counts

    async def open(self, offered: ServedToCluster) -> Member:
        """It can be reached, and says so to the registry from now on."""
        host, port = place_to_listen(self._config, self._launch.local_rank)
        self._server, port = open_server(host, self.trust, RUN, offered.handlers, port)
        await self._server.start()
        launch, config = self._launch, self._config
        role = Role(config.role or Role.UNIFIED)
        met_at = port if launch.world == 1 else launch.port
        member = Member(
            id=f"{role}-{launch.rank}-{secrets.token_hex(8)}",
            instance=config.name or f"{role}-{met_at}",
            role=role,
            address=place_to_reach(config, port),
            rank=launch.rank,
            ranks=launch.world,
            server_name="" if self.trust.tls is None else self.trust.tls.name,
            terms=offered.terms,
        )
        self._heartbeat = Heartbeat(self.registry, member, offered.load)
        self._heartbeat.start()
        return member

    def tell(self) -> None:
        """The load has changed in a way that others should hear of at once."""
        if self._heartbeat is not None:
            self._heartbeat.beat_now()

    async def leave(self) -> None:
        """Ends the lease."""
        if self._heartbeat is not None:
            await self._heartbeat.close()

    async def close(self) -> None:
        """Ends the server, and what calls it has."""
        if self._server is not None:
            await self._server.stop(CLOSING_S)
        await asyncio.wait_for(self.registry.close(), CLOSING_S)
