"""Law 1 on one machine: where and with whom a token is computed never changes what is computed.

Real checkpoints, the real scheduler, the ops of this machine. The oracle is each request alone, in
one chunk, in a fresh cache. Everything else must give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeserve.config.options import LoadOptions
from moeserve.core import BlockId, Chunk, Counters, Request, RequestId, SamplingParams
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.kv_tensors import watch_kv
from moeserve.engine.model_runner import ModelRunner
from moeserve.engine.policies.choices import Drafter
from moeserve.engine.policies.layered import LayeredPrefill
from moeserve.engine.policies.swap import SwapOrCompute
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.sequence import SequenceState
from moeserve.engine.swap_memory import HostSwapMemory
from moeserve.engine.swap_space import SwapRun
from moeserve.engine.swapping import Swapping
from moeserve.errors import ConfigError
from moeserve.kernels.ops import Linear
from moeserve.kernels.reference.ops import ReferenceOps
from moeserve.kernels.select import choose_ops
from moeserve.models.decoder import Decoder, load_decoder

MODELS = [
    ("deepseek_v3", "float32"),
    ("deepseek_v3", "bfloat16"),
    ("qwen3_moe", "float32"),
    ("qwen3_moe", "bfloat16"),
    ("gpt_oss", "float32"),
    ("gpt_oss", "bfloat16"),
]
VOCAB = 256
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=8, ignore_eos=True, seed=3)


@dataclass(frozen=True)
class Ran:
    """Of every generated token: its id, and the logits it was chosen from."""

    tokens: dict[str, list[int]]
    logits: dict[str, list[Tensor]]
    counters: Counters


def run(
    decoder: Decoder,
    waves: Sequence[Sequence[Request]],
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    chunk: int = 1024,
    max_num_seqs: int = 8,
    prefix_cache: bool = True,
    drafter: Drafter | None = None,
    swap_memory: int = 0,
    memory: type[HostSwapMemory] = HostSwapMemory,
    layered: bool = False,
) -> Ran:
    """Each wave is added when the one before has ended."""
    counters = Counters()
    tokens: dict[str, list[int]] = {r.id: [] for wave in waves for r in wave}
    logits: dict[str, list[Tensor]] = {r.id: [] for wave in waves for r in wave}

    def keep(chunk: Chunk, logits_V: Tensor) -> None:
        logits[chunk.request.id].append(logits_V.clone())

    config = SchedulerConfig(
        max_model_len=128,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(chunk, max_num_seqs),
        prefix_cache=prefix_cache,
    )
    pool = BlockPool(num_blocks, block_size, counters)
    groups = LayeredPrefill(len(decoder.spec.layers), counters) if layered else None
    executor = ModelRunner(decoder, num_blocks, block_size, on_logits=keep)
    swapping = None
    if swap_memory:
        host = memory(watch_kv(executor, decoder.ops), swap_memory)
        swapping = Swapping(host, SwapOrCompute())
    scheduler = Scheduler(
        config, pool, counters, drafter=drafter, swapping=swapping, layered=groups
    )
    for wave in waves:
        for request in wave:
            scheduler.add(request)
        while scheduler.has_work:
            for out in scheduler.apply(executor.run(scheduler.plan(0.0))):
                tokens[out.request_id].append(out.token_id)
    assert executor.states.num_rows == 0
    return Ran(tokens, logits, counters)


def ask(name: str, prompt: Sequence[int], params: SamplingParams = GREEDY) -> Request:
    return Request(RequestId(name), tuple(prompt), params)


class Alone:
    """A model, and what it answers to a request by itself."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._known: dict[tuple[tuple[int, ...], SamplingParams], Ran] = {}

    def answer(self, request: Request) -> tuple[list[int], list[Tensor]]:
        key = (request.prompt_ids, request.params)
        if key not in self._known:
            self._known[key] = run(self.decoder, [[ask("r", *key)]])
        ran = self._known[key]
        return ran.tokens["r"], ran.logits["r"]

    def assert_same(self, requests: Sequence[Request], ran: Ran) -> None:
        for request in requests:
            tokens, logits = self.answer(request)
            assert ran.tokens[request.id] == tokens
            for step, (a, b) in enumerate(zip(ran.logits[request.id], logits, strict=True)):
                assert torch.equal(a, b), f"{request.id}, token {step}: other bits"


