"""Prefill and decode of our runtime: scheduler, executor and model, without a server.

One clock for all runtimes: prefill ends when every stream has its first token, decode is what
comes after it. Prompts are drawn from the whole vocabulary, each stream's its own.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from moeserve.bench.roofline import LoadCounter, Roofline, step_seconds
from moeserve.core import Counters, Request, RequestId, SamplingParams
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.drive import drive
from moeserve.engine.model_runner import ModelRunner, StepObserver
from moeserve.engine.scheduler import Scheduler
from moeserve.models.decoder import Decoder

BLOCK = 16
STEP_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Case:
    """``streams`` requests at once: so many tokens in, and so many out."""

    streams: int
    prompt: int
    answer: int


@dataclass(frozen=True, slots=True)
class CaseTiming:
    """Seconds of both phases, measured or at least, and the tokens that each computed."""

    prefill_s: float
    decode_s: float
    prompted: int
    decoded: int
    prefill_steps: int

    @property
    def prefill_rate(self) -> float:
        return self.prompted / self.prefill_s

    @property
    def decode_rate(self) -> float:
        return self.decoded / self.decode_s


def prompts(case: Case, vocab: int) -> list[tuple[int, ...]]:
    """The same for every runtime; id 0 is left out, for it often ends a text."""
    draw = random.Random(case.prompt)
    return [tuple(draw.choices(range(1, vocab), k=case.prompt)) for _ in range(case.streams)]


def run_case(decoder: Decoder, case: Case, observer: StepObserver | None = None) -> CaseTiming:
    return run_prompts(decoder, prompts(case, decoder.spec.vocab), case.answer, observer)


def run_prompts(
    decoder: Decoder,
    asked: Sequence[tuple[int, ...]],
    answer: int,
    observer: StepObserver | None = None,
) -> CaseTiming:
    """All of them at once, each with so many tokens for an answer."""
    counters = Counters()
    longest = max(map(len, asked)) + answer
    blocks = len(asked) * (longest // BLOCK + 2)
    config = SchedulerConfig(longest, len(asked), max(STEP_TOKENS, len(asked)), prefix_cache=False)
    scheduler = Scheduler(config, BlockPool(blocks, BLOCK, counters), counters)
    executor = ModelRunner(decoder, blocks, BLOCK, observer=observer)
    params = SamplingParams(max_tokens=answer, temperature=0, ignore_eos=True)
    silent = {RequestId(str(s)) for s in range(len(asked))}
    for s, prompt in enumerate(asked):
        scheduler.add(Request(RequestId(str(s)), prompt, params))
    steps = decoded = 0
    began = first = time.perf_counter()
    for step in drive(scheduler, executor):
        step.raise_failure()
        if not silent:
            decoded += len(step.outs)
            continue
        steps += 1
        silent -= {out.request_id for out in step.outs}
        if not silent:
            first = time.perf_counter()
    took = time.perf_counter() - first
    return CaseTiming(first - began, took, sum(map(len, asked)), decoded, steps)


def bounds(decoder: Decoder, case: Case, limit: Roofline) -> CaseTiming:
    """The same with the roofline's seconds, from a run that counts what its steps touch."""
    counter = LoadCounter(decoder.spec)
    timing = run_case(decoder, case, counter)
    seconds = [step_seconds(decoder.spec, load, limit) for load in counter.steps]
    split = timing.prefill_steps
    return replace(timing, prefill_s=sum(seconds[:split]), decode_s=sum(seconds[split:]))
