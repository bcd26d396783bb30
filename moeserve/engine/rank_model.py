"""One rank's share of a model: weights, KV memory, threads, and the way to the other ranks.

A process by itself is one rank with everything. With an ``EpContext`` it holds its slots' experts,
and every step is run with all others (``ranks.lock_step``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from moeserve.comm.build import Bounds, open_parallel
from moeserve.comm.exchange.base import Alarm
from moeserve.comm.group import Group, Topology
from moeserve.comm.layout import LayerLayout, layouts, own_experts, plan_of
from moeserve.comm.libraries.open import open_with_library
from moeserve.comm.libraries.promise import AUTO
from moeserve.comm.pipeline import ParallelLayerRunner
from moeserve.config.options import EpOptions, RankModelOptions
from moeserve.engine.draft_loading import LoadedDraft, load_draft, maker_of
from moeserve.engine.kv_size import KvSize, least_of_all
from moeserve.engine.kv_tensors import KvTensors, watch_kv
from moeserve.engine.model_runner import ModelRunner, StepObserver
from moeserve.engine.policies.layered import most_kept
from moeserve.engine.rank_weights import load_weights
from moeserve.engine.ranks.expert_use import ExpertUseCounter
from moeserve.engine.ranks.microbatches import LARGEST
from moeserve.engine.replan.routing_counts import RoutingCounts, chain_observers
from moeserve.engine.replan.swapper import ExpertSwapper
from moeserve.errors import ConfigError, PlacementError
from moeserve.grammar.checking import GrammarChecker
from moeserve.grammar.masks import GrammarMasks
from moeserve.grammar.worker import Vocabulary
from moeserve.kernels.ops import Ops, Part, RouterWeights
from moeserve.kernels.reference.ops import ReferenceOps
from moeserve.kernels.select import choose_ops
from moeserve.models.checkpoint import Checkpoint
from moeserve.models.decoder import Decoder, ModelKvCache
from moeserve.models.expert_source import ExpertSource, expert_bytes, open_experts
from moeserve.models.families import read_spec
from moeserve.models.library import resolve_model
from moeserve.models.packed.checkpoint import open_checkpoint
from moeserve.models.spec import ModelSpec, MoeSpec
from moeserve.models.tokenizer_parts import tokenizer_file
from moeserve.observe.expert_counts import ExpertCounts
from moeserve.observe.progress import Progress
from moeserve.observe.routing import RoutingRecorder
from moeserve.offload.device_mover import DeviceMover
from moeserve.offload.runner import StreamedLayerRunner
from moeserve.placement.plan import Plan


@dataclass(frozen=True, slots=True)
class EpContext:
    """A place among several ranks, and how these reach one another (see ``comm.build``).

    ``progress`` says what the rank is doing in a step; ``alarm`` ends its waiting; ``address`` is
    of the interface on which the others reach it, where there is a choice.
    """

    group: Group
    topology: Topology
    progress: Progress
    options: EpOptions
    alarm: Alarm | None = None
    address: str | None = None

    @property
    def rank(self) -> int:
        return self.group.rank

    @property
    def near_experts(self) -> bool:
        """Whether homes are chosen by what prompts use (``homes``), else by work alone."""
        return self.options.homes == "experts"

    @property
    def has_requests(self) -> bool:
        """Whether requests live here, or only experts."""
        first = self.options.attention_ranks
        return first is None or self.rank < first

    @property
    def replan(self) -> bool:
        """Whether ranks count what re-planning asks for."""
        return self.options.replan == "auto"

    @property
    def microbatches(self) -> int | None:
        """Parts of every step; None is as measured."""
        return None if self.options.microbatches == "auto" else self.options.microbatches

    @property
    def neighbours(self) -> int:
        """Ranks that share the node's memory, this one included."""
        return self.topology.node_R.count(self.topology.node_R[self.rank])

    @property
    def counts(self) -> tuple[int, int]:
        """All ranks, and those of this node."""
        return self.group.world, self.neighbours

    @property
    def place(self) -> int:
        """Among the ranks of its node."""
        return self.topology.ranks_of(self.topology.node_R[self.rank]).index(self.rank)


