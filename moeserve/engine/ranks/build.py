"""From a model folder to this rank's part of a run: its engine, its server, and, where its process
has a door, the view of all ranks as one engine.

What rank 0 has besides: changes of plan (``replan``). All of it is collective, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Protocol

import grpc
import numpy as np

from moeserve.comm.build import copy_bytes
from moeserve.comm.control.step_mesh import StepMesh
from moeserve.config.options import EngineOptions
from moeserve.core import Counters, StepPlan
from moeserve.engine.blocks import BlockPool
from moeserve.engine.build import (
    LoadedModel,
    admission_of,
    drafter_of,
    layered_of,
    load_tokenizer,
    scheduler_config,
    swapping_of,
)
from moeserve.engine.kv_exchange import KvExchange
from moeserve.engine.loop import Engine, EngineLock, EngineObserver, Unobserved
from moeserve.engine.observers import beside
from moeserve.engine.policies.fairness import ServiceCounters
from moeserve.engine.rank_model import EpContext, RankModel, load_rank_model, widest
from moeserve.engine.ranks.counted import GatheredCounts, RankCounts, with_experts, write_counts
from moeserve.engine.ranks.front import Front
from moeserve.engine.ranks.homes import HomePolicy, LeastWork, NearExperts
from moeserve.engine.ranks.instance import Instance
from moeserve.engine.ranks.load_report import SchedulerLoad
from moeserve.engine.ranks.loads import LoadsOfRound, RankLoads, surplus
from moeserve.engine.ranks.lock_step import LockStep
from moeserve.engine.ranks.meeting import RankMeeting
from moeserve.engine.ranks.microbatches import FixedMicrobatches, MeasuredMicrobatches
from moeserve.engine.ranks.plan_peers import RemotePlanPeers, answer_note
from moeserve.engine.ranks.rank_links import LinkTable
from moeserve.engine.ranks.rank_server import RankServer
from moeserve.engine.ranks.rank_view import Doors
from moeserve.engine.ranks.records import Decision
from moeserve.engine.rates import RatedSteps, StepRates
from moeserve.engine.replan.benefit import StepSample
from moeserve.engine.replan.coordinator import PlanCoordinator
from moeserve.engine.replan.live import LivePlan, build_replanner
from moeserve.engine.replan.replanner import ReplanSettings, StepHistory
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.step_cost import DecodeCost, FittedStepCost, MixedCost
from moeserve.models.library import resolve_model

# Block keys of sent prompts that a door remembers.
PREFIX_KEYS = 1 << 16
# What doors get to let go of this rank, once the run is over, and then what else is under way.
LEAVING_S = 3.0
CLOSING_S = 1.0


class StepsSeen(Protocol):
    """The part of an ``EngineObserver`` that is about steps."""

    def on_step(self, plan: StepPlan, seconds: float) -> None: ...


class StepsAlone(Unobserved):
    """Passes on what concerns a rank's steps; of requests a door knows more (``instance``)."""

    def __init__(self, inner: StepsSeen) -> None:
        self._inner = inner

    def on_step(self, plan: StepPlan, seconds: float) -> None:
        self._inner.on_step(plan, seconds)


@dataclass(frozen=True, slots=True)
class RankParts:
    """What one rank consists of, from the inside out."""

    own: RankModel
    scheduler: Scheduler
    load: SchedulerLoad
    lock_step: LockStep
    engine: Engine
    house: KvExchange
    has_requests: bool = True
    fair: bool = False

    def counts(self) -> RankCounts:
        """Requests that wait at this process's door wait here."""
        work = self.own.parallel.dispatcher.stats
        load = self.engine.load()
        load = replace(load, waiting=load.waiting + self.load.queued())
        if not self.has_requests:
            load = replace(load, total_blocks=0, free_blocks=0)
        found = RankCounts(work, self.engine.counters, self.lock_step.chosen, load)
        return with_experts(found, self.own.expert_counts)


