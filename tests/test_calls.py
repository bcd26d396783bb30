"""A step is a handful of native calls: counted, since Python between them costs what they do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moeserve.kernels.cpu import _cpu
from moeserve.models.batch import Span, pack_spans
from moeserve.models.decoder import Decoder


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("sequences", [1, 3])
def test_a_step_is_three_native_calls_however_many_layers(
    tiny_decoder: Callable[[str], Decoder], family: str, sequences: int
) -> None:
    decoder = tiny_decoder(family)
    cache = decoder.new_cache(sequences, 16)
    step = pack_spans([Span([7 + s], 0, [s]) for s in range(sequences)], 16)
    before = _cpu.calls()
    logits = decoder.forward(step, cache)
    taken = _cpu.calls() - before
    assert taken == 3  # embedding, layers, head
    assert torch.isfinite(logits).all()