@dataclass(frozen=True, slots=True)
class RankModel:
    """A loaded share, ready to run steps; ``plan`` and ``swapper`` where there are others.
    ``grammars`` are checked for the doors of this process, if it has some. ``read_bytes_per_s`` is
    what loading was measured at; ``streamed`` reads experts where they are not all in memory."""

    decoder: Decoder
    executor: ModelRunner[ModelKvCache]
    kv: KvTensors
    size: KvSize
    eos_ids: frozenset[int]
    world: int
    grammars: GrammarChecker
    recorder: RoutingRecorder | None
    plan: Plan | None = None
    uses: ExpertUseCounter | None = None
    swapper: ExpertSwapper | None = None
    expert_counts: ExpertCounts | None = None
    expert_bytes: int = 0
    read_bytes_per_s: float = 0.0
    streamed: StreamedLayerRunner | None = None

    @property
    def parallel(self) -> ParallelLayerRunner:
        """The way to the others, of which there must be some."""
        runner = self.decoder.runner
        assert isinstance(runner, ParallelLayerRunner), runner
        return runner

    @property
    def counted(self) -> dict[str, Callable[[], object]]:
        """What reads weights from disk counts, by the name of its metrics; to be asked from any
        thread."""
        if self.streamed is None:
            return {}
        stream, mover = self.streamed.stream, self.streamed.stream.mover
        found = {"expert_stream": lambda: stream.counts, "weight_reads": mover.counts}
        if isinstance(mover, DeviceMover):
            found["expert_copies"] = lambda: mover.copied
        return found

    def close(self) -> None:
        """After the last step: give back what reaches the others, complete the routing trace."""
        self.executor.masks.close()
        self.grammars.close()
        if self.swapper is not None:
            self.swapper.close()
        if isinstance(self.decoder.runner, ParallelLayerRunner):
            self.decoder.runner.dispatcher.close()
        if self.streamed is not None:
            self.streamed.close()
        if self.recorder is not None:
            self.recorder.close()


def load_rank_model(
    options: RankModelOptions,
    *,
    tokenizer_eos: Sequence[int] = (),
    context: EpContext | None = None,
    progress: Callable[[int, int], None] | None = None,
    table: Ops | None = None,
) -> RankModel:
    """All ranks of a group call it, with the same options, and wait for one another in it.

    ``tokenizer_eos`` end an answer beside those that the checkpoint names. ``progress`` gets bytes
    read and bytes in all. ``table`` is given where it is not the one that the options name.
    """
    # 1. Which of the experts are this rank's.
    checkpoint = open_checkpoint(resolve_model(options.model))
    plan = None if context is None else plan_of_context(checkpoint, context)
    own = None if context is None or plan is None else own_experts(_layouts(plan), context.rank)
    # 2. Read the weights, and pack them as the op table wants them.
    ops, ranks = table or _table_of(options, context), None if context is None else context.counts
    draft, begun = _draft_of(options, checkpoint, ops, table, context), time.perf_counter()
    # 3. Share what memory is left among the ranks of this node, as KV blocks.
    decoder, size = load_weights(checkpoint, ops, options, own, ranks, progress, draft)
    read_bytes_per_s = checkpoint.bytes_read / (time.perf_counter() - begun)
    # 4. Join the other ranks.
    counts, swapper, streamed = None, None, streamed_by(decoder)
    if context is not None and plan is not None:
        size = least_of_all(context.group, size if context.has_requests else None)
        budget = options.max_num_batched_tokens
        parallel = join(context, decoder, plan, budget + most_kept(budget, options.prefill_mode))
        counts, swapper = _for_plan_changes(context, decoder, parallel, plan, options)
        decoder = decoder.over(parallel)
    # 5. What looks on at every step.
    recorder = _recorder(options, decoder, 0 if context is None else context.rank)
    expert_counts = _expert_counts(options, decoder)
    watching = chain_observers(chain_observers(recorder, counts), expert_counts)
    uses = _expert_uses(context, decoder, watching)
    observer: StepObserver | None = uses or watching
    # 6. What runs a step.
    ends = (*decoder.spec.eos_ids, *tokenizer_eos)
    eos_ids = frozenset(i for i in ends if i < decoder.spec.vocab)
    vocabulary = vocabulary_of(resolve_model(options.model), decoder, eos_ids)
    num_blocks = size.num_blocks if context is None or context.has_requests else 1
    executor = _runner(options, decoder, draft, num_blocks, eos_ids, observer, vocabulary)
    return RankModel(
        decoder=decoder,
        executor=executor,
        kv=watch_kv(executor, decoder.ops),
        grammars=GrammarChecker(vocabulary),
        size=size,
        eos_ids=eos_ids,
        world=1 if context is None else context.group.world,
        recorder=recorder,
        plan=plan,
        uses=uses,
        swapper=swapper,
        expert_counts=expert_counts,
        expert_bytes=_bytes_of_an_expert(checkpoint, plan),
        read_bytes_per_s=read_bytes_per_s,
        streamed=streamed,
    )


