"""From a model folder to the running engine of a process by itself; of a rank: ``ranks.build``.

What is not given is derived from the checkpoint and the machine (``rank_model``, ``kv_size``), and
the log says how.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moeserve.config.options import CacheOptions, EngineOptions
from moeserve.config.steps import StepOptions
from moeserve.core import Counters
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.kv_exchange import KvExchange
from moeserve.engine.loop import Engine, EngineLock, EngineObserver, ServingEngine, Unobserved
from moeserve.engine.observers import beside
from moeserve.engine.policies.choices import Admission, Drafter
from moeserve.engine.policies.fairness import FairTenants
from moeserve.engine.policies.layered import LayeredPrefill
from moeserve.engine.policies.made import MadeDrafts
from moeserve.engine.policies.ngrams import NgramDrafts
from moeserve.engine.policies.past_future import PastFuture
from moeserve.engine.policies.prefill_choice import FewerLoads, RoutedLayers
from moeserve.engine.policies.speculation import Speculation
from moeserve.engine.policies.swap import SwapOrCompute
from moeserve.engine.policies.targets import NO_TARGETS, LatencyTargets, TargetAdmission
from moeserve.engine.policies.throughput import ThroughputAdmission
from moeserve.engine.rank_model import RankModel, load_rank_model
from moeserve.engine.ranks.counted import GatheredCounts
from moeserve.engine.rates import RatedSteps, StepRates
from moeserve.engine.replan.live import LivePlan
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.semi.build import SharedCores, Split
from moeserve.engine.semi.scheduler import SplitScheduler
from moeserve.engine.step_cost import (
    DecodeCost,
    FittedStepCost,
    MixedCost,
    PredictedFirst,
    StepCost,
    StepLine,
)
from moeserve.engine.swap_memory import HostSwapMemory
from moeserve.engine.swapping import Swapping
from moeserve.errors import ConfigError, TokenizerError
from moeserve.models.checked_tokenizer import load_checked
from moeserve.models.library import resolve_model
from moeserve.models.spec import ModelSpec, MoeSpec
from moeserve.models.tokenizer import Tokenizer
from moeserve.observe.routing import RoutingRecorder

# What to do about folders like Kimi-K2's, whose tokenizer is a program beside a list of tokens.
TIKTOKEN = (
    "; tiktoken.model is there instead: write a tokenizer.json beside it once, with transformers' "
    "TikTokenConverter, the pattern of the folder's tokenization_*.py, and its special tokens in "
    "the order of their ids"
)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model being served. Where ``tokenizer`` is None, ``no_tokenizer`` says why.

    ``context`` is the longest sequence asked for, ``max_model_len`` what KV memory leaves of it.
    ``house`` is the KV of this process's rank. Of several ranks ``own_engine`` is this process's,
    rank 0 has the counts of all (``ranks``) and what changes their plan. ``before_stop`` ends what
    is on its way to the engine, ``on_close`` gives back what reaches the other processes. ``split``
    has the process that computes prompts, where there is one.
    """

    name: str
    path: Path
    engine: ServingEngine
    tokenizer: Tokenizer | None
    no_tokenizer: str
    config: SchedulerConfig
    block_size: int
    context: int
    own: RankModel
    house: KvExchange
    own_engine: Engine | None = None
    ranks: GatheredCounts | None = None
    live_plan: LivePlan | None = None
    split: Split | None = None
    before_stop: Callable[[], None] = lambda: None
    on_close: Callable[[], None] = lambda: None

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

    @property
    def counted(self) -> dict[str, Callable[[], object]]:
        """What parts of this process count, by the name of their metrics; for any thread."""
        if self.split is None:
            return self.own.counted
        process = self.split.process
        return self.own.counted | {"prompts_process": lambda: process.counts}

    def close(self, timeout: float = 30.0) -> bool:
        """Stop the engine, end its streams, and complete the routing trace."""
        if self.live_plan is not None:
            self.live_plan.close()
        self.before_stop()
        stopped = self.engine.stop(timeout)
        self.on_close()
        if self.split is not None:
            self.split.close(stopped=stopped)
        self.house.close()
        if stopped:
            self.own.close()
        return stopped


