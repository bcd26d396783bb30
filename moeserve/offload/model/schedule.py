"""Stage 2 step by step: what the scheduler would run for requests that come at once. Pure.

The scheduler's own order, in numbers alone: the newest token of everyone who generates, then tokens
of prompts in order of arrival as far as the step's budget goes. A request is admitted when there is
room for it to its end, so that nobody is preempted. This is what latencies are predicted from;
``steady`` is the closed form for many more requests than fit at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moeserve.errors import ConfigError
from moeserve.offload.model.predict import StepPredictor, StepSeconds, StepWork
from moeserve.offload.model.workload import ServerBounds, UniformWorkload

# A prediction of more steps takes too long; ``steady`` needs none.
MOST_STEPS = 200_000


@dataclass(slots=True)
class _Group:
    """Requests that are in the same state: ``count`` of them have ``done`` tokens of the prompt and
    ``made`` generated ones. Only a group of one is in the midst of its prompt."""

    count: int
    done: int
    made: int


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """``firsts`` requests get their first token from it, ``ends`` their last."""

    work: StepWork
    firsts: int
    ends: int


def steps_of(work: UniformWorkload, bounds: ServerBounds) -> Iterator[PlannedStep]:
    """In their order, until all requests have ended."""
    concurrent = bounds.concurrent(work)
    budget_of_step = bounds.max_num_batched_tokens
    if budget_of_step < concurrent:
        raise ConfigError(
            f"max_num_batched_tokens={budget_of_step} is less than {concurrent} running requests"
        )
    waiting, groups = work.requests, list[_Group]()
    while waiting or groups:
        running = sum(group.count for group in groups)
        decoding = [group for group in groups if group.made]
        decode_tokens = sum(group.count for group in decoding)
        context = float(sum(g.count * (work.prompt + g.made) for g in decoding))
        made = sum(g.count * (g.made - 1) for g in decoding) / max(1, decode_tokens)
        budget = budget_of_step - decode_tokens
        firsts, prefill, pairs = 0, 0, 0.0
        fresh: list[_Group] = []
        for group in [g for g in groups if not g.made]:
            taken = min(budget, work.prompt - group.done)
            pairs += taken * group.done + taken * (taken + 1) / 2
            group.done += taken
            budget, prefill = budget - taken, prefill + taken
            if group.done == work.prompt:
                firsts += 1
                fresh.append(group)
        whole = min(waiting, concurrent - running, budget // work.prompt)
        if whole > 0:
            fresh.append(_Group(whole, work.prompt, 0))
            groups.append(fresh[-1])
            tokens = whole * work.prompt
            budget, prefill, firsts = budget - tokens, prefill + tokens, firsts + whole
            pairs += tokens * (work.prompt + 1) / 2
            waiting, running = waiting - whole, running + whole
        if waiting and running < concurrent and budget:
            groups.append(_Group(1, budget, 0))
            pairs += budget * (budget + 1) / 2
            prefill += budget
            waiting -= 1
        for group in (*decoding, *fresh):
            group.made += 1
        ended = [group for group in groups if group.made == work.output]
        groups = [group for group in groups if group.made < work.output]
        rows = decode_tokens + firsts
        step = StepWork(prefill, decode_tokens, context, pairs, rows, made)
        yield PlannedStep(step, firsts, sum(group.count for group in ended))


@dataclass(frozen=True, slots=True)
class BatchPrediction:
    """Of all requests together. ``ttft_s`` is the mean time to a first token and ``tpot_s`` the
    mean time between tokens after it; ``busy`` adds up all steps. ``prefill_s`` is when the last
    request has its first token."""

    concurrent: int
    steps: int
    seconds: float
    generated_per_s: float
    tokens_per_s: float
    ttft_s: float
    worst_ttft_s: float
    tpot_s: float
    prefill_s: float
    busy: StepSeconds

    @property
    def decode_s(self) -> float:
        return self.seconds - self.prefill_s


def predict_batch(
    predictor: StepPredictor, work: UniformWorkload, bounds: ServerBounds
) -> BatchPrediction:
    """ConfigError where no request fits, or it would take too many steps to say."""
    now, count, first_sum, last_sum, worst = 0.0, 0, 0.0, 0.0, 0.0
    busy = StepSeconds()
    for planned in steps_of(work, bounds):
        if count == MOST_STEPS:
            raise ConfigError(f"more than {MOST_STEPS} steps: ask for fewer requests or tokens")
        step = predictor.step(planned.work)
        busy += step
        now += step.total
        count += 1
        first_sum += planned.firsts * now
        last_sum += planned.ends * now
        if planned.firsts:
            worst = now
    gaps = work.requests * (work.output - 1)
    return BatchPrediction(
        concurrent=bounds.concurrent(work),
        steps=count,
        seconds=now,
        generated_per_s=work.requests * work.output / now,
        tokens_per_s=work.requests * work.length / now,
        ttft_s=first_sum / work.requests,
        worst_ttft_s=worst,
        tpot_s=(last_sum - first_sum) / gaps if gaps else 0.0,
        prefill_s=worst,
        busy=busy,
    )