def _table_of(options: RankModelOptions, context: EpContext | None) -> Ops:
    if options.split != "off":
        raise ConfigError(
            f"split={options.split}: two processes share the work of one rank that stands alone: "
            "leave it out, or serve without --ep, and in no cluster"
        )
    place, on_host = 0 if context is None else context.place, options.attention_device == "cpu"
    return choose_table(options.device, options.threads, place, host_attention=on_host)


def _draft_of(
    options: RankModelOptions,
    checkpoint: Checkpoint,
    ops: Ops,
    given: Ops | None,
    context: EpContext | None,
) -> LoadedDraft:
    """A table that was ``given`` may have its KV where others look for it: the draft model's is its
    own."""
    guesses = context is None or context.has_requests
    if given is not None and options.draft_model is not None:
        ops = choose_table(options.device, options.threads)
    return load_draft(options, checkpoint, ops, guesses=guesses)


def _runner(
    options: RankModelOptions,
    decoder: Decoder,
    draft: LoadedDraft,
    num_blocks: int,
    eos_ids: frozenset[int],
    observer: StepObserver | None,
    vocabulary: Vocabulary | None,
) -> ModelRunner[ModelKvCache]:
    """With whoever guesses what follows, where that is wanted."""
    masks, drafts = GrammarMasks(vocabulary), maker_of(options, decoder, draft, num_blocks)
    size = options.block_size
    return ModelRunner(decoder, num_blocks, size, eos_ids, observer, masks=masks, drafts=drafts)


def vocabulary_of(folder: Path, decoder: Decoder, eos_ids: frozenset[int]) -> Vocabulary | None:
    """What grammars are about; None where the model has no tokenizer, or its answers no end."""
    file = tokenizer_file(folder)
    if file is None or not eos_ids:
        return None
    return Vocabulary(file, decoder.spec.vocab, tuple(sorted(eos_ids)))


def _for_plan_changes(
    context: EpContext,
    decoder: Decoder,
    parallel: ParallelLayerRunner,
    plan: Plan,
    options: RankModelOptions,
) -> tuple[RoutingCounts | None, ExpertSwapper]:
    """What counts the routing, where re-planning asks for it, and what changes this rank's experts.
    ``decoder`` is still that of one process."""
    routers = routers_of(decoder)
    counts = None
    if context.replan:
        counts = RoutingCounts(plan.moe_layers, plan.num_experts, widest(routers))
    again = partial(open_experts, resolve_model(options.model), decoder.ops, options)
    if streamed_by(decoder) is not None:
        again = partial(_no_other_experts, options.memory)
    return counts, ExpertSwapper(context.rank, decoder.ops, parallel, routers, again, counts)


def _no_other_experts(memory: int | None) -> ExpertSource:
    """In the place of a source, for a rank that keeps its plan."""
    raise PlacementError(
        f"memory={memory}: a rank that reads experts from disk keeps the plan it was started with"
    )


def _bytes_of_an_expert(checkpoint: Checkpoint, plan: Plan | None) -> int:
    """In the checkpoint's files; 0 where there are no others to send it to."""
    return 0 if plan is None else expert_bytes(checkpoint, plan.moe_layers, plan.num_experts)


def routers_of(decoder: Decoder) -> dict[int, Part[RouterWeights]]:
    """By layer number."""
    halves = [(n, layer.mlp) for n, layer in enumerate(decoder.stack.layers)]
    return {n: mlp[0] for n, mlp in halves if isinstance(mlp, tuple)}


def widest(routers: Mapping[int, Part[RouterWeights]]) -> int:
    return max(router.weights.spec.top_k for router in routers.values())


def choose_table(
    device: str, threads: int | None, place: int = 0, *, host_attention: bool = False
) -> Ops:
    """The op table of the rank in this place of its node, and torch kept out of its way."""
    ops = choose_ops(device, threads, local_rank=place, host_attention=host_attention)
    if ops.name != ReferenceOps.name:
        torch.set_num_threads(1)  # the native pool has the cores: two pools would fight for them
    elif threads is not None:
        torch.set_num_threads(threads)
    return ops


