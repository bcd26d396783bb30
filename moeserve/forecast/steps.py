"""Real steps, timed, and Python's part of them; what they cost beside kernels is found in ``rest``.

Python's part is measured with a decoder that does nothing, by the real scheduler and runner. The
steps are of two depths of the model's first layers where these are small enough, else of the model
that is shipped; of one to many requests that decode, after short prompts and long ones, and of
prompts. All of them are looked at in turn, several times and in turn with kernels
(``kernel_costs``). Of a look the median counts: what disturbs a machine for a moment is in none. Of
the looks it is the mean: what makes it slower for seconds will do so again, and between two of its
states there is no middle one.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median, variance
from typing import Any

import torch
from torch import Tensor

from moeserve.core import Counters, Request, RequestId, SamplingParams, StepPlan
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.model_runner import Forward, ModelRunner, StepObserver
from moeserve.engine.scheduler import Scheduler
from moeserve.forecast.habits import UseCounter
from moeserve.forecast.timing import LEAST_SECONDS
from moeserve.kernels.ops import Ops
from moeserve.models.batch import StepBatch
from moeserve.offload.model.demand import ModelDemand
from moeserve.offload.model.distinct import use_of
from moeserve.offload.model.overheads import Overheads
from moeserve.offload.model.predict import StepPredictor, StepWork

BLOCK = 16
PROMPT, LONG = 8, 256
# Requests whose routing is counted: what a few of them prefer is not what all do.
COUNTED = 32
STEPS, COUNTED_STEPS = 6, 12
BUDGET = 4096
VOCAB = 4096
FEW, MANY = 1, 128
PROMPTS = 2
# Of a step's seconds, by which a look at it is off where nothing says by how much.
NOISE = 0.1
# Requests of the steps that tell how fast a machine is now.
NOW = (1, 6)
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class ProbedStep:
    """Either ``decoding`` requests whose prompts were of ``prompt`` tokens, or, where there are 0,
    one prompt of so many."""

    decoding: int
    prompt: int

    @property
    def rows(self) -> int:
        return max(1, self.decoding)

    @property
    def work(self) -> StepWork:
        if not self.decoding:
            return StepWork(self.prompt, 0, 0.0, self.prompt * (self.prompt + 1) / 2, 1)
        context = self.decoding * (self.prompt + STEPS / 2)
        return StepWork(0, self.decoding, context, 0.0, self.decoding)


# Of the deepest decoder, and of the shallower one.
KINDS = (
    *(ProbedStep(size, PROMPT) for size in (1, 2, 6, 12, 24, 48, 128)),
    *(ProbedStep(size, LONG) for size in (2, 6)),
    *(ProbedStep(0, length) for length in (16, 64, 192, 512)),
)
SHALLOW_KINDS = (*(ProbedStep(size, PROMPT) for size in (1, 12, 48)), ProbedStep(0, 64))


class AnsweringDecoder:
    """Logits lie ready: what a step takes with it is not the model's."""

    def __init__(self, ops: Ops, rows: int, vocab: int = VOCAB) -> None:
        self.ops = ops
        self._logits_RV = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(1))

    def new_cache(self, num_blocks: int, block_size: int) -> None:
        return None

    def forward_micro(
        self, steps: Sequence[StepBatch], cache: None, observer: object = None
    ) -> list[Tensor]:
        return [self._logits_RV[: len(step.logit_rows_R)] for step in steps]


@dataclass(frozen=True, slots=True)
class TimedStep:
    """A step of a decoder of so many layers of ``hidden`` size; what it took beside what was known
    of it is ``left`` of ``seconds``."""

    kind: ProbedStep
    layers: int
    hidden: int
    seconds: float
    left: float


