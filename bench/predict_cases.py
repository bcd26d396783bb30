"""Cases of the performance model's bench, run: a model held in several ways, and what it takes."""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from host_speed import HostSpeed, Speed

from moeserve.bench.generation import Case, run_prompts
from moeserve.bench.roofline import LoadCounter
from moeserve.config.options import LoadOptions, RankModelOptions
from moeserve.core import Counters, Request, RequestId, SamplingParams
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.model_runner import ModelRunner
from moeserve.engine.scheduler import Scheduler
from moeserve.kernels.select import choose_ops
from moeserve.models.decoder import Decoder, load_decoder
from moeserve.models.spec import MoeSpec
from moeserve.offload.checkpoint_demand import demand_of, stored_sizes
from moeserve.offload.model.demand import ModelDemand
from moeserve.offload.model.distinct import common_use, equal_use
from moeserve.offload.model.workload import ServerBounds
from moeserve.offload.runner import StreamedLayerRunner
from offload import with_share

BLOCK, STEP_TOKENS = 16, 512
# A case runs again until so many seconds are over, or it has run so often.
ENOUGH_S, MOST_RUNS = 0.4, 9
# Of each of two halves whose routing is counted; and what uses all slots once.
COUNTED, WARM = Case(32, 16, 4), Case(8, 16, 24)
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Setting:
    """How the model is held."""

    quantization: str
    kv_dtype: str
    share: float = 1.0

    @property
    def options(self) -> LoadOptions:
        said = {"quantization": self.quantization, "kv_dtype": self.kv_dtype}
        return LoadOptions.model_validate(said)


def bounds_of(case: Case) -> ServerBounds:
    blocks = case.streams * ((case.prompt + case.answer) // BLOCK + 2)
    return ServerBounds(case.streams, max(STEP_TOKENS, case.streams), BLOCK, blocks)


def seconds(decoder: Decoder, case: Case, clock: Clock, run: int = 0) -> float:
    """Of all steps; requests come at once, with prompts of their own in each ``run``."""
    counters, bounds = Counters(), bounds_of(case)
    config = SchedulerConfig(
        case.prompt + case.answer,
        bounds.max_num_seqs,
        bounds.max_num_batched_tokens,
        prefix_cache=False,
    )
    scheduler = Scheduler(config, BlockPool(bounds.num_blocks, BLOCK, counters), counters)
    runner = ModelRunner(decoder, bounds.num_blocks, BLOCK)
    params = SamplingParams(max_tokens=case.answer, temperature=0, ignore_eos=True)
    draw, vocab = random.Random(f"{case} {run}"), decoder.spec.vocab
    for s in range(case.streams):
        prompt = tuple(draw.choices(range(1, vocab), k=case.prompt))
        scheduler.add(Request(RequestId(str(s)), prompt, params))
    began = clock()
    while scheduler.has_work:
        scheduler.apply(runner.run(scheduler.plan(0.0)))
        took = clock() - began  # each step, for clocks that look at the host meanwhile
    return took


def counted_use(decoder: Decoder) -> list[tuple[float, ...]]:
    """Of each layer that routes: how often a token chooses each expert."""
    draw, vocab, halves = random.Random("counted"), decoder.spec.vocab, list[LoadCounter]()
    for _ in range(2):
        halves.append(LoadCounter(decoder.spec))
        prompts = range(COUNTED.streams)
        asked = [tuple(draw.choices(range(1, vocab), k=COUNTED.prompt)) for _ in prompts]
        run_prompts(decoder, asked, COUNTED.answer, halves[-1])
    found = []
    for layer in decoder.spec.moe_layers:
        mlp = decoder.spec.layers[layer].mlp
        assert isinstance(mlp, MoeSpec), layer
        one, other = (
            [
                sum(column)
                for column in zip(*(step.tokens_LE[layer] for step in half.steps), strict=True)
            ]
            for half in halves
        )
        found.append(common_use(one, other, mlp.router.top_k))
    return found


class Took(NamedTuple):
    """Medians of the runs of a case: seconds, and bytes from disk; and how fast the host was."""

    seconds: float
    read: float
    speed: Speed | None = None


def read_of(decoder: Decoder) -> int:
    """Bytes from disk so far."""
    runner = decoder.runner
    return runner.stream.mover.counts().bytes if isinstance(runner, StreamedLayerRunner) else 0


class Measured:
    """What each setting asks for, and the seconds of cases."""

    def __init__(self, model: Path, args: argparse.Namespace) -> None:
        self.demands: dict[Setting, ModelDemand] = {}
        self.shares: dict[Setting, float] = {}
        self._decoders: dict[Setting, Decoder] = {}
        self._model, self._args = model, args
        self._ops = choose_ops(threads=args.threads)
        self.speed = None if args.cpu_time else HostSpeed(self._ops)
        self._clock: Clock = self.speed or time.thread_time
        self._counted: dict[str, list[tuple[float, ...]]] = {}
        self._run = 0

    def round(
        self, pairs: Sequence[tuple[Setting, Case]], end: float
    ) -> Iterator[tuple[Setting, Case, Took]]:
        """The medians of every case that begins before ``end``."""
        for setting, case in pairs:
            if time.monotonic() > end:
                return
            if setting not in self._decoders:
                self._prepare(setting)
            yield setting, case, self._runs(self._decoders[setting], case)

    def close(self) -> None:
        for decoder in self._decoders.values():
            if isinstance(decoder.runner, StreamedLayerRunner):
                decoder.runner.close()

    def _prepare(self, setting: Setting) -> None:
        decoder, share = self._load(setting)
        if share < 1:  # until all slots have been used, and all records checked
            seconds(decoder, WARM, self._clock)
        self._decoders[setting], self.shares[setting] = decoder, share
        self.demands[setting] = self._demand(setting, decoder)

    def _runs(self, decoder: Decoder, case: Case) -> Took:
        took, read, speed = list[float](), list[float](), self.speed
        looks = 0 if speed is None else speed.looks
        if speed is not None:
            speed.look()
        while not took or (sum(took) < ENOUGH_S and len(took) < MOST_RUNS):
            self._run += 1
            before = read_of(decoder)
            took.append(seconds(decoder, case, self._clock, self._run))
            read.append(read_of(decoder) - before)
        if speed is not None:
            speed.look()
        return Took(
            statistics.median(took),
            statistics.median(read),
            None if speed is None else speed.since(looks),
        )

    def _load(self, setting: Setting) -> tuple[Decoder, float]:
        """And how many of its experts are in memory."""
        if setting.share >= 1:
            return load_decoder(self._model, self._ops, setting.options), 1.0
        options = RankModelOptions(
            model=str(self._model), memory=1 << 50, **setting.options.model_dump()
        )
        decoder, experts = with_share(options, self._ops, setting.share)
        assert isinstance(decoder.runner, StreamedLayerRunner)
        return decoder, min(1.0, decoder.runner.stream.arena.slots / experts)

    def _demand(self, setting: Setting, decoder: Decoder) -> ModelDemand:
        sizes = stored_sizes(self._model, setting.options)
        demand = demand_of(sizes, setting.options, self._ops)
        if self._args.use == "habits":
            return demand
        if self._args.use == "counted":
            if setting.quantization not in self._counted:  # how much is in memory changes nothing
                self._counted[setting.quantization] = counted_use(decoder)
            return demand.with_use(self._counted[setting.quantization])
        routed = [layer.experts for n, layer in demand.layers for _ in range(n) if layer.experts]
        return demand.with_use([equal_use(of.count, of.top_k) for of in routed])
