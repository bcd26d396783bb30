"""How this rank's server is reached, told to all ranks, and how it reaches theirs.

Each rank greets the next one (the last one the first) as soon as all servers are up, so that ranks
which do not trust one another end here, with what to change, and not at somebody's first request.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc

from moeserve.comm.control.on_loop import on_loop
from moeserve.comm.control.rpc import Trust, greet, open_channel, open_server, proof_metadata
from moeserve.comm.group import Group, spoiled
from moeserve.engine.ranks.rank_links import RankListener, RemoteLink
from moeserve.errors import ConfigError, MoeserveError

T = TypeVar("T")
# What a call to the event loop may take that only starts or stops something; more than a greeting.
SOON_S = 30.0


@dataclass(slots=True)
class RankMeeting:
    """``loop`` runs this process's servers; ``address`` is of the interface that others reach.

    ``open`` and ``call`` are for threads other than the loop's.
    """

    loop: asyncio.AbstractEventLoop
    group: Group
    address: str
    trust: Trust
    alarm: Callable[[], MoeserveError | None] = lambda: None
    places: list[dict[str, Any]] = field(default_factory=list)
    run: bytes = b""

    def open(self, handlers: grpc.GenericRpcHandler) -> grpc.aio.Server:
        """Start the server, exchange places with all ranks, and greet one. Collective.

        ConfigError where ranks do not trust one another; UnavailableError where one is not reached.
        """
        mine = secrets.token_hex(16) if self.group.rank == 0 else ""
        self.run = self.group.all_gather("run", mine.encode())[0]

        async def start() -> tuple[grpc.aio.Server, int]:
            server, port = open_server(self.address, self.trust, self.run, [handlers])
            await server.start()
            return server, port

        server, port = self.call(start)
        try:
            name = "" if self.trust.tls is None else self.trust.tls.name
            place = {"host": self.address, "port": port, "name": name}
            notes = self.group.all_gather("rank service", json.dumps(place).encode())
            self.places = [_read_place(rank, note) for rank, note in enumerate(notes)]
            self._require_alike()
            if self.group.world > 1:
                self._require_greetings()
        except MoeserveError:
            self.call(lambda: server.stop(None))
            raise
        return server

    def call(self, start: Callable[[], Awaitable[T]]) -> T:
        """Run on the loop, and wait for it; UnavailableError if that takes longer than
        ``SOON_S``."""
        return on_loop(self.loop, start, SOON_S)

    def link(self, rank: int, listener: RankListener) -> RemoteLink:
        """To another rank; connected when it is first used. On the loop."""
        metadata = proof_metadata(self.trust, self.run)
        return RemoteLink(rank, self._channel(rank), metadata, listener, self.alarm)

    def _channel(self, rank: int) -> grpc.aio.Channel:
        place = self.places[rank]
        return open_channel(place["host"], place["port"], self.trust, place["name"])

    def _require_alike(self) -> None:
        secured = [bool(place["name"]) for place in self.places]
        if len(set(secured)) > 1:
            without = [rank for rank, one in enumerate(secured) if not one]
            raise ConfigError(
                f"ranks {without} of {len(secured)} have no ep_tls: set it on all ranks or on none"
            )

    def _require_greetings(self) -> None:
        """No server stops before all ranks have been answered, so each learns the cause."""
        failure: MoeserveError | None = None
        try:
            self.call(self._greet_next)
        except MoeserveError as error:
            failure = error
        said = self.group.all_gather("greetings", (failure.message if failure else "").encode())
        if failure is not None:
            raise failure
        for rank, text in enumerate(said):
            if text:
                raise ConfigError(
                    f"rank {rank} does not reach its neighbour: {text.decode(errors='replace')}"
                )

    async def _greet_next(self) -> None:
        rank = (self.group.rank + 1) % self.group.world
        async with self._channel(rank) as channel:
            await greet(channel, proof_metadata(self.trust, self.run), rank)


def _read_place(rank: int, note: bytes) -> dict[str, Any]:
    try:
        place = json.loads(note)
        return {"host": str(place["host"]), "port": int(place["port"]), "name": str(place["name"])}
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        raise spoiled("rank service", f"no address of rank {rank}") from error
