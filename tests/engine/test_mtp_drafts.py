"""The demo model's own guesses: tokens stay what they are, steps become fewer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeserve.core import Counters, FinishReason, Logprobs, Request, RequestId, SamplingParams
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.drive import drive
from moeserve.engine.model_runner import ModelRunner
from moeserve.engine.mtp_drafts import WINDOW, MtpDrafts
from moeserve.engine.policies.choices import Drafter
from moeserve.engine.policies.made import MadeDrafts
from moeserve.engine.policies.ngrams import NgramDrafts
from moeserve.engine.policies.speculation import FixedDrafts, Speculation
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.step_cost import DecodeCost, FittedStepCost
from moeserve.errors import ConfigError
from moeserve.kernels.select import choose_ops
from moeserve.models.decoder import Decoder, load_decoder
from moeserve.models.library import resolve_model

Made = dict[str, list[tuple[int, Logprobs | None, FinishReason | None]]]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
KINDS = (
    GREEDY,
    replace(GREEDY, max_tokens=9, logprobs=2),
    SamplingParams(temperature=0.8, top_p=0.95, seed=5, max_tokens=20, ignore_eos=True),
    SamplingParams(temperature=0.8, seed=7, max_tokens=20, stop_token_ids=tuple(range(200, 900))),
    SamplingParams(temperature=0, repetition_penalty=1.3, max_tokens=16, ignore_eos=True),
)


@pytest.fixture(scope="module")
def demo() -> Decoder:
    return load_decoder(resolve_model("demo"), choose_ops())


def request(number: int, params: SamplingParams, length: int = 12) -> Request:
    draw = torch.Generator().manual_seed(number)
    ids = torch.randint(5, 2000, (length,), generator=draw).tolist()
    return Request(RequestId(f"r{number}"), tuple(ids), params)


def run(
    decoder: Decoder,
    requests: Sequence[Request],
    drafter: Drafter | None,
    *,
    num_blocks: int = 128,
    budget: int = 64,
    places: int = 8,
) -> tuple[Made, Counters]:
    counters = Counters()
    config = SchedulerConfig(400, 6, budget)
    scheduler = Scheduler(config, BlockPool(num_blocks, 4, counters), counters, drafter=drafter)
    drafts = None if drafter is None else MtpDrafts(decoder, places)
    runner = ModelRunner(decoder, num_blocks, 4, drafts=drafts)
    made: Made = {r.id: [] for r in requests}
    for one in requests:
        scheduler.add(one)
    for step in drive(scheduler, runner):
        step.raise_failure()
        for out in step.outs:
            made[out.request_id].append((out.token_id, out.logprobs, out.finish))
    return made, counters


def fixed(count: int) -> Drafter:
    return FixedDrafts(None, count, MadeDrafts())


def chosen(count: int) -> Drafter:
    """As many as pay, where a step costs the same whatever is in it, and so do guesses."""
    decodes, steps = DecodeCost(), FittedStepCost()
    for tokens in (1, 64):
        decodes.note(tokens, 1.0)
        steps.note(tokens, 1.0)
    return Speculation(NgramDrafts(), decodes, steps, most=count, made=MadeDrafts())


@settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=6),
    st.integers(14, 60),
    st.integers(6, 64),
    st.integers(1, 8),
    st.integers(1, 5),
    st.sampled_from([fixed, chosen]),
)
def test_guesses_change_nothing(
    demo: Decoder,
    kinds: list[SamplingParams],
    num_blocks: int,
    budget: int,
    places: int,
    count: int,
    drafter: Callable[[int], Drafter],
) -> None:
    """Greedy, sampled, scored and stopped early; with preemption, chunks and prefix hits."""
    requests = [request(i % 3, params) for i, params in enumerate(kinds)]
    requests = [replace(r, id=RequestId(f"r{i}")) for i, r in enumerate(requests)]
    plain, _ = run(demo, requests, None)
    sizes = {"num_blocks": num_blocks, "budget": budget, "places": places}
    assert run(demo, requests, drafter(count), **sizes)[0] == plain


def test_most_guesses_of_the_demo_model_are_right(demo: Decoder) -> None:
    """Also behind more positions than the window has."""
    requests = [request(i, replace(GREEDY, max_tokens=2 * WINDOW)) for i in range(2)]
    plain, before = run(demo, requests, None)
    made, counters = run(demo, requests, fixed(2))
    assert made == plain
    assert counters.steps < 0.7 * before.steps
    assert counters.accepted_tokens > 0.4 * counters.drafted_tokens


def test_without_the_module_the_setting_is_refused(demo: Decoder) -> None:
    with pytest.raises(ConfigError, match="no multi-token prediction"):
        MtpDrafts(replace(demo, mtp=None), 4)