def build_engine(
    options: EngineOptions,
    *,
    observer: EngineObserver | None = None,
    progress: Callable[[int, int], None] | None = None,
    cost: StepCost | None = None,
) -> LoadedModel:
    """Load a model and start its engine. ``progress`` gets bytes read and bytes in all. ``cost``
    predicts steps for ``--objective throughput`` until some were measured."""
    path = resolve_model(options.model)
    tokenizer, no_tokenizer = load_tokenizer(path, options.chat_template)
    eos_ids = tokenizer.eos_ids if tokenizer else ()
    split = None if options.split == "off" else Split(options, path, targets_of(options))
    table = None if split is None else split.table
    own = load_rank_model(options, tokenizer_eos=eos_ids, progress=progress, table=table)
    config, counters = scheduler_config(options, own), Counters()
    pool = BlockPool(own.size.num_blocks, options.block_size, counters)
    fitted, decodes = FittedStepCost(), DecodeCost()
    mixed = MixedCost(decodes)
    known: StepCost = fitted if cost is None else PredictedFirst(cost, fitted)
    admission = admission_of(options, config, known, mixed)
    drafter = drafter_of(options, decodes, fitted, makes=own.executor.makes_drafts)
    swapping, lock = swapping_of(options, own, fitted), EngineLock()
    layered = layered_of(options, own.decoder.spec, counters)
    scheduler = (Scheduler if split is None else SplitScheduler)(
        config, pool, counters, admission, drafter, swapping=swapping, layered=layered
    )
    rates = StepRates()
    watched: EngineObserver = RatedSteps(observer or Unobserved(), rates, fitted, decodes, mixed)
    steps = None
    if isinstance(scheduler, SplitScheduler) and split is not None:
        split.start(own, options.block_size)
        watched = beside(watched, SharedCores(split.cores))
        steps = split.steps(scheduler, own, lock)
    engine = Engine(scheduler, own.executor, watched, lock=lock, steps=steps)
    if split is not None:
        split.process.wake = engine.wake
    house = KvExchange(engine, scheduler, lock, own.kv, rates)
    engine.start()
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
        house=house,
        split=split,
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


def admission_of(
    options: StepOptions, config: SchedulerConfig, cost: StepCost, mixed: MixedCost
) -> Admission:
    """Who is admitted when, by ``--objective``, the targets of latency and ``--fairness``."""
    inner: Admission = PastFuture(config.max_model_len)
    if options.objective == "throughput":
        inner = ThroughputAdmission(cost, config.max_model_len)
    elif (targets := targets_of(options)) != NO_TARGETS:
        inner = TargetAdmission(inner, targets, mixed, config.max_model_len)
    return FairTenants(inner) if options.fairness == "tenants" else inner


def targets_of(options: StepOptions) -> LatencyTargets:
    """In seconds; options have milliseconds."""
    given = (options.ttft_target, options.tpot_target)
    return LatencyTargets(*(None if target is None else target / 1e3 for target in given))


def swapping_of(options: CacheOptions, own: RankModel, steps: StepLine) -> Swapping | None:
    """Where the KV of preempted requests goes, by ``--swap-memory``."""
    if not options.swap_memory:
        return None
    return Swapping(HostSwapMemory(own.kv, options.swap_memory), SwapOrCompute(steps))


def drafter_of(
    options: StepOptions, decodes: DecodeCost, steps: StepLine, *, makes: bool
) -> Drafter | None:
    """Who guesses what follows, by ``--speculation``; ``makes`` where steps can do so."""
    if options.speculation == "off":
        return None
    found = NgramDrafts() if options.speculation in ("ngram", "auto") else None
    return Speculation(found, decodes, steps, made=MadeDrafts() if makes else None)


def layered_of(options: StepOptions, spec: ModelSpec, counters: Counters) -> LayeredPrefill | None:
    """Which prompts go through the layers in groups, by ``--prefill-mode``."""
    layers = len(spec.layers)
    if options.prefill_mode == "chunk":
        return None
    if options.prefill_mode == "layer":
        return LayeredPrefill(layers, counters)
    routers = [x.mlp.router for x in spec.layers if isinstance(x.mlp, MoeSpec)]
    kinds = [RoutedLayers(1, router.num_experts, router.top_k) for router in routers]
    return LayeredPrefill(layers, counters, FewerLoads(layers, kinds))


def load_tokenizer(path: Path, chat_template: Path | None = None) -> tuple[Tokenizer | None, str]:
    """The folder's tokenizer, or why there is none: token ids can be served without."""
    try:
        return load_checked(path, chat_template), ""
    except TokenizerError as error:
        if chat_template is not None:
            raise ConfigError(f"chat_template={str(chat_template)!r}: {error.message}") from error
        message = error.message
        if (path / "tiktoken.model").is_file() and not (path / "tokenizer.json").exists():
            message += TIKTOKEN
        logging.getLogger("moeserve.engine").warning("%s", message)
        return None, message