def build_rank(
    options: EngineOptions,
    *,
    context: EpContext,
    mesh: StepMesh,
    meeting: RankMeeting,
    observer: EngineObserver | None = None,
    progress: Callable[[int, int], None] | None = None,
    doors: tuple[int, ...] = (0,),
    spans: EngineObserver | None = None,
) -> LoadedModel:
    """All ranks call it, with the same options, and wait for one another in it. ``doors`` are the
    ranks whose processes have some: there the engine of what is returned stands for all ranks.
    ``spans`` observes what is at home here, whichever door it came by."""
    # 1. The tokenizer, and this rank's share of the weights.
    path = resolve_model(options.model)
    tokenizer, no_tokenizer = load_tokenizer(path, options.chat_template)
    eos_ids = tokenizer.eos_ids if tokenizer else ()
    own = load_rank_model(options, tokenizer_eos=eos_ids, context=context, progress=progress)
    # 2. What decides for the requests that are at home here, and runs their part of every step.
    steps = beside(StepsAlone(observer or Unobserved()), spans)
    parts = rank_parts(own, options, context, mesh, steps)
    # 3. The way to the other ranks, and theirs to this one.
    links = LinkTable(context.rank, meeting.link)
    service = rank_server(parts)
    server = meeting.open(service.handlers())
    counts = GatheredCounts(own.world, context.rank, parts.counts, links.remote)
    # 4. What a door submits to; what changes plans.
    instance: Instance | None = None
    if context.rank in doors:
        watched = observer or Unobserved()
        instance = meeting.call(lambda: _open_door(parts, context, links, doors, watched))
    live_plan = None
    if context.rank == 0:
        live_plan = _live_plan(parts, context, links, meeting)
    # 5. Start.
    context.group.all_gather("engines", b"")
    parts.engine.start()
    if live_plan is not None:
        live_plan.start()

    def close() -> None:
        meeting.call(lambda: _close(server, service, links))

    return LoadedModel(
        name=options.served_model_name or path.name,
        path=path,
        engine=instance or parts.engine,
        tokenizer=tokenizer,
        no_tokenizer=no_tokenizer,
        config=parts.scheduler.config,
        block_size=options.block_size,
        context=options.max_model_len or own.decoder.spec.max_positions,
        own=own,
        house=parts.house,
        own_engine=parts.engine,
        ranks=counts if context.rank == 0 else None,
        live_plan=live_plan,
        on_close=close,
    )


def rank_parts(
    own: RankModel,
    options: EngineOptions,
    context: EpContext,
    mesh: StepMesh,
    observer: EngineObserver,
) -> RankParts:
    config, counters = scheduler_config(options, own), Counters()
    pool = BlockPool(own.size.num_blocks, options.block_size, counters)
    cost, decodes = FittedStepCost(), DecodeCost()
    mixed = MixedCost(decodes)
    admission = admission_of(options, config, cost, mixed)
    drafter = drafter_of(options, decodes, cost, makes=own.executor.makes_drafts)
    swapping = swapping_of(options, own, cost) if context.has_requests else None
    layered = layered_of(options, own.decoder.spec, counters)
    scheduler = Scheduler(
        config, pool, counters, admission, drafter, context.rank, swapping, layered
    )
    lock = EngineLock()
    load = SchedulerLoad(scheduler, lock, has_requests=context.has_requests)
    count = context.microbatches
    lock_step = LockStep(
        own.executor,
        mesh,
        load,
        MeasuredMicrobatches() if count is None else FixedMicrobatches(count),
        own.parallel.dispatcher.stats,
        deadline_s=context.options.ep_deadline,
        turns=own.swapper,
    )
    rates = StepRates()
    if context.progress.drawn:
        observer = beside(observer, StepsAlone(context.progress))
    watched = RatedSteps(observer, rates, cost, decodes, mixed)
    engine = Engine(scheduler, lock_step, watched, pace=lock_step, lock=lock)
    house = KvExchange(engine, scheduler, lock, own.kv, rates)

    def give_back(waiting: int, loads: LoadsOfRound) -> None:
        if waiting and (count := int(surplus(loads(), config)[context.rank])) > 0:
            engine.give_back(count)

    lock_step.on_loads = give_back
    fair = options.fairness == "tenants"
    return RankParts(own, scheduler, load, lock_step, engine, house, context.has_requests, fair)