@pytest.fixture(scope="module", params=MODELS, ids=lambda m: f"{m[0]}-{m[1]}")
def alone(request: pytest.FixtureRequest, tiny_checkpoint: Callable[[str], Path]) -> Alone:
    family, dtype = request.param
    return Alone(load_decoder(tiny_checkpoint(family), choose_ops(), LoadOptions(dtype=dtype)))


def prompt(seed: int, length: int) -> list[int]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (length,), generator=draw).tolist()


def test_logits_are_real_and_differ_between_tokens(alone: Alone) -> None:
    """The comparisons below compare something."""
    tokens, logits = alone.answer(ask("r", prompt(1, 9)))
    assert len(tokens) == len(logits) == 8
    assert len({tuple(row.tolist()) for row in logits}) == 8
    assert all(row.isfinite().all() for row in logits)


def test_a_batch_changes_nothing(alone: Alone) -> None:
    requests = [ask(f"r{i}", prompt(i, 1 + 7 * i % 23)) for i in range(8)]
    alone.assert_same(requests, run(alone.decoder, [requests]))


def test_a_batch_that_changes_one_bit_would_be_noticed(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    """The oracle's own test: ops whose results depend on the number of rows, ever so slightly."""

    class Leaky(ReferenceOps):
        def linear(self, x_TK: Tensor, weight: Linear) -> Tensor:
            out_TN = super().linear(x_TK, weight)
            return out_TN if len(x_TK) == 1 else out_TN * (1 + 2**-23)

    leaky = Alone(load_decoder(tiny_checkpoint("qwen3_moe"), ops=Leaky()))
    requests = [ask("a", [1]), ask("b", [2])]
    ran = run(leaky.decoder, [requests])
    with pytest.raises(AssertionError, match=r"other bits"):
        leaky.assert_same(requests, ran)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 16, 31])
