"""One rank's share of a model: weights, KV memory, threads, and the way to the other ranks.

A process by itself is one rank with everything. With an ``EpContext`` it holds its slots' experts,
and every step is run with all others: rank 0 by a ``DistributedExecutor``, others by ``follow``.

KV memory defaults to room for ``max_num_seqs`` sequences of a usual length, and at most a share of
what is available to the rank; where that cannot hold the checkpoint's longest sequence,
``max_model_len`` shrinks to what fits if it was not asked for, and is an error if it was. All ranks
have as many blocks as the one with the least room.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from moeserve.comm.build import Bounds, open_parallel
from moeserve.comm.exchange.base import DEADLINE_S, Alarm
from moeserve.comm.group import Group, Topology
from moeserve.comm.layout import LayerLayout, layouts, own_experts, plan_of
from moeserve.comm.pipeline import ParallelLayerRunner
from moeserve.engine.model_runner import ModelRunner, StepObserver
from moeserve.engine.ranks.expert_use import ExpertUseCounter
from moeserve.engine.ranks.follower import FollowerChannel, FollowerNotes, follow
from moeserve.engine.ranks.homes import ExpertUse
from moeserve.engine.ranks.leader import DistributedExecutor, LeaderChannel, LeaderNotes
from moeserve.engine.ranks.microbatches import LARGEST, FixedMicrobatches, MeasuredMicrobatches
from moeserve.engine.replan.routing_counts import RoutingCounts, chain_observers
from moeserve.engine.replan.swapper import ExpertSwapper
from moeserve.errors import ConfigError
from moeserve.host import read_memory
from moeserve.kernels.ops import Ops, Part, RouterWeights
from moeserve.kernels.reference.ops import ReferenceOps
from moeserve.kernels.select import choose_ops
from moeserve.kernels.wire import Combine
from moeserve.models.checkpoint import Checkpoint
from moeserve.models.decoder import Decoder, ModelKvCache, assemble
from moeserve.models.expert_source import expert_bytes, open_experts
from moeserve.models.families import read_spec
from moeserve.models.spec import ModelSpec, MoeSpec
from moeserve.models.weights import QUANTIZATIONS
from moeserve.observe.progress import Progress
from moeserve.observe.routing import RoutingRecorder
from moeserve.placement.plan import Plan

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
KV_DTYPES = DTYPES | {"int8": torch.int8}
USUAL_LEN = 2048
SHARE_OF_AVAILABLE = 0.5


@dataclass(frozen=True, slots=True)
class KvSize:
    """How many blocks, and the longest sequence that they serve."""

    num_blocks: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class EpContext:
    """A place among several ranks, and how these reach one another (see ``comm.build``).

    ``plan`` None is experts in their own order; ``microbatches`` None is as measured. ``progress``
    tells what the rank is doing in a step. With ``near_experts`` homes are chosen by what prompts
    use (``homes``), else by work alone. With ``replan`` ranks count what re-planning asks for.
    """

    group: Group
    topology: Topology
    progress: Progress
    alarm: Alarm | None = None
    backend: str = "auto"
    deadline_s: float = DEADLINE_S
    address: str | None = None
    plan: Path | None = None
    microbatches: int | None = None
    near_experts: bool = False
    replan: bool = False

    @property
    def rank(self) -> int:
        return self.group.rank

    @property
    def neighbours(self) -> int:
        """Ranks that share the node's memory, this one included."""
        return self.topology.node_R.count(self.topology.node_R[self.rank])


@dataclass(frozen=True, slots=True)
class RankModel:
    """A loaded share, ready to run steps; ``plan`` and ``swapper`` where there are others.
    ``read_bytes_per_s`` is what loading was measured at."""

    decoder: Decoder
    executor: ModelRunner[ModelKvCache]
    size: KvSize
    eos_ids: frozenset[int]
    world: int
    recorder: RoutingRecorder | None
    plan: Plan | None = None
    uses: ExpertUseCounter | None = None
    swapper: ExpertSwapper | None = None
    expert_bytes: int = 0
    read_bytes_per_s: float = 0.0

    @property
    def parallel(self) -> ParallelLayerRunner:
        """The way to the others, of which there must be some."""
        runner = self.decoder.runner
        assert isinstance(runner, ParallelLayerRunner), runner
        return runner

    def lead(
        self,
        channel: LeaderChannel,
        context: EpContext,
        coordinator: LeaderNotes | None = None,
        learn: Callable[[ExpertUse], None] = lambda use: None,
    ) -> DistributedExecutor:
        """On rank 0: what runs plans of all ranks."""
        return DistributedExecutor(
            self.executor,
            channel,
            self.world,
            stats=self.parallel.dispatcher.stats,
            microbatches=MeasuredMicrobatches()
            if context.microbatches is None
            else FixedMicrobatches(context.microbatches),
            notes=coordinator,
            uses=self.uses,
            learn=learn,
            deadline_s=context.deadline_s,
        )

    def follow(
        self, channel: FollowerChannel, context: EpContext, notes: FollowerNotes | None = None
    ) -> int:
        """On the others: run what rank 0 says until the run is over; how many steps that were."""
        stats = self.parallel.dispatcher.stats
        notes = notes or self.swapper
        return follow(channel, self.executor, context.rank, stats, notes, self.uses)

    def close(self) -> None:
        """After the last step: give back what reaches the others, complete the routing trace."""
        if self.swapper is not None:
            self.swapper.close()
        if isinstance(self.decoder.runner, ParallelLayerRunner):
            self.decoder.runner.dispatcher.close()
        if self.recorder is not None:
            self.recorder.close()


