"""Prompts in chunks and in groups of layers, on the production scheduler, runner and decoder.

So many requests generate; one comes with a long prompt, and when chunks would be done with it,
another one, ``PROMPTS`` in all. Counted in these steps: experts that their layers load (different
ones that rows chose, layer by layer), and the largest step in rows x layers, which bounds the gap
between two tokens. All ways must make equal tokens. Prompts are what the model writes by itself at
the temperature at which the others go on, too.

Predicted: experts as rows choose them by chance, of each request as often as it chose them in
chunks, where what it touches is counted: a request has its own preferences, so that several touch
more than as many rows of one, and chunks of one fewer than rows of all. (One use for all requests
is up to 10 points off where routers are random.) Routing is the same in every way, so what is
predicted of groups was not seen in them. Energy is a model, not a measurement: bytes of weights
that are read (of experts that are loaded, and of everything else once for each step and layer that
has rows) and 2 operations for each weight that a row meets.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moeserve.config.options import StepOptions
from moeserve.core import Counters, FinishReason, Request, RequestId, SamplingParams, StepPlan
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.build import layered_of
from moeserve.engine.model_runner import ModelRunner
from moeserve.engine.scheduler import Scheduler
from moeserve.kernels.ops import KvCache, Step
from moeserve.kernels.select import choose_ops
from moeserve.models.decoder import Decoder, load_decoder
from moeserve.models.layer_runner import GroupRows, LayerRunner
from moeserve.models.library import resolve_model
from moeserve.models.spec import ModelSpec, MoeSpec
from moeserve.models.survey import survey

BLOCK = 16
WAYS = ("chunk", "layer", "auto")
# Long prompts, one after the other, and tokens that the others have made before the first.
PROMPTS, WARM = 4, 8
# Energy: HBM2 at 3.9 pJ a bit (O'Connor et al., MICRO 2017), and an operation in bf16.
PJ_PER_BYTE, PJ_PER_FLOP = 31.2, 0.7


@dataclass(frozen=True, slots=True)
class Layered:
    """What one way made of all prompts. ``steps`` is to a first token, ``predicted`` are loads,
    ``largest`` is rows x layers of a step. Seconds are medians, the longest gap's over rounds."""

    decoding: int
    way: str
    steps: int
    loads: int
    predicted: float
    largest: int
    ttft_s: float
    gap_s: float
    model_joules: float


@dataclass
class CountedRunner:
    """A ``LayerRunner`` in front of another one that keeps what rows chose: ids [T, C] of each step
    and MoE layer since the last ``begin``."""

    inner: LayerRunner
    chosen: list[list[NDArray[np.int32]]] = field(default_factory=list)

    def begin(self) -> None:
        self.chosen = []

    @property
    def loads(self) -> int:
        """Different experts, step by step and layer by layer."""
        return sum(len(np.unique(ids)) for step in self.chosen for ids in step)

    def run(
        self,
        hidden: Sequence[Tensor],
        steps: Sequence[Step | None],
        caches: Sequence[KvCache],
        routed: Sequence[list[Tensor]] | None = None,
        group: GroupRows | None = None,
    ) -> None:
        assert routed is None, "nobody else looks on"
        seen: list[list[Tensor]] = [[] for _ in hidden]
        self.inner.run(hidden, steps, caches, seen, group)
        (ids_L,) = seen
        self.chosen.append([ids.numpy().copy() for ids in ids_L])


@dataclass
class Uses:
    """How often each request chose each expert in each MoE layer [L, E], and rows it had in all
    layers."""

    shape: tuple[int, int]
    chosen_LE: dict[RequestId, NDArray[np.int64]] = field(default_factory=dict)
    rows: Counter[RequestId] = field(default_factory=Counter)

    def note(self, plan: StepPlan, step: Sequence[NDArray[np.int32]]) -> None:
        """Of a step in which all rows ran in all layers."""
        at = 0
        for chunk in plan.chunks:
            end, name = at + len(chunk.token_ids), chunk.request.id
            counts_LE = self.chosen_LE.setdefault(name, np.zeros(self.shape, np.int64))
            for l, ids in enumerate(step):
                counts_LE[l] += np.bincount(ids[at:end].ravel(), minlength=self.shape[1])
            self.rows[name] += end - at
            at = end

    def touched(self, plan: StepPlan, moe_layers: Sequence[int]) -> float:
        """Experts that the step's rows are expected to touch, of all layers together."""
        missed_LE = np.ones(self.shape)
        for chunk in plan.chunks:
            name, group = chunk.request.id, chunk.layers
            runs_L = [group is None or group.start <= l < group.stop for l in moe_layers]
            others_LE = 1 - self.chosen_LE[name] / self.rows[name]
            missed_LE[runs_L] *= others_LE[runs_L] ** len(chunk.token_ids)
        return float((1 - missed_LE).sum())