def rank_server(parts: RankParts) -> RankServer:
    swapper, uses = parts.own.swapper, parts.own.uses
    assert swapper is not None

    def replan(content: bytes) -> Future[bytes]:
        return answer_note(swapper, content)

    return RankServer(
        parts.engine,
        parts.lock_step.next_round,
        lambda: write_counts(parts.counts()),
        replan,
        vocab_size=parts.own.decoder.spec.vocab,
        take_uses=tuple if uses is None else uses.take,
    )


async def _open_door(
    parts: RankParts,
    context: EpContext,
    links: LinkTable,
    doors: tuple[int, ...],
    observer: EngineObserver,
) -> Instance:
    scheduler, world = parts.scheduler, parts.own.world
    near = NearExperts() if context.near_experts else None
    policy: HomePolicy = near or LeastWork()
    blocks_R = np.full(world, scheduler.pool.num_blocks, np.int64)
    blocks_R[context.options.attention_ranks or world :] = 0
    loads = RankLoads.idle(blocks_R)
    front = Front(
        scheduler.config,
        scheduler.pool.block_size,
        loads,
        scheduler.check,
        homes=policy,
        doors=Doors(doors, context.rank),
        prefix_keys=PREFIX_KEYS if scheduler.config.prefix_cache else 0,
        service=ServiceCounters() if parts.fair else None,
    )
    learn = None if near is None else near.learn
    suffix = f" at door {context.rank}" if len(doors) > 1 else ""
    instance = Instance(parts.engine, front, links, observer, loads, suffix=suffix, learn=learn)
    take_uses = tuple if parts.own.uses is None else parts.own.uses.take
    links.begin(parts.engine, parts.lock_step.next_round, instance, take_uses)
    parts.load.queued = lambda: instance.queued
    give_back = parts.lock_step.on_loads

    def on_loads(waiting: int, loads: LoadsOfRound) -> None:
        give_back(waiting, loads)
        instance.publish(loads)

    parts.lock_step.on_loads = on_loads
    return instance


def _live_plan(
    parts: RankParts, context: EpContext, links: LinkTable, meeting: RankMeeting
) -> LivePlan:
    """What changes the plan of all ranks."""
    own = parts.own
    assert own.plan is not None
    assert own.swapper is not None
    peers = RemotePlanPeers(own.world, own.swapper, links.remote, meeting.loop)
    coordinator = PlanCoordinator(own.plan, peers, own.swapper, parts.scheduler.counters)
    nodes = context.topology.node_R
    if not context.replan:
        return LivePlan(coordinator, nodes)
    sharded = next(s for s in own.parallel.sharded if s is not None)
    wire = sharded.wire
    weigh = copy_bytes(own.decoder.ops, sharded.part, wire.top_k, wide=wire.wide)
    rate = own.read_bytes_per_s * own.world
    settings = ReplanSettings(own.expert_bytes, rate, widest(own.swapper.routers))
    history = StepHistory()
    parts.lock_step.on_measured = lambda step: history.record(sample_of(step))
    return LivePlan(coordinator, nodes, build_replanner(coordinator, history, settings, weigh))


def sample_of(step: Decision) -> StepSample:
    """What re-planning keeps of a measured step."""
    return StepSample(step.seconds, step.ran, step.came, step.came_most)


async def _close(server: grpc.aio.Server, service: RankServer, links: LinkTable) -> None:
    """All doors close their links before any server stops, if they do so in time: a server that
    stops breaks the streams that it has."""
    await links.close()
    await service.wait_vacant(LEAVING_S)
    await server.stop(CLOSING_S)
