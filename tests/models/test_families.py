"""Every family computes what transformers computes, alone, in chunks and in any batch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from moeserve.config.options import LoadOptions
from moeserve.models.batch import Span, pack_spans
from moeserve.models.decoder import Decoder, ModelKvCache

FAMILIES = [
    "deepseek_v2",
    "deepseek_v2_lite",
    "deepseek_v3",
    "deepseek_v3_plain",
    "glm4_moe",
    "gpt_oss",
    "mixtral",
    "mixtral_llama3",
    "olmoe",
    "olmoe_linear",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_moe_yarn",
]
BLOCK = 8
PROMPT = [17, 300, 5, 88, 88, 251, 199, 3, 42, 120, 7]
NEW_TOKENS = 64

LoadDecoder = Callable[[str], Decoder]


class Sequences:
    """A cache, and which blocks of it each sequence owns: not in order, and not side by side."""

    def __init__(self, decoder: Decoder, lengths: Sequence[int]) -> None:
        counts = [-(-n // BLOCK) for n in lengths]
        total = sum(counts)
        shuffled = torch.randperm(total, generator=torch.Generator().manual_seed(3)).tolist()
        self.blocks: list[list[int]] = []
        for count in counts:
            self.blocks.append([shuffled.pop() for _ in range(count)])
        self.decoder = decoder
        self.cache: ModelKvCache = decoder.new_cache(total, BLOCK)

    def run(self, *parts: tuple[int, Sequence[int], int]) -> list[Tensor]:
        """Runs (sequence, tokens, start) together; all their logits, part by part."""
        spans = [Span(ids, start, self.blocks[s], len(ids)) for s, ids, start in parts]
        logits = self.decoder.forward(pack_spans(spans, BLOCK), self.cache)
        return list(logits.split([len(ids) for _, ids, _ in parts]))


def greedy(decoder: Decoder, prompt: Sequence[int], count: int) -> list[int]:
    ids = list(prompt)
    sequences = Sequences(decoder, [len(ids) + count])
    fresh: Sequence[int] = prompt
    for _ in range(count):
        (logits,) = sequences.run((0, fresh, len(ids) - len(fresh)))
        fresh = [int(logits[-1].argmax())]
        ids += fresh
    return ids[len(prompt) :]


@pytest.fixture(scope="session")
def by_transformers(
    hf_model: Callable[[str], Any],
) -> Callable[[str], tuple[list[int], Tensor]]:
    """Its greedy tokens after ``PROMPT``, and its logits [T, V] of prompt and tokens together."""

    @functools.cache
    def run(family: str) -> tuple[list[int], Tensor]:
        model, ids = hf_model(family), list(PROMPT)
        fresh, past = torch.tensor([PROMPT]), None
        with torch.no_grad():
            for _ in range(NEW_TOKENS):
                out = model(fresh, past_key_values=past, use_cache=True)
                fresh, past = out.logits[:, -1:].argmax(-1), out.past_key_values
                ids.append(int(fresh))
            return ids[len(PROMPT) :], model(torch.tensor([ids])).logits[0]

    return run


def alone(decoder: Decoder, ids: Sequence[int]) -> Tensor:
    (logits,) = Sequences(decoder, [len(ids)]).run((0, ids, 0))
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_64_greedy_tokens_and_all_logits_equal_those_of_transformers(
    family: str,
    tiny_decoder: LoadDecoder,
    by_transformers: Callable[[str], tuple[list[int], Tensor]],
) -> None:
    decoder = tiny_decoder(family)
    tokens, logits = by_transformers(family)

    assert greedy(decoder, PROMPT, NEW_TOKENS) == tokens
    assert len(set(tokens)) > 10, "a model that repeats itself would prove little"
    torch.testing.assert_close(alone(decoder, PROMPT + tokens), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_sequences_in_chunks_is_bit_identical_to_each_alone(
    family: str, tiny_decoder: LoadDecoder
) -> None:
    decoder = tiny_decoder(family)
    a, b, c = PROMPT * 3, PROMPT[::-1] * 2, PROMPT[4:9]
    together = Sequences(decoder, [len(a), len(b), len(c)])

    first = together.run((0, a[:13], 0), (1, b[:1], 0))
    second = together.run((2, c, 0), (1, b[1:20], 1), (0, a[13:14], 13))
    third = together.run((0, a[14:], 14), (1, b[20:], 20))

    assert torch.equal(torch.cat((first[0], second[2], third[0])), alone(decoder, a))
    assert torch.equal(torch.cat((first[1], second[1], third[1])), alone(decoder, b))
    assert torch.equal(second[0], alone(decoder, c))


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_no_chunking_changes_a_bit(
    family: str, data: st.DataObject, tiny_decoder: LoadDecoder
) -> None:
    decoder = tiny_decoder(family)
    ids = data.draw(st.lists(st.integers(0, 319), min_size=1, max_size=40))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(ids) - 1)), max_size=4)))
    bounds = [0, *(c for c in cuts if c < len(ids)), len(ids)]
    sequences = Sequences(decoder, [len(ids)])

    parts = [
        sequences.run((0, ids[start:end], start))[0] for start, end in itertools.pairwise(bounds)
    ]

    assert torch.equal(torch.cat(parts), alone(decoder, ids))


def test_only_the_wanted_rows_get_logits(tiny_decoder: LoadDecoder) -> None:
    decoder = tiny_decoder("qwen3_moe")
    everything = alone(decoder, PROMPT)
    cache = decoder.new_cache(4, BLOCK)
    spans = [Span(PROMPT, 0, [0, 1], logits=1), Span(PROMPT, 0, [2, 3], logits=0)]

    logits = decoder.forward(pack_spans(spans, BLOCK), cache)

    assert torch.equal(logits, everything[-1:])
    nothing = pack_spans([Span(PROMPT, 0, [0, 1], logits=0)], BLOCK)
    assert decoder.forward(nothing, cache).shape == (0, decoder.spec.vocab)


class Record:
    """A routing observer that keeps one step."""

    def __init__(self) -> None:
        self.seen: dict[int, NDArray[np.int32]] = {}

    def record(self, layer: int, ids_TC: NDArray[np.int32]) -> None:
        assert layer not in self.seen
        self.seen[layer] = ids_TC.copy()


@pytest.mark.parametrize("microbatches", [1, 2])
def test_an_observer_hears_every_routing_layer_of_a_step_without_tokens(
    tiny_decoder: LoadDecoder, microbatches: int
) -> None:
    decoder, record = tiny_decoder("deepseek_v3"), Record()
    steps = [pack_spans([], BLOCK)] * microbatches
    decoder.forward_micro(steps, decoder.new_cache(2, BLOCK), record)
    mlp = decoder.spec.layers[1].mlp
    assert tuple(record.seen) == decoder.spec.moe_layers
    assert {ids.shape for ids in record.seen.values()} == {(0, mlp.router.top_k)}


def test_an_observer_hears_every_routing_layer_once(tiny_decoder: LoadDecoder) -> None:
    for family, routing in (
        ("deepseek_v3", (1, 2)),
        ("qwen3_moe", (1, 3)),
        ("qwen2_moe", (0, 2, 3)),
    ):
        decoder = tiny_decoder(family)
        record = Record()
        step = pack_spans([Span(PROMPT, 0, [0, 1])], BLOCK)

        decoder.forward(step, decoder.new_cache(2, BLOCK), record)

        assert tuple(record.seen) == routing == decoder.spec.moe_layers
        mlp = decoder.spec.layers[routing[0]].mlp
        for ids in record.seen.values():
            assert ids.shape == (len(PROMPT), mlp.router.top_k)
            assert all(len(set(row)) == mlp.router.top_k for row in ids.tolist())


def test_the_cache_holds_what_kv_bytes_per_token_says(tiny_decoder: LoadDecoder) -> None:
    for family, values in (("deepseek_v3", 3 * (32 + 8)), ("gpt_oss", 3 * 2 * 2 * 32)):
        decoder = tiny_decoder(family)
        cache = decoder.new_cache(5, BLOCK)
        assert decoder.kv_bytes_per_token == values * 4
        held = sum(layer.nbytes for layer in cache.layers)
        assert held == 5 * BLOCK * decoder.kv_bytes_per_token


def test_bf16_weights_stay_near_and_keep_bit_identity(
    tiny_checkpoint: Callable[[str], Path], tiny_decoder: LoadDecoder, ops: Any
) -> None:
    from moeserve.models.decoder import load_decoder

    decoder = load_decoder(tiny_checkpoint("deepseek_v3"), ops, LoadOptions(dtype="bfloat16"))
    logits = alone(decoder, PROMPT)

    assert decoder.kv_bytes_per_token * 2 == tiny_decoder("deepseek_v3").kv_bytes_per_token
    exact = alone(tiny_decoder("deepseek_v3"), PROMPT)
    # Activations are rounded too, and a random router's near-ties fall either way.
    assert 0 < (logits - exact).abs().mean() < 0.2 * exact.abs().mean()
    sequences = Sequences(decoder, [len(PROMPT)])
    parts = [sequences.run((0, [t], i))[0] for i, t in enumerate(PROMPT)]
    assert torch.equal(torch.cat(parts), logits)
