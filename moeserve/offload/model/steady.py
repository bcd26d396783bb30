"""Stage 2 in closed form: K requests through a server that overlaps prefill and decode. Pure.

A reconstruction, for the paper's equations 9 to 14 are not to be had; it has every property that is
known of them. In steady state q requests begin in each step, so that n = q (p + g) tokens are in a
step (eq 8). KV is held in blocks of b tokens: q times the sum over j = 0..g-1 of ceil((p + j) / b)
is at most the blocks there are. The first requests begin as the first step does, the last ones end
g steps after they began: I = K / q + g - 1 steps (eq 12). As K grows and b is 1, tokens per second
become those of stage 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from moeserve.offload.model.predict import StepPredictor, StepSeconds, StepWork
from moeserve.offload.model.workload import ServerBounds, UniformWorkload


@dataclass(frozen=True, slots=True)
class SteadyPrediction:
    """``per_step`` requests begin in each of ``steps``; ``tokens`` are in one of them. Tokens per
    second are those of prompts and answers, and of answers alone."""

    per_step: float
    tokens: float
    steps: float
    step: StepSeconds
    seconds: float
    tokens_per_s: float
    generated_per_s: float


def blocks_over_life(work: UniformWorkload, block_size: int) -> int:
    """The sum over a request's steps of the blocks that it holds."""
    first, last = work.prompt, work.prompt + work.output - 1

    def up_to(tokens: int) -> int:
        """Of ceil(i / b) for i = 1..tokens."""
        whole, rest = divmod(tokens, block_size)
        return block_size * whole * (whole + 1) // 2 + rest * (whole + 1)

    return up_to(last) - up_to(first - 1)


def begin_per_step(work: UniformWorkload, bounds: ServerBounds) -> float:
    """q: by KV, by the tokens and the sequences that a step may have, and by how many there are."""
    by_kv = bounds.num_blocks / blocks_over_life(work, bounds.block_size)
    by_tokens = bounds.max_num_batched_tokens / work.length
    by_sequences = bounds.max_num_seqs / work.output
    return min(by_kv, by_tokens, by_sequences, float(work.requests))


def steady(
    predictor: StepPredictor, work: UniformWorkload, bounds: ServerBounds
) -> SteadyPrediction:
    """Steps of the prologue and the epilogue are charged as whole ones, as the paper does."""
    bounds.concurrent(work)
    q = begin_per_step(work, bounds)
    decoding = q * (work.output - 1)
    step = predictor.step(
        StepWork(
            prefill_tokens=q * work.prompt,
            decode_tokens=decoding,
            decode_context=decoding * (work.prompt + work.output / 2),
            prefill_pairs=q * work.prompt * (work.prompt + 1) / 2,
            rows=q * work.output,
            made=work.output / 2,
        )
    )
    steps = work.requests / q + work.output - 1
    seconds = steps * step.total
    return SteadyPrediction(
        per_step=q,
        tokens=q * work.length,
        steps=steps,
        step=step,
        seconds=seconds,
        tokens_per_s=work.requests * work.length / seconds,
        generated_per_s=work.requests * work.output / seconds,
    )
