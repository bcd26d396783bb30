"""From a model folder to a running engine: what this process decides with, over what it runs on.

What is not given is derived from the checkpoint and the machine (``rank``), and the log says how.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moeserve.comm.build import copy_bytes
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

    ``context`` is the longest sequence asked for, ``max_model_len`` what KV memory leaves of it;
    ``num_blocks`` are those of all ranks, ``kv_bytes`` of this one. ``ranks`` and ``live_plan`` are
    there if there are several.
    """

    name: str
    path: Path
    engine: Engine
    spec: ModelSpec
    tokenizer: Tokenizer | None
    no_tokenizer: str
    config: SchedulerConfig
    block_size: int
    num_blocks: int
    kv_bytes: int
    context: int
    own: RankModel
    ranks: DistributedExecutor | None = None
    live_plan: LivePlan | None = None

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
    model: str,
    *,
    name: str | None = None,
    dtype: str = "auto",
    kv_dtype: str = "auto",
    quantization: str = "auto",
    quantize_attention: bool = True,
    combine: str = "exact",
    max_model_len: int | None = None,
    block_size: int = 16,
    num_blocks: int | None = None,
    kv_memory: int | None = None,
    max_num_seqs: int = 64,
    max_num_batched_tokens: int = 512,
    max_queue: int = 1024,
    prefix_cache: bool = True,
    chat_template: Path | None = None,
    threads: int | None = None,
    record_routing: Path | None = None,
    context: EpContext | None = None,
    channel: LeaderChannel | None = None,
    observer: EngineObserver | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LoadedModel:
    """Load a model and start its engine. ``progress`` hears bytes read and bytes in all.

    With a ``context`` this is rank 0 of several, whose others are on the ``channel``; bounds are
    then of each rank, but for ``max_queue``.
    """
    path = resolve_model(model)
    tokenizer, no_tokenizer = load_tokenizer(path, chat_template)
    own = load_rank_model(
        path,
        tokenizer_eos=tokenizer.eos_ids if tokenizer else (),
        name=name,
        dtype=dtype,
        kv_dtype=kv_dtype,
        quantization=quantization,
        quantize_attention=quantize_attention,
        combine=combine,
        max_model_len=max_model_len,
        block_size=block_size,
        num_blocks=num_blocks,
        kv_memory=kv_memory,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        threads=threads,
        record_routing=record_routing,
        context=context,
        progress=progress,
    )
    config = SchedulerConfig(
        max_model_len=own.size.max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_queue=max_queue,
        eos_ids=own.eos_ids,
        prefix_cache=prefix_cache,
    )
    counters = Counters()
    pools = [BlockPool(own.size.num_blocks, block_size, counters) for _ in range(own.world)]
    live_plan = None
    if context is None:
        engine = Engine(Scheduler(config, pools[0], counters), own.executor, tokenizer, observer)
        ranks = None
    else:
        assert channel is not None, "rank 0 needs a channel to the others"
        near = NearExperts() if context.near_experts else None
        ranks, live_plan, observer = _lead(own, channel, context, counters, observer, near)
        fleet = Fleet(config, pools, counters, near)
        engine = Engine(fleet, ranks, tokenizer, observer, idle=ranks.idle)
    engine.start()
    if live_plan is not None and live_plan.replanner is not None:
        live_plan.replanner.start()
    spec = own.decoder.spec
    return LoadedModel(
        name=name or path.name,
        path=path,
        engine=engine,
        spec=spec,
        tokenizer=tokenizer,
        no_tokenizer=no_tokenizer,
        config=config,
        block_size=block_size,
        num_blocks=own.world * own.size.num_blocks,
        kv_bytes=own.size.num_blocks * block_size * own.decoder.kv_bytes_per_token,
        context=max_model_len or spec.max_positions,
        own=own,
        ranks=ranks,
        live_plan=live_plan,
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
