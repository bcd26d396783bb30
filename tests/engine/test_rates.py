"""Rates of a rank: what steps did in how long, the newest counting most."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moeserve.core import Chunk, FinishReason, Request, RequestId, SamplingParams, StepPlan, Timing
from moeserve.engine.loop import Unobserved
from moeserve.engine.rates import MEMORY_S, RatedSteps, StepRates, is_decode
from moeserve.engine.step_cost import DecodeCost, FittedStepCost

REQUEST = Request(RequestId("r"), tuple(range(100)), SamplingParams())


def prompt(tokens: int, start: int = 0) -> Chunk:
    return Chunk(REQUEST, tuple(range(tokens)), start, (), samples=0)


def decode(drafts: int = 0) -> Chunk:
    return Chunk(REQUEST, (1,) * (1 + drafts), 104, (), samples=1 + drafts, output_ids=[0] * 5)


def plan(*chunks: Chunk) -> StepPlan:
    return StepPlan(chunks)


def test_a_chunk_of_newest_tokens_and_drafts_decodes() -> None:
    assert is_decode(decode())
    assert is_decode(decode(drafts=3))
    assert not is_decode(prompt(1))
    again = decode()._replace(token_ids=(1,) * 9, start=96)
    assert not is_decode(again)  # what was preempted is computed anew


def test_nothing_is_known_before_the_first_step() -> None:
    rates = StepRates()
    assert (rates.prefill_rate, rates.step_s) == (0.0, 0.0)
    rates.note(plan(), 1.0)
    assert (rates.prefill_rate, rates.step_s) == (0.0, 0.0)


def test_steps_with_prompts_give_the_rate_and_others_the_time_of_a_step() -> None:
    rates = StepRates()
    rates.note(plan(decode(), decode()), 0.02)
    assert rates.step_s == pytest.approx(0.02)
    rates.note(plan(prompt(30), decode(), prompt(20)), 0.5)
    assert rates.prefill_rate == pytest.approx(100.0)
    assert rates.step_s == pytest.approx(0.02)


def test_rates_follow_and_forget() -> None:
    rates = StepRates()
    for _ in range(50):
        rates.note(plan(prompt(100)), 0.1)
    for _ in range(50):
        rates.note(plan(prompt(100)), 1.0)
    assert rates.prefill_rate == pytest.approx(100.0, rel=0.01)
    before = rates.prefill_rate
    rates.note(plan(prompt(100)), 0.1)
    assert before < rates.prefill_rate < before * (1 + 1 / MEMORY_S)


def test_a_step_that_took_no_time_divides_by_nothing() -> None:
    rates = StepRates()
    rates.note(plan(prompt(5)), 0.0)
    rates.note(plan(decode()), 0.0)
    assert (rates.prefill_rate, rates.step_s) == (0.0, 0.0)


def test_what_guesses_took_is_no_part_of_the_step_that_made_them_and_of_no_other() -> None:
    """Another process may end a step between two that make some."""
    cost, decodes = FittedStepCost(), DecodeCost()
    rated = RatedSteps(Unobserved(), StepRates(), cost, decodes)
    decodes.drafting_s = 0.25
    rated.on_step(replace(plan(decode()), draft_next=2), 1.0)
    rated.on_step(plan(prompt(100)), 2.0)
    assert decodes.seconds(1) == 0.75
    assert cost.seconds(100, 0, 0) == pytest.approx(2.0)


def test_all_that_is_observed_is_passed_on() -> None:
    seen: list[object] = []

    class Watcher:
        def on_step(self, plan: StepPlan, seconds: float) -> None:
            seen.append((len(plan.chunks), seconds))

        def on_gaps(self, gaps: object) -> None:
            seen.append(gaps)

        def on_first_token(self, timing: Timing) -> None:
            seen.append(timing.prompt_tokens)

        def on_finish(self, reason: FinishReason, timing: Timing) -> None:
            seen.append((reason, timing.prompt_tokens))

    rates = StepRates()
    rated = RatedSteps(Watcher(), rates)
    rated.on_step(plan(decode()), 0.5)
    rated.on_gaps({0.5: 1})
    rated.on_first_token(Timing(7, 0, 1, None, None, 1.0))
    rated.on_finish(FinishReason.STOP, Timing(8, 0, 1, None, None, 1.0))
    assert seen == [(1, 0.5), {0.5: 1}, 7, (FinishReason.STOP, 8)]
    assert rates.step_s == pytest.approx(0.5)