@dataclass(frozen=True)
class Bench:
    """A model, and what is asked of it: prompts, beside requests that generate."""

    decoder: Decoder
    runner: CountedRunner
    prompts: tuple[tuple[int, ...], ...]
    openings: tuple[tuple[int, ...], ...]
    budget: int
    temperature: float
    trunk_bytes: int
    expert_bytes: int

    @property
    def spec(self) -> ModelSpec:
        return self.decoder.spec


def layered(args: argparse.Namespace) -> list[Layered]:
    bench = open_bench(args)
    rows: list[Layered] = []
    for count in args.batch:
        rows += compare(bench, count, args.rounds)
    return rows


def open_bench(args: argparse.Namespace) -> Bench:
    path, prompt = resolve_model(args.model), args.prompt
    decoder = load_decoder(path, choose_ops(threads=args.threads))
    mlps = [x.mlp for x in decoder.spec.layers if isinstance(x.mlp, MoeSpec)]
    experts = mlps[0].router.num_experts
    runner = CountedRunner(decoder.runner)
    counted = decoder.over(runner)
    starts = [(i % 64 + 1,) for i in range(32)]
    each = -(-prompt // 32)
    made = write(counted, starts, each, args.temperature)
    text = [token for start, more in zip(starts, made, strict=True) for token in (*start, *more)]
    openings = tuple(tuple(text[at * each : at * each + 8]) for at in range(32))
    expert_bytes = 2 * 3 * decoder.spec.hidden * mlps[0].intermediate
    trunk = survey(path).weight_bytes - len(mlps) * experts * expert_bytes
    turned = [text[at * len(text) // PROMPTS :] + text for at in range(PROMPTS)]
    prompts = tuple(tuple(one[:prompt]) for one in turned)
    return Bench(
        counted,
        runner,
        prompts,
        openings[: max(args.batch)],
        args.step,
        args.temperature,
        trunk,
        expert_bytes,
    )


def write(
    decoder: Decoder, starts: Sequence[Sequence[int]], length: int, temperature: float
) -> list[list[int]]:
    """What the model writes behind these tokens."""
    params = [
        SamplingParams(temperature=temperature, max_tokens=length, ignore_eos=True, seed=i)
        for i in range(len(starts))
    ]
    run = Run(decoder, "chunk", length + 8, len(starts), 512)
    for i, (start, each) in enumerate(zip(starts, params, strict=True)):
        run.scheduler.add(Request(RequestId(str(i)), tuple(start), each))
    while run.scheduler.has_work:
        run.step()
    return [run.tokens[RequestId(str(i))] for i in range(len(starts))]


class Run:
    """Steps of one way."""

    def __init__(self, decoder: Decoder, way: str, longest: int, seqs: int, budget: int) -> None:
        counters = Counters()
        options = StepOptions.model_validate({"prefill_mode": way})
        blocks = seqs * (longest // BLOCK + 2)
        config = SchedulerConfig(longest, seqs, budget, prefix_cache=False)
        self.counters = counters
        self.scheduler = Scheduler(
            config,
            BlockPool(blocks, BLOCK, counters),
            counters,
            layered=layered_of(options, decoder.spec, counters),
        )
        self.executor = ModelRunner(decoder, blocks, BLOCK)
        self.tokens: dict[RequestId, list[int]] = {}

    def step(self) -> StepPlan:
        plan = self.scheduler.plan(0.0)
        for out in self.scheduler.apply(self.executor.run(plan)):
            self.tokens.setdefault(out.request_id, []).append(out.token_id)
        return plan


def compare(bench: Bench, decoding: int, rounds: int) -> list[Layered]:
    """All ways in turn, round after round: seconds are medians, all else is the same each time."""
    made: dict[str, list[Layered]] = {way: [] for way in WAYS}
    tokens: list[Mapping[RequestId, Sequence[int]]] = []
    mlps = [x.mlp for x in bench.spec.layers if isinstance(x.mlp, MoeSpec)]
    uses = Uses((len(mlps), mlps[0].router.num_experts))
    for _ in range(rounds):
        for way in WAYS:
            row, answers = measure(bench, decoding, way, uses)
            made[way].append(row)
            tokens.append(answers)
    if any(answers != tokens[0] for answers in tokens):
        raise SystemExit(f"{decoding} decoding: the ways make other tokens")
    return [
        Layered(
            decoding,
            way,
            rows[0].steps,
            rows[0].loads,
            rows[0].predicted,
            rows[0].largest,
            statistics.median(row.ttft_s for row in rows),
            statistics.median(row.gap_s for row in rows),
            rows[0].model_joules,
        )
        for way, rows in made.items()
    ]


def measure(
    bench: Bench, decoding: int, way: str, uses: Uses
) -> tuple[Layered, Mapping[RequestId, Sequence[int]]]:
    """Of the long prompts, each from when it comes until chunks would be done with it. ``uses`` are
    noted in chunks, and needed elsewhere."""
    length = len(bench.prompts[0])
    most = -(-length // (bench.budget - decoding))
    answer = WARM + 4 + PROMPTS * most
    run = Run(bench.decoder, way, max(length, 8 + answer) + most + 16, decoding + 1, bench.budget)
    for i, opening in enumerate(bench.openings[:decoding]):
        params = SamplingParams(
            temperature=bench.temperature, max_tokens=answer, ignore_eos=True, seed=i
        )
        run.scheduler.add(Request(RequestId(str(i)), opening, params))
    while len(run.tokens) < decoding or min(map(len, run.tokens.values())) < WARM:
        run.step()
    bench.runner.begin()
    plans: list[StepPlan] = []
    taken, waited, gaps = [], [], []
    for at, prompt in enumerate(bench.prompts):
        name, begun = RequestId(f"long {at}"), time.perf_counter()
        params = SamplingParams(temperature=0.0, max_tokens=most + 4, ignore_eos=True)
        run.scheduler.add(Request(name, prompt, params))
        for step in range(most):
            before = time.perf_counter()
            plans.append(run.step())
            gaps.append(time.perf_counter() - before)
            if name in run.tokens and len(taken) == at:
                taken.append(step + 1)
                waited.append(before + gaps[-1] - begun)
        if name not in run.tokens:
            raise SystemExit(f"{way}: no first token after {most} steps")
        run.scheduler.abort(name, FinishReason.ABORT)
        run.tokens[name] = run.tokens[name][:1]  # how many came after it is the way's own
    loads = bench.runner.loads
    if way == "chunk":
        for plan, step in zip(plans, bench.runner.chosen, strict=True):
            uses.note(plan, step)
    found = Layered(
        decoding,
        way,
        max(taken),
        loads,
        sum(uses.touched(plan, bench.spec.moe_layers) for plan in plans),
        max(size_of(plan, bench.spec) for plan in plans),
        statistics.median(waited),
        max(gaps),
        joules(bench, plans, loads),
    )
    return found, run.tokens


def size_of(plan: StepPlan, spec: ModelSpec) -> int:
    """Rows x layers."""
    size = 0
    for chunk in plan.chunks:
        layers = chunk.layers
        run = len(spec.layers) if layers is None else layers.stop - layers.start
        size += len(chunk.token_ids) * run
    return size


def joules(bench: Bench, plans: Sequence[StepPlan], loads: int) -> float:
    read = bench.trunk_bytes * len(plans) + bench.expert_bytes * loads
    experts = [x.mlp for x in bench.spec.layers if isinstance(x.mlp, MoeSpec)]
    met = bench.trunk_bytes + sum(m.router.top_k for m in experts) * bench.expert_bytes
    rows = sum(size_of(plan, bench.spec) for plan in plans) / len(bench.spec.layers)
    return 1e-12 * (read * PJ_PER_BYTE + rows * met * PJ_PER_FLOP)  # a weight: 2 bytes, 2 flops


def show_layered(rows: Sequence[Layered]) -> None:
    table = Table(box=SIMPLE)
    names = (
        *("decoding", "prompt in", "steps", "expert loads", "to chunks", "predicted"),
        *("rows x layers", "TTFT, s", "longest gap, s", "model: J"),
    )
    for name in names:
        table.add_column(name, justify="left" if name == "prompt in" else "right")
    chunks = {row.decoding: row for row in rows if row.way == "chunk"}
    for row in rows:
        of = chunks[row.decoding]
        table.add_row(
            str(row.decoding),
            row.way,
            str(row.steps),
            f"{row.loads:,}",
            f"{row.loads / of.loads - 1:+.1%}",
            f"{row.predicted / of.predicted - 1:+.1%}",
            f"{row.largest:,}",
            f"{row.ttft_s:.3f}",
            f"{row.gap_s:.3f}",
            f"{row.model_joules:.2f}",
        )
    Console(width=130).print(table)
