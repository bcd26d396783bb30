"""From a model folder to a running engine: what this process decides with, over what it runs on.

What is not given is derived from the checkpoint and the machine (``rank_model``, ``kv_size``), and
the log says how.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moeserve.comm.build import copy_bytes
from moeserve.config.options import EngineOptions
from moeserve.core import Counters
from moeserve.engine.blocks import BlockPool
from moeserve.engine.loop import Engine, EngineObserver, Unobserved
from moeserve.engine.rank_model import EpContext, RankModel, load_rank_model, widest
from moeserve.engine.ranks.fleet import Fleet
from moeserve.engine.ranks.homes import NearExperts
from moeserve.engine.ranks.leader import DistributedExecutor, LeaderChannel
from moeserve.engine.replan.coordinator import PlanCoordinator
from moeserve.engine.replan.live import LivePlan, build_replanner
from moeserve.engine.replan.replanner import ReplanSettings
from moeserve.engine.scheduler import Scheduler, SchedulerConfig
from moeserve.errors import ConfigError, TokenizerError
from moeserve.models.library import resolve_model
from moeserve.models.spec import ModelSpec
from moeserve.models.tokenizer import Tokenizer
from moeserve.observe.routing import RoutingRecorder


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model being served. Where ``tokenizer`` is None, ``no_tokenizer`` says why.

    ``context`` is the longest sequence asked for, ``max_model_len`` what KV memory leaves of it.
    ``ranks`` and ``live_plan`` are there if there are several.
    """

    name: str
    path: Path
    engine: Engine
    tokenizer: Tokenizer | None
    no_tokenizer: str
    config: SchedulerConfig
    block_size: int
    context: int
    own: RankModel
    ranks: DistributedExecutor | None = None
    live_plan: LivePlan | None = None

    @property
    def spec(self) -> ModelSpec:
        return self.own.decoder.spec

    @property
    def num_blocks(self) -> int:
        """Of all ranks."""
        return self.own.world * self.own.size.num_blocks

    @property
    def kv_bytes(self) -> int:
        """Of this rank."""
        per_token = self.own.decoder.kv_bytes_per_token
        return self.own.size.num_blocks * self.block_size * per_token

    @property
    def recorder(self) -> RoutingRecorder | None:
        return self.own.recorder

    @property
    def max_model_len(self) -> int:
        return self.config.max_model_len

    def close(self, timeout: float = 30.0) -> bool:
        """Stop the engine, end its streams, and complete the routing trace."""
        if self.live_plan is not None:
            self.live_plan.close()
        stopped = self.engine.stop(timeout)
        if stopped:
            self.own.close()
        return stopped


def build_engine(
    options: EngineOptions,
    *,
    context: EpContext | None = None,
    channel: LeaderChannel | None = None,
    observer: EngineObserver | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LoadedModel:
    """Load a model and start its engine. ``progress`` gets bytes read and bytes in all.

    With a ``context`` this is rank 0 of several, whose others are on the ``channel``; bounds are
    then of each rank, but for ``max_queue``.
    """
    # 1. The tokenizer, and this rank's share of the weights.
    path = resolve_model(options.model)
    tokenizer, no_tokenizer = load_tokenizer(path, options.chat_template)
    eos_ids = tokenizer.eos_ids if tokenizer else ()
    own = load_rank_model(options, tokenizer_eos=eos_ids, context=context, progress=progress)
    # 2. What decides: a scheduler over the blocks of one rank, or a fleet over those of all.
    config = scheduler_config(options, own)
    counters = Counters()
    pools = [BlockPool(own.size.num_blocks, options.block_size, counters) for _ in range(own.world)]
    # 3. What runs its steps, here or over all ranks, and the engine that drives both.
    ranks, live_plan = None, None
    if context is None:
        engine = Engine(Scheduler(config, pools[0], counters), own.executor, tokenizer, observer)
    else:
        assert channel is not None, "rank 0 needs a channel to the others"
        near = NearExperts() if context.near_experts else None
        ranks, live_plan, observer = _lead(own, channel, context, counters, observer, near)
        fleet = Fleet(config, pools, counters, near)
        engine = Engine(fleet, ranks, tokenizer, observer, idle=ranks.idle)
    # 4. Start.
    engine.start()
    if live_plan is not None and live_plan.replanner is not None:
        live_plan.replanner.start()
    return LoadedModel(
        name=options.served_model_name or path.name,
        path=path,
        engine=engine,
        tokenizer=tokenizer,
        no_tokenizer=no_tokenizer,
        config=config,
        block_size=options.block_size,
        context=options.max_model_len or own.decoder.spec.max_positions,
        own=own,
        ranks=ranks,
        live_plan=live_plan,
    )


def scheduler_config(options: EngineOptions, own: RankModel) -> SchedulerConfig:
    """The bounds that were asked for, and those that follow from checkpoint and memory."""
    return SchedulerConfig(
        max_model_len=own.size.max_model_len,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_queue=options.max_queue,
        eos_ids=own.eos_ids,
        prefix_cache=options.prefix_cache,
    )


def _lead(
    own: RankModel,
    channel: LeaderChannel,
    context: EpContext,
    counters: Counters,
    observer: EngineObserver | None,
    near: NearExperts | None,
) -> tuple[DistributedExecutor, LivePlan, EngineObserver]:
    """What runs steps over all ranks, what changes their plan, and who looks on."""
    assert own.plan is not None
    assert own.swapper is not None
    observer = observer or Unobserved()
    coordinator = PlanCoordinator(own.plan, own.swapper, counters)
    learn = (lambda use: None) if near is None else near.learn
    ranks = own.lead(channel, context, coordinator, learn)
    if not context.replan:
        return ranks, LivePlan(coordinator, context.topology.node_R), observer
    sharded = next(s for s in own.parallel.sharded if s is not None)
    weigh = copy_bytes(own.decoder.ops, sharded.part, sharded.wire.top_k)
    rate = own.read_bytes_per_s * own.world
    settings = ReplanSettings(own.expert_bytes, rate, widest(own.swapper.routers))
    replanner, watch = build_replanner(coordinator, ranks, observer, settings, weigh)
    return ranks, LivePlan(coordinator, context.topology.node_R, replanner), watch


def load_tokenizer(path: Path, chat_template: Path | None = None) -> tuple[Tokenizer | None, str]:
    """The folder's tokenizer, or why there is none: token ids can be served without."""
    try:
        return Tokenizer.load(path, chat_template), ""
    except TokenizerError as error:
        if chat_template is not None:
            raise ConfigError(f"chat_template={str(chat_template)!r}: {error.message}") from error
        logging.getLogger("moeserve.engine").warning("%s", error.message)
        return None, error.message