def test_the_size_of_chunks_changes_nothing(alone: Alone, chunk: int) -> None:
    requests = [ask("r", prompt(2, 41))]
    ran = run(alone.decoder, [requests], chunk=chunk, max_num_seqs=1)
    assert ran.counters.steps == -(-41 // chunk) + 7
    alone.assert_same(requests, ran)


def test_prompts_that_go_through_the_layers_in_groups_change_nothing(alone: Alone) -> None:
    """Beside others that generate, with a common beginning, and in parts."""
    common = prompt(6, 30)
    first = [ask("a", prompt(5, 9)), ask("b", [*common, 7]), ask("c", prompt(2, 60), SAMPLED)]
    then = [ask("d", [*common, 3, *prompt(4, 40)]), ask("e", prompt(3, 12))]
    ran = run(alone.decoder, [first, then], chunk=13, layered=True)
    assert ran.counters.layered_steps > 5
    assert ran.counters.prefix_hit_tokens == 28
    alone.assert_same(first + then, ran)


@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
def test_the_size_of_blocks_changes_nothing(alone: Alone, block_size: int) -> None:
    requests = [ask("a", prompt(3, 37)), ask("b", prompt(4, 20))]
    alone.assert_same(requests, run(alone.decoder, [requests], block_size=block_size))


def test_a_prefix_hit_changes_nothing(alone: Alone) -> None:
    common = prompt(5, 26)
    first = [ask("a", [*common, 1, 2, 3])]
    then = [ask("b", [*common, 9]), ask("c", common[:25]), ask("d", [*common, 1, 2, 3])]
    ran = run(alone.decoder, [first, then])
    assert ran.counters.prefix_hit_tokens == 24 + 24 + 28
    alone.assert_same(first + then, ran)


def test_a_preemption_changes_nothing(alone: Alone) -> None:
    requests = [ask(f"r{i}", prompt(10 + i, 12)) for i in range(5)]
    for prefix_cache in (True, False):
        ran = run(alone.decoder, [requests], num_blocks=13, prefix_cache=prefix_cache)
        assert ran.counters.preemptions > 0
        assert ran.counters.recomputed_tokens > 0
        alone.assert_same(requests, ran)
        ran = run(
            alone.decoder,
            [requests],
            num_blocks=13,
            prefix_cache=prefix_cache,
            swap_memory=1 << 20,
        )
        assert ran.counters.swaps == ran.counters.preemptions > 0
        assert ran.counters.recomputed_tokens == 0
        alone.assert_same(requests, ran)


class Faulty(HostSwapMemory):
    """A bit of what comes back is another one."""

    def copy_in(
        self, blocks: Sequence[BlockId], runs: Sequence[SwapRun], keys: Sequence[bytes]
    ) -> bool:
        self._memory_X[(runs[-1].at + runs[-1].count) * self.place_bytes - 1] ^= 1
        return super().copy_in(blocks, runs, keys)


def test_a_copy_that_was_changed_in_host_memory_is_noticed(alone: Alone) -> None:
    requests = [ask(f"r{i}", prompt(10 + i, 12)) for i in range(5)]
    ran = run(alone.decoder, [requests], num_blocks=13, swap_memory=1 << 20, memory=Faulty)
    assert ran.counters.swap_recomputed > 0
    assert ran.counters.swap_in_bytes == 0
    alone.assert_same(requests, ran)


def test_host_memory_for_less_than_a_token_is_refused(alone: Alone) -> None:
    with pytest.raises(ConfigError, match=r"swap_memory=9: the KV of one token takes \d+ bytes"):
        run(alone.decoder, [], swap_memory=9)


class Known(Drafter):
    """Drafts what a request is going to answer; every ``errs``-th token is another, if not 0."""

    def __init__(self, answers: dict[str, list[int]], errs: int = 0) -> None:
        self._answers, self._errs = answers, errs

    def propose(self, seqs: Sequence[SequenceState], beside: int) -> Sequence[Sequence[int]]:
        return [self.guess(seq.request, seq.output_ids) for seq in seqs]

    def guess(self, request: Request, output_ids: Sequence[int]) -> Sequence[int]:
        at = len(output_ids)
        guesses = enumerate(self._answers[request.id][at : at + 3], at)
        return [(t + 1) % VOCAB if self._errs and i % self._errs == 0 else t for i, t in guesses]


def test_several_tokens_a_step_change_nothing(alone: Alone) -> None:
    requests = [ask("a", prompt(7, 21)), ask("b", prompt(8, 5), SAMPLED), ask("c", prompt(9, 12))]
    answers = {r.id: alone.answer(r)[0] for r in requests}
    ran = run(alone.decoder, [requests], drafter=Known(answers), block_size=3)
    assert (ran.counters.steps, ran.counters.accepted_tokens) == (1 + 2, 3 * (3 + 2))
    alone.assert_same(requests, ran)
    for errs in (1, 3):
        ran = run(alone.decoder, [requests], drafter=Known(answers, errs), block_size=3)
        assert ran.tokens == answers


@settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    drawn=st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 40), st.sampled_from([GREEDY, SAMPLED])),
        min_size=1,
        max_size=6,
    ),
    num_blocks=st.integers(17, 40),
    block_size=st.integers(3, 6),
    chunk=st.integers(1, 40),
    max_num_seqs=st.integers(1, 6),
    prefix_cache=st.booleans(),
    second_wave=st.integers(0, 6),
    swap_memory=st.sampled_from([0, 1 << 14, 1 << 20]),
    layered=st.booleans(),
)
def test_nothing_the_scheduler_may_do_changes_anything(
    alone: Alone,
    drawn: list[tuple[int, int, SamplingParams]],
    num_blocks: int,
    block_size: int,
    chunk: int,
    max_num_seqs: int,
    prefix_cache: bool,
    second_wave: int,
    swap_memory: int,
    layered: bool,
) -> None:
    requests = [
        ask(f"r{i}", prompt(seed, length), params) for i, (seed, length, params) in enumerate(drawn)
    ]
    ran = run(
        alone.decoder,
        [requests[:second_wave], requests[second_wave:]],
        num_blocks=num_blocks,
        block_size=block_size,
        chunk=chunk,
        max_num_seqs=max_num_seqs,
        prefix_cache=prefix_cache,
        swap_memory=swap_memory,
        layered=layered,
    )
    alone.assert_same(requests, ran)
