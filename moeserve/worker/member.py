"""A rank that runs a model as a member of a cluster: requests of gateways, and KV that comes and
goes.

One server answers gateways, which submit requests (``RankService``), and members that fetch KV
(``KvService``) or weights. Requests that come with sources of KV fetch it first
(``pools.kv.arrivals``). One that prefills looks into the cache pool before it computes, and puts
there what it has computed (``pools.cache.pooled_house``); where nobody keeps KV that costs nothing.
A unified one leans to what the pools lack (``pools.routing.role_shift``).
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future
from typing import Any

from moeserve.comm.launch.environment import Launch
from moeserve.config.cluster import PeerConfig
from moeserve.engine.build import LoadedModel
from moeserve.engine.loop import Engine
from moeserve.engine.ranks.counted import RankCounts, with_experts, write_counts
from moeserve.engine.ranks.rank_server import RankServer
from moeserve.errors import InvalidRequestError
from moeserve.kernels.device import free_memory
from moeserve.kernels.ops import Ops
from moeserve.observe.spans import RequestSpans
from moeserve.pb import rank_pb2 as pb
from moeserve.pools.cache.cache_members import CacheMembers
from moeserve.pools.cache.keys import PAGE_TOKENS
from moeserve.pools.cache.pool import PagePool, PoolTerms
from moeserve.pools.cache.pooled_house import PooledHouse
from moeserve.pools.compute_id import compute_id
from moeserve.pools.kv.arrivals import Arrivals
from moeserve.pools.kv.channels import ChannelPool
from moeserve.pools.kv.counters import KvCounters
from moeserve.pools.kv.house import KvHouse
from moeserve.pools.kv.mooncake import Mooncake
from moeserve.pools.kv.serve import KvServer
from moeserve.pools.members import Member, MemberLoad, Role, ServedTerms
from moeserve.pools.registry.base import EVERYTHING, HEARTBEAT_S, Interest
from moeserve.pools.registry.follow import Follower
from moeserve.pools.registry.view import ClusterView
from moeserve.pools.routing.role_shift import RoleShift, ShiftMarks
from moeserve.pools.weights.counts import WeightCounts
from moeserve.worker.cluster_trust import RUN, place_to_reach
from moeserve.worker.place_in_cluster import PlaceInCluster, ServedToCluster
from moeserve.worker.weights import OfferedWeights

OF_CACHES = Interest(frozenset({Role.CACHE}), loads=False)
# How often a member that drains looks whether anything is left.
LOOK_S = 0.05
# What gateways get to let go of a member that has left.
LEAVING_S = 3.0


class MemberServer:
    """From ``open`` to ``close``, on the event loop that runs when it is made."""

    def __init__(
        self,
        config: PeerConfig,
        loaded: LoadedModel,
        launch: Launch,
        weights: WeightCounts,
        spans: RequestSpans | None = None,
    ) -> None:
        self._loaded = loaded
        self._engine = engine_of(loaded)
        self._terms = terms = terms_of(loaded, config)
        self._draining = False
        self._place = PlaceInCluster(config, launch)
        self.kv_counters = KvCounters()
        self._channels = ChannelPool(self._place.trust, RUN)
        self._role = Role(config.role or Role.UNIFIED)
        self._shift: RoleShift | None = None
        self._view = ClusterView()
        interest = EVERYTHING if self._role is Role.UNIFIED else OF_CACHES
        self._follower = Follower(self._place.registry, self._view, interest)
        house: KvHouse = loaded.house
        self._pooled: PooledKv | None = None
        if self._role.prefills and PAGE_TOKENS % loaded.block_size == 0:
            self._pooled = PooledKv(loaded, terms, self._channels, self._view)
            house = self._pooled.house
        self._weight_counts = weights
        self._weights = OfferedWeights(config, loaded.path, loaded.name, weights)
        self._mooncake = _mooncake(config)
        self._arrivals = Arrivals(
            house, terms, self._channels, self.kv_counters, spans=spans, mooncake=self._mooncake
        )
        self._kv = KvServer(house, terms, self.kv_counters, mooncake=self._mooncake)
        self._ranks = RankServer(
            self._arrivals,
            lambda: 0,
            self._counted,
            _no_replan,
            vocab_size=terms.vocab,
            beat_s=HEARTBEAT_S,
        )

    async def open(self) -> Member:
        """Can be reached, and says so to the registry."""
        handlers = [self._ranks.handlers(), self._kv.handlers(), self._weights.handlers()]
        self._follower.start()
        member = await self._place.open(ServedToCluster(handlers, self._terms, self.load))
        self._weights.open(self._place.registry, self._channels)
        if self._role is Role.UNIFIED:
            self._shift = RoleShift(member.id, ShiftMarks())
        return member

    @property
    def counts(self) -> tuple[object, ...]:
        """What its parts count, for the page of metrics; once it is open."""
        pooled = () if self._pooled is None else self._pooled.counts
        return self.kv_counters, self._place.counts, self._weight_counts, *pooled

    @property
    def _arriving(self) -> int:
        """Requests that the engine does not have yet."""
        pooled = 0 if self._pooled is None else self._pooled.house.arriving
        return self._arrivals.arriving + pooled

    def load(self) -> MemberLoad:
        """What the next heartbeat says."""
        figures = self._loaded.house.load_figures()
        return MemberLoad(
            running=figures.running,
            waiting=figures.waiting + self._arriving,
            waiting_tokens=figures.waiting_tokens,
            free_blocks=figures.free_blocks,
            total_blocks=figures.total_blocks,
            prefill_rate=figures.prefill_rate,
            step_s=figures.step_s,
            urgent=figures.urgent,
            leans=self._leans(),
            draining=self._draining,
        )

    def _leans(self) -> Role:
        if self._shift is None:
            return Role.UNIFIED
        own = self._terms.compute_id
        alike = [r for r in self._view.members() if r.member.terms.compute_id == own]
        return self._shift.decide(alike, time.monotonic())

    def drain(self) -> None:
        """Nothing new, please: gateways hear of it at once."""
        self._draining = True
        self._place.tell()

    async def idle(self) -> None:
        """Until nobody has a request here, or fetches."""
        while True:
            load = self._engine.load()
            arriving, serving = self._arriving, self.kv_counters.serving
            if not (load.running or load.waiting or arriving or serving):
                return
            await asyncio.sleep(LOOK_S)

    async def end_arrivals(self) -> None:
        """Before the engine stops: what it does not have yet ends."""
        await self._arrivals.close()
        if self._pooled is not None:
            await self._pooled.close()

    async def close(self) -> None:
        """When the engine has stopped: leave, then close what is reached and what reaches others.
        A server that stops breaks the streams that gateways have, so they may let go first."""
        await self._weights.close()
        await self._follower.close()
        await self._place.leave()
        await self._ranks.wait_vacant(LEAVING_S)
        await self._place.close()
        await asyncio.to_thread(self._kv.close)
        if self._mooncake is not None:
            await asyncio.to_thread(self._mooncake.close)
        await self._channels.close()

    def _counted(self) -> pb.CountedReply:
        counts = RankCounts(
            counters=self._engine.counters,
            load=self._engine.load(),
            received=self.kv_counters.received(),
        )
        return write_counts(with_experts(counts, self._loaded.own.expert_counts))


class PooledKv:
    """A rank's KV with the cache pool behind it; ``view`` has the members of the pool."""

    def __init__(
        self, loaded: LoadedModel, terms: ServedTerms, channels: ChannelPool, view: ClusterView
    ) -> None:
        self._members = CacheMembers()
        pool_terms = PoolTerms(terms.compute_id, len(loaded.house.layouts))
        self._pool = PagePool(self._members, channels, pool_terms)
        self.house = PooledHouse(
            loaded.house,
            self._pool,
            prefill_rate=lambda: loaded.house.load_figures().prefill_rate,
        )
        self._end = self._members.follow(view)

    @property
    def counts(self) -> tuple[object, ...]:
        """Of lookups, of what was fetched and put, and of choices between fetching and not."""
        pool = self._pool
        return self.house.counts, pool.counts, pool.puts.counts, pool.policy.counts

    async def close(self) -> None:
        """Before the rank's own house."""
        self._end()
        await self.house.close()
        await self._pool.close()


def engine_of(loaded: LoadedModel) -> Engine:
    """This rank's own."""
    engine: Any = loaded.own_engine or loaded.engine
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
    if ops.device.type != "cpu":
        return f"{ops.name} {free_memory(ops.device).name}"  # generations round differently
    if ops.name != "cpu":
        return ops.name
    from moeserve.kernels.cpu import _cpu

    return f"{ops.name} {_cpu.isa()}"


def _mooncake(config: PeerConfig) -> Mooncake | None:
    """The engine of this process, where KV goes by it."""
    if config.kv_transport == "grpc":
        return None
    return Mooncake(place_to_reach(config, 0).rpartition(":")[0].strip("[]"))


def _no_replan(content: bytes) -> Future[bytes]:
    raise InvalidRequestError("a member's plan is changed by its own rank 0")
