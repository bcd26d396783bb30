"""Guesses of a smaller model: tokens stay what they are, whatever it guesses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeserve.config.options import RankModelOptions
from moeserve.config.steps import StepOptions
from moeserve.core import (
    Chunk,
    Counters,
    FinishReason,
    Logprobs,
    Request,
    RequestId,
    Sampled,
    SamplingParams,
)
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.draft_loading import load_draft
from moeserve.engine.draft_model import DraftModel
from moeserve.engine.drive import drive
from moeserve.engine.model_runner import ModelRunner
from moeserve.engine.policies.choices import Drafter
from moeserve.engine.policies.made import MadeDrafts
from moeserve.engine.policies.ngrams import NgramDrafts
from moeserve.engine.policies.speculation import FixedDrafts, Speculation
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.step_cost import DecodeCost, FittedStepCost
from moeserve.errors import ConfigError
from moeserve.kernels.ops import Linear, Ops
from moeserve.kernels.reference.ops import ReferenceOps
from moeserve.models.checkpoint import Checkpoint
from moeserve.models.decoder import Decoder

Made = dict[str, list[tuple[int, Logprobs | None, FinishReason | None]]]
TinyCheckpoint = Callable[[str], Path]
TinyDecoder = Callable[[str], Decoder]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
KINDS = (
    GREEDY,
    replace(GREEDY, max_tokens=9, logprobs=2),
    SamplingParams(temperature=0.8, top_p=0.95, seed=5, max_tokens=20, ignore_eos=True),
    SamplingParams(temperature=0.8, seed=7, max_tokens=20, stop_token_ids=tuple(range(20, 90))),
    SamplingParams(temperature=0, repetition_penalty=1.3, max_tokens=16, ignore_eos=True),
)


def request(number: int, params: SamplingParams, length: int = 12) -> Request:
    draw = torch.Generator().manual_seed(number)
    ids = torch.randint(5, 250, (length,), generator=draw).tolist()
    return Request(RequestId(f"r{number}"), tuple(ids), params)


def run(
    decoder: Decoder,
    draft: Decoder,
    requests: Sequence[Request],
    drafter: Drafter | None,
    *,
    num_blocks: int = 128,
    draft_blocks: int = 128,
    budget: int = 64,
) -> tuple[Made, Counters]:
    counters = Counters()
    config = SchedulerConfig(100, 6, budget)
    scheduler = Scheduler(config, BlockPool(num_blocks, 4, counters), counters, drafter=drafter)
    drafts = DraftModel(decoder, draft, draft_blocks, 4, budget) if drafter is not None else None
    runner = ModelRunner(decoder, num_blocks, 4, drafts=drafts)
    made: Made = {r.id: [] for r in requests}
    for one in requests:
        scheduler.add(one)
    for step in drive(scheduler, runner):
        step.raise_failure()
        for out in step.outs:
            made[out.request_id].append((out.token_id, out.logprobs, out.finish))
    if drafts is not None:
        drafts.forget(r.id for r in requests)
        assert drafts.num_free == draft_blocks
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
    max_examples=6,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=6),
    st.integers(14, 60),
    st.integers(6, 64),
    st.integers(2, 40),
    st.integers(1, 5),
    st.sampled_from([fixed, chosen]),
    st.sampled_from(["qwen3_moe", "deepseek_v3"]),
)
def test_guesses_change_nothing(
    tiny_decoder: TinyDecoder,
    kinds: list[SamplingParams],
    num_blocks: int,
    budget: int,
    draft_blocks: int,
    count: int,
    drafter: Callable[[int], Drafter],
    draft: str,
) -> None:
    """Greedy, sampled, scored and stopped early; with preemption, chunks and prefix hits; whether
    the draft model is always right or nearly never, and whether its memory is enough."""
    model = tiny_decoder("qwen3_moe")
    requests = [request(i % 3, params) for i, params in enumerate(kinds)]
    requests = [replace(r, id=RequestId(f"r{i}")) for i, r in enumerate(requests)]
    plain, _ = run(model, model, requests, None)
    sizes = {"num_blocks": num_blocks, "budget": budget, "draft_blocks": draft_blocks}
    assert run(model, tiny_decoder(draft), requests, drafter(count), **sizes)[0] == plain


@pytest.mark.parametrize("num_blocks", [128, 16], ids=["enough", "preempted"])
def test_a_model_that_drafts_for_itself_is_always_right(
    tiny_decoder: TinyDecoder, num_blocks: int
) -> None:
    """Greedy: each step makes as many tokens as it checks guesses and one more, from the first one
    behind the prompt on. What is read of a request beside is its prompt, but for the newest token,
    and more where it was preempted."""
    model = tiny_decoder("qwen3_moe")
    requests = [request(i, GREEDY) for i in range(3)]
    plain, _ = run(model, model, requests, None)
    made, counters = run(model, model, requests, fixed(3), num_blocks=num_blocks)
    assert made == plain
    assert counters.accepted_tokens == counters.drafted_tokens > 0
    if num_blocks == 128:
        assert counters.steps == 1 + 6  # of 24 tokens the first, then 4, 4, 4, 4, 4, 3
        assert (counters.preemptions, counters.draft_read_tokens) == (0, 3 * 11)
    else:
        assert counters.preemptions > 0
        assert counters.draft_read_tokens > 3 * 11


def test_a_long_request_is_read_in_several_steps(tiny_decoder: TinyDecoder) -> None:
    """So many tokens a step; meanwhile it has no guesses, and others have theirs."""
    model = tiny_decoder("qwen3_moe")
    maker = DraftModel(model, model, 64, 4, 8)
    requests = [request(0, GREEDY, 18), request(1, GREEDY, 3)]
    outputs: list[list[int]] = [[], []]
    read, guessed = [], []
    for _ in range(4):
        chunks, sampled = [], [Sampled(one.id, (7,)) for one in requests]
        for one, made in zip(requests, outputs, strict=True):
            had = (*one.prompt_ids, *made)
            chunks.append(Chunk(one, had[-1:], len(had) - 1, (), 1, made))
        found = {one.request_id: one for one in maker.make(chunks, [], sampled, 2)}
        for made in outputs:
            made.append(7)
        read.append([found[one.id].read for one in requests])
        guessed.append([len(found[one.id].token_ids) for one in requests])
    assert read == [[6, 2], [8, 0], [5, 0], [0, 0]]
    assert guessed == [[0, 2], [0, 2], [2, 2], [2, 2]]


def test_no_guesses_beyond_the_draft_models_positions(tiny_decoder: TinyDecoder) -> None:
    model = tiny_decoder("qwen3_moe")
    short = replace(model, spec=replace(model.spec, max_positions=20))
    requests = [request(0, GREEDY)]
    plain, _ = run(model, model, requests, None)
    made, counters = run(model, short, requests, fixed(3))
    assert made == plain
    assert 0 < counters.drafted_tokens < 12


def test_tokens_that_the_draft_model_does_not_know_are_not_read(tiny_decoder: TinyDecoder) -> None:
    model = tiny_decoder("qwen3_moe")
    known = max(request(0, GREEDY).prompt_ids)
    draft = replace(model, spec=replace(model.spec, vocab=known))
    made, counters = run(model, draft, [request(0, GREEDY)], fixed(3))
    assert made == run(model, model, [request(0, GREEDY)], None)[0]
    assert counters.drafted_tokens == counters.draft_read_tokens == 0


def test_other_tokens_are_refused_with_both_sizes(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, ops: Ops
) -> None:
    path = tiny_checkpoint("qwen3_moe")
    other = tmp_path / "other"
    shutil.copytree(path, other)
    options = RankModelOptions(model=str(path), speculation="draft", draft_model=str(other))
    checkpoint = Checkpoint.open(path)
    found = load_draft(options, checkpoint, ops)
    assert found.decoder is not None and found.weights > 0 and found.kv_bytes_per_token > 0
    known = json.loads((other / "tokenizer.json").read_text())
    size = len(known["model"]["vocab"])
    known["added_tokens"].append({**known["added_tokens"][0], "content": "<more>", "id": size})
    (other / "tokenizer.json").write_text(json.dumps(known))
    told = rf"has {size + 1} tokens, .* {size}; {size} are the same"
    with pytest.raises(ConfigError, match=told):
        load_draft(options, checkpoint, ops)
    (other / "tokenizer.json").write_text("[" * 100_000)
    for guesses in (True, False):
        with pytest.raises(ConfigError, match="no list of tokens"):
            load_draft(options, checkpoint, ops, guesses=guesses)
    for wrong in ({"draft_model": None}, {"speculation": "mtp"}):
        with pytest.raises(ConfigError, match=r"draft.model"):
            load_draft(options.model_copy(update=wrong), checkpoint, ops)
    (other / "tokenizer.json").unlink()  # then sizes alone are compared
    assert load_draft(options, checkpoint, ops).decoder is not None
    nothing = load_draft(options, checkpoint, ops, guesses=False)  # a rank without requests
    assert nothing.decoder is None and nothing.kv_bytes_per_token == 0


def test_memory_that_the_draft_model_fills_is_refused(
    tiny_checkpoint: TinyCheckpoint, ops: Ops
) -> None:
    path = str(tiny_checkpoint("qwen3_moe"))
    options = RankModelOptions(
        model=path, speculation="auto", draft_model=path, device_memory=2 << 20
    )
    found = load_draft(options, Checkpoint.open(path), ops)
    assert found.within(options).device_memory == (2 << 20) - found.weights
    with pytest.raises(ConfigError, match=f"takes {found.weights} bytes"):
        found.within(options.model_copy(update={"device_memory": found.weights}))

    class FullOps(ReferenceOps):
        """Of a device on which there is no room for a matrix."""

        def pack_linear(self, *args: Any) -> Linear:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")

    with pytest.raises(ConfigError, match=f"no room for its weights, {found.weights} bytes"):
        load_draft(options, Checkpoint.open(path), FullOps())


def test_the_module_has_no_part_where_a_draft_model_guesses() -> None:
    """So nothing of it is loaded within a budget."""
    asks = [
        StepOptions(speculation=wanted, draft_model=draft).asks_the_module
        for wanted, draft in (("mtp", None), ("auto", None), ("auto", "a"), ("draft", "a"))
    ]
    assert asks == [True, True, False, False]
