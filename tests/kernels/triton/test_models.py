"""Models on Triton's kernels give the tokens of the reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moeserve.config.options import LoadOptions
from moeserve.kernels.ops import Ops
from moeserve.kernels.reference.ops import ReferenceOps
from moeserve.models.batch import Span, pack_spans
from moeserve.models.decoder import Decoder, load_decoder

BLOCK = 8
PROMPT = [17, 300, 5, 88, 88, 251, 199]
FAMILIES = (
    "deepseek_v2 deepseek_v2_lite deepseek_v3 deepseek_v3_plain glm4_moe gpt_oss mixtral "
    "mixtral_llama3 olmoe olmoe_linear qwen2_moe qwen3_moe qwen3_moe_yarn"
).split()
# Logits may be off by so much of their greatest: what is rounded may round to the next number.
BOUNDS = {"float32": 1e-5, "bfloat16": 0.02, "int8": 0.02}
Load = Callable[[str], Path]


def greedy(decoder: Decoder, count: int) -> tuple[list[int], Tensor]:
    """Tokens, and all logits on the way."""
    ids, fresh, seen = list(PROMPT), list(PROMPT), []
    cache = decoder.new_cache(4, BLOCK)
    for _ in range(count):
        spans = [Span(fresh, len(ids) - len(fresh), [2, 0, 3, 1], len(fresh))]
        seen.append(decoder.forward(pack_spans(spans, BLOCK), cache))
        fresh = [int(seen[-1][-1].argmax())]
        ids += fresh
    return ids[len(PROMPT) :], torch.cat(seen)


def gives_the_tokens(ops: Ops, folder: Path, dtype: str, count: int) -> None:
    int8 = LoadOptions(quantization="int8", kv_dtype="int8", quantize_attention=True)
    how = int8 if dtype == "int8" else LoadOptions(dtype=dtype)
    ours, theirs = (greedy(load_decoder(folder, t, how), count) for t in (ops, ReferenceOps()))
    if dtype == "float32":
        assert ours[0] == theirs[0]
    first = slice(len(PROMPT))  # beyond it tokens may differ
    error = (ours[1][first] - theirs[1][first]).abs().max()
    assert error <= BOUNDS[dtype] * theirs[1][first].abs().max()


# Families whose layers are unlike each other's; the rest are variations, and Triton's interpreter
# takes its time.
UNLIKE = ("gpt_oss",)


@pytest.mark.timeout(1200)
def test_a_model_gives_the_references_tokens(ops: Ops, tiny_checkpoint: Load) -> None:
    gives_the_tokens(ops, tiny_checkpoint("deepseek_v3"), "float32", 2)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=() if f in UNLIKE else pytest.mark.rare) for f in FAMILIES],
)
def test_every_family_gives_the_references_tokens(
    ops: Ops, family: str, tiny_checkpoint: Load
) -> None:
    gives_the_tokens(ops, tiny_checkpoint(family), "float32", 8)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_rounded_model_stays_near_the_reference(
    ops: Ops, dtype: str, tiny_checkpoint: Load
) -> None:
    for family in ("deepseek_v3", "qwen2_moe"):
        gives_the_tokens(ops, tiny_checkpoint(family), dtype, 2)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_batch_in_chunks_is_each_sequence_alone_to_the_bit(
    ops: Ops, tiny_checkpoint: Load
) -> None:
    decoder = load_decoder(tiny_checkpoint("deepseek_v3"), ops)
    (alone,) = decoder.forward_micro(
        [pack_spans([Span(PROMPT, 0, [0], len(PROMPT))], BLOCK)], decoder.new_cache(1, BLOCK)
    )
    cache = decoder.new_cache(2, BLOCK)
    first = pack_spans([Span(PROMPT[:3], 0, [1], 3), Span(PROMPT[::-1], 0, [0], 1)], BLOCK)
    second = pack_spans([Span(PROMPT[3:], 3, [1], 4)], BLOCK)
    parts = decoder.forward(first, cache)[:3], decoder.forward(second, cache)
    assert torch.equal(torch.cat(parts), alone)
