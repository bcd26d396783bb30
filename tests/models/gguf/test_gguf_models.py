"""A GGUF file is the model that a folder of the same values is, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moeserve.config.options import LoadOptions
from moeserve.kernels.ops import Ops
from moeserve.models.batch import Span, pack_spans
from moeserve.models.decoder import load_decoder

FAMILIES = (
    "deepseek_v2 deepseek_v2_lite deepseek_v3 deepseek_v3_plain glm4_moe gpt_oss mixtral olmoe "
    "olmoe_linear qwen2_moe qwen3_moe qwen3_moe_yarn"
).split()
PROMPT = [17, 300, 5, 88, 88, 251, 199, 3, 42, 120, 7] * 4
Sayable = Callable[[str], Path]


def logits(path: Path, ops: Ops, ids: Sequence[int] = PROMPT, **options: Any) -> Tensor:
    decoder = load_decoder(path, ops=ops, options=LoadOptions(**options))
    step = pack_spans([Span(ids, 0, list(range(8)), len(ids))], 8)
    return decoder.forward(step, decoder.new_cache(8, 8))


@pytest.mark.parametrize("family", FAMILIES)
def test_floats_give_the_logits_of_the_folder(
    family: str, sayable: Sayable, writer: Any, ops: Ops, tmp_path: Path
) -> None:
    folder = sayable(family)
    file = writer.converted(folder).save(tmp_path / "model.gguf")

    assert torch.equal(logits(file, ops), logits(folder, ops))
