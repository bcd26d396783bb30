"""A rank as a member of a cluster: its server for gateways and other members, KV that comes and
goes, and its lease.

One server answers gateways, which submit requests (``RankService``), and members that fetch KV
(``KvService``). Requests that come with sources of KV fetch it first (``pools.kv.arrivals``).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from concurrent.futures import Future

import grpc

from moeserve.comm.control.rpc import open_server
from moeserve.comm.launch.environment import Launch
from moeserve.config.cluster import PeerConfig
from moeserve.engine.build import LoadedModel
from moeserve.engine.loop import Engine
from moeserve.engine.ranks.counted import RankCounts, write_counts
from moeserve.engine.ranks.rank_server import RankServer
from moeserve.errors import ConfigError, InvalidRequestError
from moeserve.kernels.ops import Ops
from moeserve.pb import rank_pb2 as pb
from moeserve.pools.compute_id import compute_id
from moeserve.pools.kv.arrivals import Arrivals
from moeserve.pools.kv.channels import ChannelPool
from moeserve.pools.kv.counters import KvCounters
from moeserve.pools.kv.serve import KvServer
from moeserve.pools.members import Member, MemberLoad, Role, ServedTerms
from moeserve.pools.registry.heartbeat import Heartbeat
from moeserve.worker.cluster_trust import (
    RUN,
    joined_registry,
    place_to_listen,
    place_to_reach,
    trust_of_cluster,
)

log = logging.getLogger("moeserve.worker")

# How often a member that drains looks whether anything is left.
LOOK_S = 0.05
# What gateways get to let go of a member that has left, and calls to end after that.
LEAVING_S = 3.0
CLOSING_S = 1.0


class MemberServer:
    """From ``open`` to ``close``, on the event loop that runs when it is made."""

    def __init__(self, config: PeerConfig, loaded: LoadedModel, launch: Launch) -> None:
        self._config = config
        self._launch = launch
        self._loaded = loaded
        self._engine = engine_of(loaded)
        self._trust = trust_of_cluster(config)
        self._terms = terms = terms_of(loaded, config)
        self.kv_counters = KvCounters()
        self._channels = ChannelPool(self._trust, RUN)
        self._arrivals = Arrivals(loaded.house, terms, self._channels, self.kv_counters)
        self._kv = KvServer(loaded.house, terms, self.kv_counters)
        self._ranks = RankServer(
            self._arrivals, lambda: 0, self._counted, _no_replan, vocab_size=terms.vocab
        )
        self._draining = False
        self._server: grpc.aio.Server | None = None
        self._heartbeat: Heartbeat | None = None
        self._registry = joined_registry(config, self._trust)

    async def open(self) -> Member:
        """Can be reached, and says so to the registry; ConfigError where there is none."""
        if self._registry is None:
            raise ConfigError(
                "no cluster to be a member of: give --join GATEWAY:PORT or --registry"
            )
        host, port = place_to_listen(self._config, self._launch.local_rank)
        handlers = [self._ranks.handlers(), self._kv.handlers()]
        self._server, port = open_server(host, self._trust, RUN, handlers, port)
        await self._server.start()
        launch, config = self._launch, self._config
        name = config.name or f"{config.role}-{port}"
        member = Member(
            id=f"{config.role}-{launch.rank}-{secrets.token_hex(8)}",
            instance=name,
            role=Role(config.role or Role.UNIFIED),
            address=place_to_reach(config, port),
            rank=launch.rank,
            ranks=launch.world,
            server_name="" if self._trust.tls is None else self._trust.tls.name,
            terms=self._terms,
        )
        self._heartbeat = Heartbeat(self._registry, member, self.load)
        self._heartbeat.start()
        return member

    def load(self) -> MemberLoad:
        """What the next heartbeat says."""
        figures = self._loaded.house.load_figures()
        return MemberLoad(
            running=figures.running,
            waiting=figures.waiting + self._arrivals.arriving,
            waiting_tokens=figures.waiting_tokens,
            free_blocks=figures.free_blocks,
            total_blocks=figures.total_blocks,
            prefill_rate=figures.prefill_rate,
            step_s=figures.step_s,
            draining=self._draining,
        )

    def drain(self) -> None:
        """Nothing new, please: gateways hear of it at once."""
        self._draining = True
        if self._heartbeat is not None:
            self._heartbeat.beat_now()

    async def idle(self) -> None:
        """Until nobody has a request here, or fetches."""
        while True:
            load = self._engine.load()
            arriving, serving = self._arrivals.arriving, self.kv_counters.serving
            if not (load.running or load.waiting or arriving or serving):
                return
            await asyncio.sleep(LOOK_S)

    async def end_arrivals(self) -> None:
        """Before the engine stops: what it does not have yet ends."""
        await self._arrivals.close()

    async def close(self) -> None:
        """When the engine has stopped: leave, then close what is reached and what reaches others.
        A server that stops breaks the streams that gateways have, so they may let go first."""
        if self._heartbeat is not None:
            await self._heartbeat.close()
        if self._server is not None:
            await self._ranks.wait_vacant(LEAVING_S)
            await self._server.stop(CLOSING_S)
        await asyncio.to_thread(self._kv.close)
        await self._channels.close()
        if self._registry is not None:
            await self._registry.close()

    def _counted(self) -> pb.CountedReply:
        counts = RankCounts(counters=self._engine.counters, load=self._engine.load())
        return write_counts(counts)


def engine_of(loaded: LoadedModel) -> Engine:
    """This rank's own."""
    engine = loaded.own_engine or loaded.engine
    assert isinstance(engine, Engine)
    return engine


def terms_of(loaded: LoadedModel, config: PeerConfig) -> ServedTerms:
    return ServedTerms(
        name=loaded.name,
        compute_id=compute_id(loaded.path, config, kernels_of(loaded.own.decoder.ops)),
        vocab=loaded.spec.vocab,
        max_model_len=loaded.max_model_len,
        eos_ids=tuple(sorted(loaded.config.eos_ids)),
        block_size=loaded.block_size,
        kv_bytes_per_token=loaded.own.decoder.kv_bytes_per_token,
        folder=str(loaded.path.resolve()),
    )


def kernels_of(ops: Ops) -> str:
    """The op table, and the instructions that it was made for."""
    if ops.name != "cpu":
        return ops.name
    from moeserve.kernels.cpu import _cpu

    return f"{ops.name} {_cpu.isa()}"


def _no_replan(content: bytes) -> Future[bytes]:
    raise InvalidRequestError("a member's plan is changed by its own rank 0")
