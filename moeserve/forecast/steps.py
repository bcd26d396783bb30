"""What a step costs beside products and attention: Python's part, and what layers do in between.

Python's part is measured with a decoder that does nothing, by the real scheduler and runner. The
rest is what is left of real steps once products and attention are taken off: norms, rotations,
routing, rounding, the combine, and what Python takes more where caches are full of weights. The
steps are of two depths of the model's first layers where these are small enough, else of the model
that is shipped; of one to many requests that decode, and of prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeserve.core import Counters, Request, RequestId, SamplingParams, StepPlan
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.model_runner import Forward, ModelRunner
from moeserve.engine.scheduler import Scheduler
from moeserve.kernels.ops import Ops
from moeserve.models.batch import StepBatch
from moeserve.offload.model.machine import Overheads
from moeserve.offload.model.predict import StepPredictor, StepWork

BLOCK = 16
PROMPT = 8
STEPS = 12
BUDGET = 4096
VOCAB = 4096
FEW, MANY = 1, 128
SIZES = (1, 8, 32, 128)
LENGTHS = (32, 128, 512)
PROMPTS = 6
Clock = Callable[[], float]


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
    """A step of so many tokens of a prompt, or of so many decoding requests; what it took beside
    products and attention is ``left`` of ``seconds``."""

    layers: int
    hidden: int
    prompt: int
    decoding: int
    seconds: float
    left: float

    @property
    def shares(self) -> tuple[float, ...]:
        """How many times it has each of the fields of ``Overheads``, in their order."""
        rows = self.decoding + (self.prompt > 0)
        passed = self.layers * self.hidden
        return 1.0, rows, self.layers, passed * self.decoding, passed * self.prompt


def step_seconds(
    decoder: Forward[Any],
    requests: int,
    prompt: int,
    answer: int,
    clock: Clock,
    *,
    budget: int = BUDGET,
) -> list[tuple[StepPlan, float]]:
    """All steps of so many requests that come at once, and what each took."""
    counters = Counters()
    length = prompt + answer + 2
    blocks = requests * (length // BLOCK + 1)
    config = SchedulerConfig(length, min(requests, budget), budget, prefix_cache=False)
    scheduler = Scheduler(config, BlockPool(blocks, BLOCK, counters), counters)
    runner = ModelRunner(decoder, blocks, BLOCK)
    params = SamplingParams(max_tokens=answer, temperature=0, ignore_eos=True)
    for r in range(requests):
        ids = tuple((7 * r + 13 * i) % 1000 + 1 for i in range(prompt))
        scheduler.add(Request(RequestId(str(r)), ids, params))
    found = []
    while scheduler.has_work:
        begin = clock()
        plan = scheduler.plan(0.0)
        scheduler.apply(runner.run(plan))
        found.append((plan, clock() - begin))
    return found


def decode_step_seconds(decoder: Forward[Any], batch: int, clock: Clock) -> float:
    """The median of several steps in which ``batch`` requests decode."""
    steps = step_seconds(decoder, batch, PROMPT, STEPS, clock)
    return median(took for plan, took in steps if plan.num_tokens == batch)


def prompt_step_seconds(decoder: Forward[Any], tokens: int, clock: Clock) -> float:
    """The median of several steps of one prompt of so many tokens each."""
    steps = step_seconds(decoder, PROMPTS, tokens, 1, clock, budget=tokens)
    return median(took for _, took in steps[1:])


def python_overheads(ops: Ops, clock: Clock) -> Overheads:
    """``step`` and ``row``, from two sizes of steps that do nothing else."""
    few = decode_step_seconds(AnsweringDecoder(ops, FEW), FEW, clock)
    many = decode_step_seconds(AnsweringDecoder(ops, MANY), MANY, clock)
    row = max(0.0, many - few) / (MANY - FEW)
    return Overheads(step=max(0.0, few - row * FEW), row=row)


def timed_steps(
    decoder: Forward[Any], predictor: StepPredictor, clock: Clock
) -> Iterator[TimedStep]:
    """Of both kinds and of several sizes; ``predictor`` says what they would take without what is
    to be found."""
    model = predictor.model
    for decoding, prompt in (*((size, 0) for size in SIZES), *((0, size) for size in LENGTHS)):
        if decoding:
            took = decode_step_seconds(decoder, decoding, clock)
            work = StepWork(0, decoding, decoding * (PROMPT + STEPS / 2), 0.0, decoding)
        else:
            took = prompt_step_seconds(decoder, prompt, clock)
            work = StepWork(prompt, 0, 0.0, prompt * (prompt + 1) / 2, 1)
        left = took - predictor.step(work).total
        yield TimedStep(model.num_layers, model.hidden, prompt, decoding, took, left)


def with_what_is_left(python: Overheads, steps: Sequence[TimedStep]) -> Overheads:
    """``python`` and what ``steps`` took beyond it, in the shares that fit them best."""
    found = nonnegative_fit(
        [step.shares for step in steps],
        [step.left for step in steps],
        [1.0 / step.seconds for step in steps],
    )
    more = Overheads(*found)
    return replace(more, step=python.step + more.step, row=python.row + more.row)


def nonnegative_fit(
    rows: Sequence[Sequence[float]], ys: Sequence[float], weights: Sequence[float]
) -> tuple[float, ...]:
    """What to multiply each column with so that rows add up to ``ys``, as nearly as can be with
    nothing below 0: least squares, weighted. Every choice of columns is tried, so there are to be
    few."""
    weight_N = np.array(weights)
    a_NC, y_N = np.array(rows) * weight_N[:, None], np.array(ys) * weight_N
    width, size_C = a_NC.shape[1], np.maximum(np.abs(a_NC).max(axis=0), 1e-300)
    a_NC /= size_C
    best: tuple[float, ...] = (0.0,) * width
    least = float(y_N @ y_N)
    for count in range(1, width + 1):
        for chosen in combinations(range(width), count):
            x_C, *_ = np.linalg.lstsq(a_NC[:, chosen], y_N, rcond=None)
            off = y_N - a_NC[:, chosen] @ x_C
            if (x_C >= 0).all() and (score := float(off @ off)) < least * (1 - 1e-9):
                found = dict(zip(chosen, (x_C / size_C[list(chosen)]).tolist(), strict=True))
                best, least = tuple(found.get(c, 0.0) for c in range(width)), score
    return best
