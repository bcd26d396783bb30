"""Log-probabilities of prompts: each token's once, in order, whatever the steps were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.core import (
    BlockId,
    Chunk,
    Counters,
    Logprobs,
    Request,
    RequestId,
    SamplingParams,
    StepPlan,
)
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.drive import drive
from moeserve.engine.executor import Executor
from moeserve.engine.model_runner import ModelRunner
from moeserve.engine.null import NullExecutor
from moeserve.engine.policies.choices import Drafter
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.sequence import SequenceState
from moeserve.engine.step_builder import MOST_SCORED
from moeserve.kernels.reference.ops import ReferenceOps
from moeserve.kernels.reference.sampling import logprobs_of
from moeserve.models.decoder import Decoder

BLOCK, VOCAB = 4, 50


def ask(name: str, prompt: Sequence[int], wanted: int | None = 2, **params: object) -> Request:
    given: dict[str, object] = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
    sampling = SamplingParams(**given | params, prompt_logprobs=wanted)  # type: ignore[arg-type]
    return Request(RequestId(name), tuple(prompt), sampling)


class Run:
    """Requests by wave, each of which starts when the one before has ended; what was made."""

    def __init__(
        self,
        executor: Executor,
        waves: Sequence[Sequence[Request]],
        num_blocks: int = 64,
        budget: int = 1024,
        drafter: Drafter | None = None,
        block_size: int = BLOCK,
    ) -> None:
        self.counters = Counters()
        self.scores: dict[str, list[Logprobs]] = {r.id: [] for wave in waves for r in wave}
        self.tokens: dict[str, list[int]] = {r.id: [] for wave in waves for r in wave}
        self.most_scored = 0
        config = SchedulerConfig(1024, max_num_seqs=4, max_num_batched_tokens=budget)
        pool = BlockPool(num_blocks, block_size, self.counters)
        scheduler = Scheduler(config, pool, self.counters, drafter=drafter)
        for wave in waves:
            for request in wave:
                scheduler.add(request)
            for outcome in drive(scheduler, executor):
                outcome.raise_failure()
                rows = [len(chunk.scored) for chunk in outcome.plan.chunks]
                self.most_scored = max(self.most_scored, sum(rows))
                for scored in outcome.scored:
                    assert not self.tokens[scored.request_id], "the prompt's come first"
                    self.scores[scored.request_id] += scored.logprobs
                for out in outcome.outs:
                    self.tokens[out.request_id].append(out.token_id)


def null_run(waves: Sequence[Sequence[Request]], num_blocks: int = 64, **more: int) -> Run:
    return Run(NullExecutor(num_blocks, BLOCK, VOCAB), waves, num_blocks, **more)


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 30), st.booleans()), min_size=1, max_size=6
    ),
    num_blocks=st.integers(10, 40),
    budget=st.integers(4, 40),
    second_wave=st.integers(0, 6),
)
def test_each_token_is_scored_once_and_in_order(
    prompts: list[tuple[int, int, bool]], num_blocks: int, budget: int, second_wave: int
) -> None:
    requests = [
        ask(f"r{i}", range(first, first + length), 0 if scores else None)
        for i, (first, length, scores) in enumerate(prompts)
    ]
    waves = [requests[:second_wave], requests[second_wave:]]
    run = null_run(waves, num_blocks, budget=budget)
    for request in requests:
        alone = null_run([[replace(request, id=RequestId("alone"))]])
        count = len(request.prompt_ids) - 1 if request.params.prompt_logprobs is not None else 0
        assert len(run.scores[request.id]) == count
        assert run.scores[request.id] == alone.scores["alone"]
        assert run.tokens[request.id] == alone.tokens["alone"]


def test_a_prompt_that_is_cached_is_computed_all_the_same() -> None:
    run = null_run([[ask("a", range(21))], [ask("b", range(21))]])
    assert run.scores["a"] == run.scores["b"]
    assert run.counters.prefix_hit_tokens == 0
    run = null_run([[ask("a", range(21))], [ask("b", range(21), None)]])
    assert run.counters.prefix_hit_tokens == 20, "others use what it computed"


def test_what_was_scored_before_a_preemption_is_not_scored_again() -> None:
    requests = [ask(name, range(at, at + 8), max_tokens=12) for name, at in (("a", 0), ("b", 20))]
    run = null_run([requests], num_blocks=6)
    assert run.counters.preemptions > 0
    assert [len(run.scores[name]) for name in "ab"] == [7, 7]


def test_a_step_scores_no_more_than_its_bound() -> None:
    prompts = [[i % VOCAB for i in range(length)] for length in (300, 280, 100)]
    run = null_run([[ask(f"r{i}", prompt) for i, prompt in enumerate(prompts)]], num_blocks=300)
    assert run.most_scored == MOST_SCORED
    assert [len(run.scores[f"r{i}"]) for i in range(3)] == [299, 279, 99]


class Drafts(Drafter):
    """Proposes the same tokens to everybody."""

    def propose(self, seqs: Sequence[SequenceState], beside: int) -> Sequence[Sequence[int]]:
        return [[3, 1, 4]] * len(seqs)


@pytest.fixture(scope="module", params=["deepseek_v3", "qwen3_moe"])
def decoder(request: pytest.FixtureRequest, tiny_decoder: Callable[[str], Decoder]) -> Decoder:
    return tiny_decoder(request.param)


def prefix_by_prefix(decoder: Decoder, request: Request, count: int) -> list[Logprobs]:
    """The slow twin: every beginning of the prompt as a request of its own."""
    found = []
    for end in range(1, len(request.prompt_ids)):

        def keep(chunk: Chunk, logits_V: object, token: int = request.prompt_ids[end]) -> None:
            found.append(logprobs_of(logits_V.numpy(), token, count))  # type: ignore[attr-defined]

        short = ask("r", request.prompt_ids[:end], None, max_tokens=1)
        Run(ModelRunner(decoder, 64, BLOCK, on_logits=keep), [[short]])
    return found


def test_they_are_those_of_every_beginning_by_itself(decoder: Decoder) -> None:
    prompts = [[(7 * i * i + 3 * s) % 256 for i in range(n)] for s, n in enumerate((23, 14, 2, 1))]
    requests = [ask(f"r{i}", prompt, 3) for i, prompt in enumerate(prompts)]
    expected = {r.id: prefix_by_prefix(decoder, r, 3) for r in requests}
    tokens = Run(ModelRunner(decoder, 64, BLOCK), [requests]).tokens
    others = [ask("x", prompts[0], None), ask("y", prompts[1], None, logprobs=1)]
    for budget, blocks, drafter in (
        (1024, 64, None),
        (5, 64, None),
        (9, 13, None),
        (7, 64, Drafts()),
    ):
        waves = [[others[0], *requests], [others[1]]]
        runner = ModelRunner(decoder, blocks, BLOCK)
        run = Run(runner, waves, blocks, budget, drafter=drafter)
        assert {name: run.scores[name] for name in expected} == expected
        assert {name: run.tokens[name] for name in expected} == tokens


def test_microbatches_score_the_same_rows(decoder: Decoder) -> None:
    plain, cut = (ModelRunner(decoder, 8, 32) for _ in range(2))
    chunks = tuple(
        Chunk(ask(name, prompt), tuple(prompt), 0, (BlockId(i),), 1)
        for i, (name, prompt) in enumerate({"a": range(9), "b": range(20, 31)}.items())
    )
    whole = plain.run(StepPlan(chunks))
    assert [len(scored.logprobs) for scored in whole.scored] == [8, 10]
    assert cut.run(StepPlan(chunks), microbatches=3) == whole


def test_logits_that_are_no_numbers_fail_one_request() -> None:
    """Of the first one a row in the middle of its prompt, of the second all is well."""
    import torch

    class Broken:
        ops = ReferenceOps()

        def new_cache(self, num_blocks: int, block_size: int) -> None: ...

        def forward_micro(self, steps: Sequence[object], *_: object) -> list[torch.Tensor]:
            (step,) = steps
            token_R = step.token_ids_T[step.logit_rows_R]  # type: ignore[attr-defined]
            logits_RV = torch.nn.functional.one_hot(token_R, 8).float()
            logits_RV[token_R == 3] = torch.nan
            return [logits_RV]

    plan = StepPlan(
        tuple(
            Chunk(ask(name, ids), tuple(ids[:end]), 0, (BlockId(i),), samples)
            for i, (name, ids, end, samples) in enumerate(
                [("a", [1, 3, 2], 3, 1), ("b", [1, 2, 4], 3, 1), ("c", [3, 1, 1], 2, 0)]
            )
        )
    )
    result = ModelRunner(Broken(), 8, 4).run(plan)  # type: ignore[arg-type]
    assert [request_id for request_id, _ in result.failed] == ["c", "a"]
    assert "the logits after position 1 hold nan" in result.failed[1][1]
    assert [s.request_id for s in result.sampled] == ["b"]
    assert [(s.request_id, len(s.logprobs)) for s in result.scored] == [("b", 2)]