def step_seconds(
    decoder: Forward[Any],
    requests: int,
    prompt: int,
    answer: int,
    clock: Clock,
    *,
    budget: int = BUDGET,
    vocab: int = VOCAB,
    observer: StepObserver | None = None,
    seed: int = 0,
) -> list[tuple[StepPlan, float]]:
    """All steps of so many requests that come at once, and what each took. Each ``seed`` has its
    own prompts."""
    counters = Counters()
    length = prompt + answer + 2
    blocks = requests * (length // BLOCK + 1)
    config = SchedulerConfig(length, min(requests, budget), budget, prefix_cache=False)
    scheduler = Scheduler(config, BlockPool(blocks, BLOCK, counters), counters)
    runner = ModelRunner(decoder, blocks, BLOCK, observer=observer)
    draw = random.Random(length + (seed << 32))
    params = SamplingParams(max_tokens=answer, temperature=0, ignore_eos=True)
    for r in range(requests):
        ids = tuple(draw.choices(range(1, vocab), k=prompt))
        scheduler.add(Request(RequestId(str(r)), ids, params))
    found = []
    while scheduler.has_work:
        begin = clock()
        plan = scheduler.plan(0.0)
        scheduler.apply(runner.run(plan))
        found.append((plan, clock() - begin))
    return found


def seconds_of(decoder: Forward[Any], kind: ProbedStep, clock: Clock, vocab: int) -> list[float]:
    """Of several steps of the kind."""
    if kind.decoding:
        steps = step_seconds(decoder, kind.decoding, kind.prompt, STEPS, clock, vocab=vocab)
        return [took for plan, took in steps if plan.num_tokens == kind.decoding]
    steps = step_seconds(decoder, PROMPTS, kind.prompt, 1, clock, budget=kind.prompt, vocab=vocab)
    return [took for _, took in steps[1:]]


def python_overheads(ops: Ops, clock: Clock, vocab: int) -> Overheads:
    """``step`` and ``row``, from two sizes of steps that only choose among so many tokens."""

    def of(size: int) -> float:
        decoder = AnsweringDecoder(ops, size, vocab)
        return median(seconds_of(decoder, ProbedStep(size, PROMPT), clock, vocab))

    few, many = of(FEW), of(MANY)
    row = max(0.0, many - few) / (MANY - FEW)
    return Overheads(step=max(0.0, few - row * FEW), row=row)


def counted_use(decoder: Forward[Any], vocab: int) -> UseCounter:
    """Of steps like those that are timed."""
    counter = UseCounter()
    step_seconds(
        decoder, COUNTED, PROMPT, COUNTED_STEPS, lambda: 0.0, vocab=vocab, observer=counter
    )
    return counter


def with_use(model: ModelDemand, counter: UseCounter) -> ModelDemand:
    """The same with the use of experts that was counted."""
    top_k = [layer.experts.top_k for n, layer in model.layers for _ in range(n) if layer.experts]
    count = [layer.experts.count for n, layer in model.layers for _ in range(n) if layer.experts]
    chosen = [counter.chosen[layer] for layer in sorted(counter.chosen)]
    use = [
        use_of([*seen.tolist(), *[0] * (experts - len(seen))], k)
        for seen, experts, k in zip(chosen, count, top_k, strict=True)
    ]
    return model.with_use(use)


def slowness(decoder: Forward[Any], predictor: StepPredictor, clock: Clock) -> float:
    """How many times as long as predicted steps of few requests take now."""
    took = predicted = 0.0
    for size in NOW:
        kind = ProbedStep(size, PROMPT)
        took += median(seconds_of(decoder, kind, clock, predictor.model.vocab))
        predicted += predictor.step(kind.work).total
    return took / predicted


class StepLooks:
    """Steps of ``decoders``, the deepest last, each of a vocabulary and a most of positions: what
    they took, look by look."""

    def __init__(self, decoders: Sequence[Forward[Any]], models: Sequence[ModelDemand]) -> None:
        self._decoders, self._models = decoders, models
        self._seen: dict[tuple[int, ProbedStep], list[float]] = {
            (n, kind): []
            for n, model in enumerate(models)
            for kind in (KINDS if n == len(models) - 1 else SHALLOW_KINDS)
            if kind.prompt + STEPS < model.max_positions
        }

    def look(self, clock: Clock, until: float = math.inf, *, long: bool = True) -> None:
        """At each kind, or at as many as begin before that second of ``time.monotonic``; at those
        behind long prompts, which take most of the time, only where asked."""
        for (n, kind), took in self._seen.items():
            if time.monotonic() > until:
                return
            if long or kind.prompt != LONG:
                seconds = seconds_of(self._decoders[n], kind, clock, self._models[n].vocab)
                took.append(max(LEAST_SECONDS, median(seconds)))

    def steps(self, predictors: Sequence[StepPredictor]) -> list[TimedStep]:
        """The means; the predictor of each decoder says what a step would take without what is to
        be found."""
        found = []
        for (n, kind), took in self._seen.items():
            model, typical = predictors[n].model, fmean(took)
            left = typical - predictors[n].step(kind.work).total
            found.append(TimedStep(kind, model.num_layers, model.hidden, typical, left))
        return found

    def noise(self) -> float:
        """Of a mean's seconds, by which it is off, by how far apart looks at a kind are."""
        shares = [
            variance(took) / fmean(took) ** 2 / len(took)
            for took in self._seen.values()
            if len(took) > 1
        ]
        return fmean(shares) ** 0.5 if shares else NOISE
