"""A step is a handful of native calls: counted, since Python between them costs what they do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moeserve.kernels import _cpu
from moeserve.models.batch import Span, pack_spans
from moeserve.models.decoder import Decoder
from moeserve.models.spec import MoeSpec


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("sequences", [1, 3])
def test_a_layer_is_three_native_calls_and_a_dense_one_two(
    tiny_decoder: Callable[[str], Decoder], family: str, sequences: int
) -> None:
    decoder = tiny_decoder(family)
    cache = decoder.new_cache(sequences, 16)
    step = pack_spans([Span([7 + s], 0, [s]) for s in range(sequences)], 16)
    before = _cpu.calls()
    logits = decoder.forward(step, cache)
    taken = _cpu.calls() - before
    moe = sum(isinstance(layer.mlp, MoeSpec) for layer in decoder.spec.layers)
    dense = len(decoder.spec.layers) - moe
    assert taken == 3 * moe + 2 * dense + 2  # and the embedding and the head
    assert torch.isfinite(logits).all()
