"""The figures against closed forms, and what must hold of any two models."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from moeserve.errors import InternalError
from moeserve.evaluate import divergence
from moeserve.evaluate.divergence import TokenScores, compare_logits, join, mean, summarise

ROWS, VOCAB = 5, 7
logits = arrays(np.float32, (ROWS, VOCAB), elements=st.floats(-80, 80, width=32)).map(
    torch.from_numpy
)
targets = st.lists(st.integers(0, VOCAB - 1), min_size=ROWS, max_size=ROWS).map(torch.tensor)


def log_odds(share: float) -> Tensor:
    """One row over two tokens, the first of which has this probability."""
    return torch.tensor([[math.log(share), math.log(1 - share)]])


def test_two_coins_have_the_divergence_of_the_textbook() -> None:
    scores = compare_logits(log_odds(0.5), log_odds(0.25), torch.tensor([0]))
    assert scores.kl_R[0] == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75))
    assert scores.reference_nll_R[0] == pytest.approx(math.log(2))
    assert scores.tested_nll_R[0] == pytest.approx(math.log(4))
    assert scores.delta_p_R[0] == pytest.approx(-0.25)


def test_divergence_is_weighed_by_the_reference() -> None:
    there = compare_logits(log_odds(0.9), log_odds(0.5), torch.tensor([0])).kl_R[0]
    back = compare_logits(log_odds(0.5), log_odds(0.9), torch.tensor([0])).kl_R[0]
    assert there == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2))
    assert back == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))


@given(logits, targets)
def test_equal_models_differ_by_nothing_at_all(reference: Tensor, target: Tensor) -> None:
    summary = summarise(compare_logits(reference, reference.clone(), target))
    assert summary.kl.value == summary.kl_max == summary.rms_delta_p == summary.kl.error == 0
    assert summary.same_top.value == summary.ratio.value == 1
    assert summary.reference_perplexity == summary.tested_perplexity


@given(logits, logits, targets)
def test_divergence_is_never_negative(reference: Tensor, tested: Tensor, target: Tensor) -> None:
    scores = compare_logits(reference, tested, target)
    assert (scores.kl_R >= 0).all()
    assert (abs(scores.delta_p_R) <= 1).all()


@given(logits, logits, targets, st.floats(-50, 50, width=32))
def test_a_constant_added_to_all_logits_changes_little(
    reference: Tensor, tested: Tensor, target: Tensor, shift: float
) -> None:
    plain = compare_logits(reference.double(), tested.double(), target)
    moved = compare_logits(reference.double() + shift, tested.double() - shift, target)
    assert moved.kl_R == pytest.approx(plain.kl_R, abs=1e-9)
    assert moved.tested_nll_R == pytest.approx(plain.tested_nll_R, abs=1e-9)


@given(logits, logits, targets, st.integers(1, 3 * VOCAB))
def test_how_rows_are_cut_changes_nothing(
    reference: Tensor, tested: Tensor, target: Tensor, most: int
) -> None:
    whole = compare_logits(reference, tested, target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(divergence, "MOST_VALUES", most)
        cut = compare_logits(reference, tested, target)
    assert np.array_equal(whole.kl_R, cut.kl_R)
    assert np.array_equal(whole.same_top_R, cut.same_top_R)


def test_a_permuted_head_agrees_as_often_as_chance() -> None:
    draw = torch.Generator().manual_seed(1)
    reference = torch.randn(2000, 50, generator=draw)
    permuted = reference[:, torch.randperm(50, generator=draw)]
    summary = summarise(compare_logits(reference, permuted, torch.zeros(2000, dtype=torch.int64)))
    assert summary.same_top.value < 0.06
    assert summary.kl.value > 0.5


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_are_refused(wrong: float) -> None:
    broken = torch.tensor([[0.0, wrong]])
    with pytest.raises(InternalError, match="tested model"):
        compare_logits(torch.zeros(1, 2), broken, torch.tensor([0]))


def scores_of(reference_nll: list[float], tested_nll: list[float]) -> TokenScores:
    one, other = np.array(reference_nll), np.array(tested_nll)
    kl = np.arange(len(one), dtype=np.float64)
    return TokenScores(one, other, kl, one == other, np.exp(-other) - np.exp(-one))


def test_the_error_of_a_ratio_is_that_of_paired_tokens() -> None:
    """Losses far apart but moving together: the ratio is known far better than either."""
    summary = summarise(scores_of([1.0, 5.0, 9.0], [1.1, 5.1, 9.1]))
    assert summary.ratio.value == pytest.approx(math.exp(0.1))
    assert summary.ratio.error == pytest.approx(0, abs=1e-12)
    assert summary.reference_perplexity.value == pytest.approx(math.exp(5))
    error = math.sqrt(32 / 3 / 2)
    assert summary.reference_perplexity.error == pytest.approx(math.exp(5) * error)


def test_percentiles_lie_in_the_middle_of_their_tokens() -> None:
    summary = summarise(scores_of([1.0] * 100, [1.0] * 100))
    assert summary.kl_quantiles[0.5] == 49.5
    assert summary.kl_quantiles[0.99] == 98.5
    assert summary.kl_max == summary.kl_quantiles[0.999] == 99


def test_parts_join_in_order() -> None:
    parts = [scores_of([1.0], [2.0]), scores_of([3.0, 4.0], [5.0, 6.0])]
    assert join(parts).tested_nll_R.tolist() == [2.0, 5.0, 6.0]


def test_the_error_of_a_single_sample_is_unknown() -> None:
    assert mean(np.array([2.0])).to_json() == {"value": 2.0, "error": None}
