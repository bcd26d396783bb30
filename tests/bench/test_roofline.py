"""The roofline counts each weight that a step touches once, and each multiply-add."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.bench.generation import Case, bounds, prompts, run_case
from moeserve.bench.roofline import LoadCounter, Roofline, StepLoad, roofline, step_seconds
from moeserve.errors import ConfigError
from moeserve.kernels.probe import Machine, Rate
from moeserve.models.decoder import Decoder
from moeserve.models.spec import MoeSpec
from moeserve.models.survey import survey

Tiny = Callable[[str], Path]
Decoders = Callable[[str], Decoder]
COUNTS_WEIGHTS = Roofline(bytes_per_weight=1.0, bandwidth=1.0, peak=None)
COUNTS_OPERATIONS = Roofline(bytes_per_weight=0.0, bandwidth=1.0, peak=2.0)
FAMILIES = ["qwen3_moe", "qwen2_moe", "deepseek_v3", "deepseek_v3_plain", "gpt_oss"]


def one_token(spec_layers: int, decoder: Decoder) -> StepLoad:
    """A step of one token, which meets ``top_k`` experts of each layer."""
    routed = {
        i: [1] * mlp.router.top_k
        for i in range(spec_layers)
        if isinstance(mlp := decoder.spec.layers[i].mlp, MoeSpec)
    }
    return StepLoad(1, 1, routed)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_touches_the_active_matrices(
    family: str, tiny_checkpoint: Tiny, tiny_decoder: Decoders
) -> None:
    """All that ``survey`` counts as active but norms, biases and such: a few rows of the width."""
    decoder = tiny_decoder(family)
    load = one_token(len(decoder.spec.layers), decoder)
    touched = step_seconds(decoder.spec, load, COUNTS_WEIGHTS)
    active = survey(tiny_checkpoint(family)).active_bytes / decoder.dtype.itemsize
    assert 0 <= active - touched < 0.02 * active
    assert step_seconds(decoder.spec, load, COUNTS_OPERATIONS) == touched


@given(st.integers(1, 1000), st.integers(1, 10**6))
def test_a_product_is_bound_by_memory_or_by_arithmetic(tokens: int, weights: int) -> None:
    limit = Roofline(2.0, bandwidth=100.0, peak=1000.0)
    seconds = limit.product(tokens, weights)
    assert seconds >= weights * 2 / 100
    assert seconds >= 2 * tokens * weights / 1000
    assert limit.product(tokens + 1, weights) >= seconds


def test_each_precision_has_the_peak_of_its_products() -> None:
    machine = Machine(1, *(Rate(kind, best, 1.0) for kind, best in zip("rifb", (10.0, 1.0, 2.0, 3.0), strict=True)))  # fmt: skip  # noqa: E501
    assert roofline(machine, "int8") == Roofline(1.0, 10.0, 1.0)
    assert roofline(machine, "bf16") == Roofline(2.0, 10.0, 2.0)
    assert roofline(machine, "fp32") == Roofline(4.0, 10.0, 3.0)
    assert roofline(machine, "int4").peak == 1.0
    with pytest.raises(ConfigError, match="expected one of"):
        roofline(machine, "int3")


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_every_step_of_a_run_is_counted(family: str, tiny_decoder: Decoders) -> None:
    decoder, case = tiny_decoder(family), Case(streams=3, prompt=10, answer=5)
    counter = LoadCounter(decoder.spec)
    timing = run_case(decoder, case, counter)
    assert (timing.prompted, timing.decoded, timing.prefill_steps) == (30, 12, 1)
    assert [load.tokens for load in counter.steps] == [30, 3, 3, 3, 3]
    assert [load.logit_rows for load in counter.steps] == [3] * 5
    for load in counter.steps:
        assert set(load.tokens_LE) == set(decoder.spec.moe_layers)
        for layer, tokens_E in load.tokens_LE.items():
            mlp = decoder.spec.layers[layer].mlp
            assert isinstance(mlp, MoeSpec)
            assert sum(tokens_E) == load.tokens * mlp.router.top_k


def test_decoding_counts_from_when_every_stream_has_a_token(tiny_decoder: Decoders) -> None:
    """600 tokens of prompts take two steps, so early streams are ahead when the clock starts."""
    timing = run_case(tiny_decoder("qwen3_moe"), Case(streams=2, prompt=300, answer=6))
    assert timing.prefill_steps == 2
    assert timing.decoded == 2 * 6 - 2 - 1
    assert timing.prefill_rate == 600 / timing.prefill_s


def test_bounds_are_the_sums_over_their_phase(tiny_decoder: Decoders) -> None:
    decoder, case = tiny_decoder("qwen3_moe"), Case(1, 8, 3)
    least = bounds(decoder, case, COUNTS_WEIGHTS)
    assert least.decode_s == 2 * step_seconds(
        decoder.spec, one_token(len(decoder.spec.layers), decoder), COUNTS_WEIGHTS
    )
    assert least.prefill_s > least.decode_s / 2


def test_prompts_are_the_same_for_everyone() -> None:
    case = Case(4, 20, 1)
    assert prompts(case, 100) == prompts(case, 100)
    assert len(set(prompts(case, 100))) == 4
    assert all(0 < token < 100 for prompt in prompts(case, 100) for token in prompt)
