"""What an accelerator's memory has room for, by numbers alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.config.options import LoadOptions
from moeserve.engine.device_memory import least_weights, plan_device, workspace_of
from moeserve.errors import ConfigError
from moeserve.kernels.device import Card
from moeserve.models.survey import survey

SIZES = st.integers(0, 1 << 40)


@given(st.tuples(SIZES, SIZES, SIZES, SIZES, SIZES))
def test_a_plan_shares_out_what_is_free_or_names_every_number(sizes: tuple[int, ...]) -> None:
    free, weights, workspace, graphs, block = sizes
    card = Card("a card", free + 7, free)
    if free - weights - workspace - graphs >= block:
        plan = plan_device(card, weights, workspace, graphs, block)
        assert plan.kv + plan.weights + plan.workspace + plan.graphs == free
        assert plan.kv >= block
        return
    with pytest.raises(ConfigError) as refused:
        plan_device(card, weights, workspace, graphs, block)
    assert all(str(size) in refused.value.message for size in (*sizes, free + 7))
    assert "lower max_num_batched_tokens" in refused.value.message
    assert "\n" not in refused.value.message


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_the_workspace_grows_with_a_step_and_holds_what_it_must(
    family: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    spec = survey(tiny_checkpoint(family)).spec
    one, two = workspace_of(spec, 100, 4), workspace_of(spec, 200, 4)
    logits = 8 * 4 * spec.vocab
    assert two - logits == 2 * (one - logits)
    routed = max(
        m.router.top_k * m.intermediate
        for layer in spec.layers
        if hasattr(m := layer.mlp, "router")
    )
    assert one > 100 * 4 * (4 * routed + 3 * spec.hidden)  # int32 gate and up, and their floats


def test_weights_are_never_thought_greater_than_they_become() -> None:
    assert least_weights(1000, LoadOptions(), 1) == 1000
    assert least_weights(1000, LoadOptions(quantization="int8"), 1) == 250
    assert least_weights(1000, LoadOptions(dtype="bfloat16"), 2) == 250
