"""What a step costs beside products and attention: Python's part, and what layers do in between.

Python's part is measured with a decoder that does nothing, by the real scheduler and runner. The
layers' part is what is left of real steps, of the model's first layers where they are small enough
and else of the model that is shipped, once products and attention are taken off: norms, rotations,
routing, rounding, the combine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moeserve.core import Counters, Request, RequestId, SamplingParams
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


def decode_step_seconds(decoder: Forward[Any], batch: int, clock: Clock) -> float:
    """The shortest of several steps in which ``batch`` requests decode."""
    counters = Counters()
    length = PROMPT + STEPS + 2
    blocks = batch * (length // BLOCK + 1)
    config = SchedulerConfig(length, batch, BUDGET, prefix_cache=False)
    scheduler = Scheduler(config, BlockPool(blocks, BLOCK, counters), counters)
    runner = ModelRunner(decoder, blocks, BLOCK)
    params = SamplingParams(max_tokens=STEPS, temperature=0, ignore_eos=True)
    for r in range(batch):
        prompt = tuple((7 * r + 13 * i) % 1000 + 1 for i in range(PROMPT))
        scheduler.add(Request(RequestId(str(r)), prompt, params))
    shortest = float("inf")
    while scheduler.has_work:
        begin = clock()
        plan = scheduler.plan(0.0)
        scheduler.apply(runner.run(plan))
        took = clock() - begin
        if plan.num_tokens == batch and took > 0:
            shortest = min(shortest, took)
    return shortest


def python_overheads(ops: Ops, clock: Clock) -> Overheads:
    """``step`` and ``row``, from two sizes of steps that do nothing else."""
    few = decode_step_seconds(AnsweringDecoder(ops, FEW), FEW, clock)
    many = decode_step_seconds(AnsweringDecoder(ops, MANY), MANY, clock)
    row = max(0.0, many - few) / (MANY - FEW)
    return Overheads(step=max(0.0, few - row * FEW), row=row)


def layer_overheads(
    decoder: Forward[Any],
    predictor_of: Callable[[Overheads], StepPredictor],
    python: Overheads,
    clock: Clock,
) -> Overheads:
    """``python`` and what the layers add to it. ``predictor_of`` predicts the decoder's steps with
    given overheads."""
    predictor = predictor_of(python)
    model = predictor.model
    points: list[tuple[float, float, float]] = []
    for batch in SIZES:
        context = batch * (PROMPT + STEPS / 2)
        predicted = predictor.step(StepWork(0, batch, context, 0.0, batch)).total
        took = decode_step_seconds(decoder, batch, clock)
        left = (took - predicted) / model.num_layers
        points.append((batch * model.hidden, left, took / model.num_layers))
    layer, value = line_through(points)
    return Overheads(python.step, python.row, layer, value)


def line_through(points: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Of points (x, y, size): where the line nearest to them starts, and how it rises, neither
    below 0. How far it is off counts in proportion to each point's size, squared."""
    tried = [(0.0, max(0.0, y) / x) for x, y, _ in points]
    tried += [(max(0.0, y), 0.0) for _, y, _ in points]
    for i, (x, y, _) in enumerate(points):
        for u, v, _ in points[i + 1 :]:
            rise = (v - y) / (u - x)
            if rise >= 0 and y - rise * x >= 0:
                tried.append((y - rise * x, rise))

    def off(line: tuple[float, float]) -> float:
        start, rise = line
        return math.fsum(((start + rise * x - y) / size) ** 2 for x, y, size in points)

    return min(tried, key=off)