def load_rank_model(
    path: Path,
    *,
    tokenizer_eos: Sequence[int],
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
    threads: int | None = None,
    record_routing: Path | None = None,
    context: EpContext | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> RankModel:
    """All ranks of a group come here, with the same settings. ``progress`` hears bytes read and
    bytes in all."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}: expected one of {sorted(DTYPES)}")
    if kv_dtype not in KV_DTYPES:
        raise ConfigError(f"kv_dtype={kv_dtype!r}: expected one of {sorted(KV_DTYPES)}")
    if quantization not in QUANTIZATIONS:
        raise ConfigError(f"quantization={quantization!r}: expected one of {QUANTIZATIONS}")
    if combine not in set(Combine):
        raise ConfigError(f"combine={combine!r}: expected one of {sorted(Combine)}")
    checkpoint = Checkpoint.open(path)
    plan = None if context is None else plan_of_context(checkpoint, context)
    ops = choose_table(threads)
    begun = time.perf_counter()
    decoder = assemble(
        checkpoint,
        dtype=DTYPES[dtype],
        ops=ops,
        kv_dtype=KV_DTYPES[kv_dtype],
        quantization=quantization,
        quantize_attention=quantize_attention,
        experts=None
        if context is None or plan is None
        else own_experts(_spread(plan), context.rank),
        combine=Combine(combine),
        progress=progress,
    )
    seconds = time.perf_counter() - begun
    size = size_kv(
        decoder.kv_bytes_per_token,
        decoder.spec.max_positions,
        block_size=block_size,
        max_model_len=max_model_len,
        num_blocks=num_blocks,
        kv_memory=kv_memory,
        max_num_seqs=max_num_seqs,
        available=read_memory().available // (1 if context is None else context.neighbours),
    )
    tally, swapper = None, None
    if context is not None and plan is not None:
        size = agree_on_size(context, size)
        parallel, routers = (
            join(context, decoder, plan, max_num_batched_tokens),
            routers_of(decoder),
        )
        if context.replan:
            tally = RoutingCounts(plan.moe_layers, plan.num_experts, widest(routers))
        again = partial(
            open_experts,
            path,
            dtype=DTYPES[dtype],
            ops=ops,
            quantization=quantization,
            quantize_attention=quantize_attention,
        )
        swapper = ExpertSwapper(context.rank, ops, parallel, routers, again, tally)
        decoder = decoder.over(parallel)
    recorder = None
    if record_routing is not None:
        file = record_routing if context is None else of_rank(record_routing, context.rank)
        recorder = open_recorder(file, name or path.name, decoder)
    eos_ids = frozenset(
        i for i in (*decoder.spec.eos_ids, *tokenizer_eos) if i < decoder.spec.vocab
    )
    uses: ExpertUseCounter | None = None
    observer: StepObserver | None = chain_observers(recorder, tally)
    runner = decoder.runner
    if context is not None and context.near_experts and isinstance(runner, ParallelLayerRunner):
        observer = uses = ExpertUseCounter(runner, context.group.world, observer)
    return RankModel(
        decoder=decoder,
        executor=ModelRunner(decoder, size.num_blocks, block_size, eos_ids, observer),
        size=size,
        eos_ids=eos_ids,
        world=1 if context is None else context.group.world,
        recorder=recorder,
        plan=plan,
        uses=uses,
        swapper=swapper,
        expert_bytes=0
        if plan is None
        else expert_bytes(checkpoint, plan.moe_layers, plan.num_experts),
        read_bytes_per_s=checkpoint.bytes_read / seconds,
    )


def routers_of(decoder: Decoder) -> dict[int, Part[RouterWeights]]:
    """By layer number."""
    halves = [(n, layer.mlp) for n, layer in enumerate(decoder.stack.layers)]
    return {n: mlp[0] for n, mlp in halves if isinstance(mlp, tuple)}


def widest(routers: Mapping[int, Part[RouterWeights]]) -> int:
    return max(router.weights.spec.top_k for router in routers.values())


def choose_table(threads: int | None) -> Ops:
    """The op table, and torch kept out of its way."""
    ops = choose_ops(threads=threads)
    if ops.name != ReferenceOps.name:
        torch.set_num_threads(1)  # the native pool has the cores: two pools would fight for them
    elif threads is not None:
        torch.set_num_threads(threads)
    return ops


def plan_of_context(checkpoint: Checkpoint, context: EpContext) -> Plan:
    """Which rank holds which expert."""
    spec, _ = read_spec(checkpoint)
    return plan_of(context.plan, spec.moe_layers, num_experts(spec), context.topology.node_R)


def num_experts(spec: ModelSpec) -> int:
    """ConfigError where there is nothing to spread."""
    found = {x.mlp.router.num_experts for x in spec.layers if isinstance(x.mlp, MoeSpec)}
    if not found:
        raise ConfigError(f"{spec.architecture} has no experts to spread: serve it without --ep")
    return max(found)


def join(context: EpContext, decoder: Decoder, plan: Plan, tokens: int) -> ParallelLayerRunner:
    """The way to the others; ``tokens`` is the most that a rank has in a step."""
    return open_parallel(
        decoder.ops,
        decoder.stack.layers,
        _spread(plan),
        context.group,
        context.topology,
        backend=context.backend,
        bounds=Bounds(tokens, context.microbatches or LARGEST, context.deadline_s, context.alarm),
        progress=context.progress,
        address=context.address,
    )


def agree_on_size(context: EpContext, mine: KvSize) -> KvSize:
    """The least of all ranks."""
    note = json.dumps([mine.num_blocks, mine.max_model_len]).encode()
    sizes = [json.loads(said) for said in context.group.all_gather("kv size", note)]
    return KvSize(min(blocks for blocks, _ in sizes), min(longest for _, longest in sizes))


def of_rank(file: Path, rank: int) -> Path:
    """Where a rank writes what rank 0 writes to ``file``."""
    return file if rank == 0 else file.with_name(f"{file.stem}.rank{rank}{file.suffix}")


def _spread(plan: Plan) -> dict[int, LayerLayout]:
    return layouts(plan, plan.moe_layers, plan.num_experts, plan.num_devices)


def open_recorder(path: Path, name: str, decoder: Decoder) -> RoutingRecorder:
    """A routing trace of this model."""
    layers = decoder.spec.moe_layers
    routers = {m.router for x in decoder.spec.layers if isinstance(m := x.mlp, MoeSpec)}
    if not routers:
        raise ConfigError(f"record_routing={str(path)!r}: model {name!r} has no MoE layers")
    return RoutingRecorder(
        path,
        model=name,
        moe_layers=layers,
        num_experts=max(r.num_experts for r in routers),
        top_k=max(r.top_k for r in routers),
    )


def size_kv(
    bytes_per_token: int,
    max_positions: int,
    *,
    block_size: int,
    max_model_len: int | None,
    num_blocks: int | None,
    kv_memory: int | None,
    max_num_seqs: int,
    available: int,
) -> KvSize:
    """Pure; refuses what is not ``available``."""
    if max_model_len is not None and max_model_len > max_positions:
        raise ConfigError(
            f"max_model_len={max_model_len}: the checkpoint was made for {max_positions} positions"
        )
    longest = max_model_len or max_positions
    bytes_per_block = bytes_per_token * block_size
    if num_blocks is None and kv_memory is not None:
        num_blocks = kv_memory // bytes_per_block
    elif num_blocks is None:
        usual = max_num_seqs * -(-min(longest, USUAL_LEN) // block_size)
        wanted = max(usual, -(-longest // block_size))
        num_blocks = min(wanted, int(available * SHARE_OF_AVAILABLE) // bytes_per_block)
    if num_blocks * bytes_per_block > available:
        raise ConfigError(
            f"{num_blocks} KV blocks of {bytes_per_block} bytes do not fit in the {available} "
            f"bytes of memory available: lower num_blocks or kv_memory"
        )
    fits = num_blocks * block_size
    if fits < 2 or (max_model_len is not None and fits < max_model_len):
        raise ConfigError(
            f"KV memory holds {fits} tokens ({num_blocks} blocks of {block_size}, "
            f"{bytes_per_block} bytes each), and one request of max_model_len={longest} needs "
            f"{longest}: lower max_model_len, or give kv_memory={longest * bytes_per_token} or more"
        )
    if fits < longest:
        logging.getLogger("moeserve.engine").warning(
            "max_model_len is %d instead of the checkpoint's %d: that is what KV memory holds",
            fits,
            longest,
        )
    return KvSize(num_blocks, min(longest, fits))