def plan_of_context(checkpoint: Checkpoint, context: EpContext) -> Plan:
    """Which rank holds which expert. ConfigError where requests would have no rank, or the change
    of plans that is asked for knows no ranks without requests."""
    options, world = context.options, context.group.world
    if options.attention_ranks is not None and options.attention_ranks > world:
        raise ConfigError(
            f"attention_ranks={options.attention_ranks}: there are {world} ranks; give at most so "
            "many"
        )
    if options.attention_ranks not in (None, world) and context.replan:
        raise ConfigError(
            f"attention_ranks={options.attention_ranks}: plans are not changed where some ranks "
            "have no requests: leave out --replan auto"
        )
    spec, _ = read_spec(checkpoint)
    node_R = context.topology.node_R
    return plan_of(
        options.plan, spec.moe_layers, num_experts(spec), node_R, options.attention_ranks
    )


def num_experts(spec: ModelSpec) -> int:
    """ConfigError where there is nothing to spread."""
    found = {x.mlp.router.num_experts for x in spec.layers if isinstance(x.mlp, MoeSpec)}
    if not found:
        raise ConfigError(f"{spec.architecture} has no experts to spread: serve it without --ep")
    return max(found)


def join(context: EpContext, decoder: Decoder, plan: Plan, tokens: int) -> ParallelLayerRunner:
    """The way to the others; ``tokens`` is the most that a rank has in a layer of a step."""
    streamed, options = streamed_by(decoder), context.options
    runs = None if streamed is None else streamed.of_rank()
    bounds = Bounds(tokens, context.microbatches or LARGEST, options.ep_deadline, context.alarm)
    whom = decoder.ops, decoder.stack.layers, _layouts(plan), context.group, context.topology
    if options.dispatcher != AUTO:
        return open_with_library(
            options.dispatcher, *whom, bounds=bounds, progress=context.progress, runs=runs
        )
    return open_parallel(
        *whom,
        backend=options.ep_backend,
        bounds=bounds,
        progress=context.progress,
        address=context.address,
        runs=runs,
    )


def streamed_by(decoder: Decoder) -> StreamedLayerRunner | None:
    """What reads its experts from disk, where they are not all in memory."""
    runner = decoder.runner
    return runner if isinstance(runner, StreamedLayerRunner) else None


def of_rank(file: Path, rank: int) -> Path:
    """Where a rank writes what rank 0 writes to ``file``."""
    return file if rank == 0 else file.with_name(f"{file.stem}.rank{rank}{file.suffix}")


def _layouts(plan: Plan) -> dict[int, LayerLayout]:
    return layouts(plan, plan.moe_layers, plan.num_experts, plan.num_devices)


def _expert_uses(
    context: EpContext | None, decoder: Decoder, then: StepObserver | None
) -> ExpertUseCounter | None:
    """What tells doors whose experts prompts use, if homes are chosen by that."""
    runner = decoder.runner
    if context is None or not context.near_experts or not isinstance(runner, ParallelLayerRunner):
        return None
    return ExpertUseCounter(runner, context.group.world, then)


def _expert_counts(options: RankModelOptions, decoder: Decoder) -> ExpertCounts | None:
    """What counts this rank's choices, if that was asked for and there are any."""
    layers = decoder.spec.moe_layers
    if not options.count_experts or not layers:
        return None
    return ExpertCounts(layers, num_experts(decoder.spec))


def _recorder(options: RankModelOptions, decoder: Decoder, rank: int) -> RoutingRecorder | None:
    """The routing trace of this rank, if one was asked for."""
    file = options.record_routing
    if file is None:
        return None
    name = options.served_model_name or resolve_model(options.model).name
    routers = {m.router for x in decoder.spec.layers if isinstance(m := x.mlp, MoeSpec)}
    if not routers:
        raise ConfigError(
            f"record_routing={str(of_rank(file, rank))!r}: model {name!r} has no MoE layers"
        )
    return RoutingRecorder(
        of_rank(file, rank),
        model=name,
        moe_layers=decoder.spec.moe_layers,
        num_experts=max(r.num_experts for r in routers),
        top_k=max(r.top_k for r in routers),
    )
