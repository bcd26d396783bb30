"""How far one next-token distribution lies from another, token by token and summed up.

Conventions are llama.cpp's, so that figures can be laid side by side: divergence is
KL(reference || tested) in nats, delta p is the tested less the reference's probability of the
token that really came, errors are standard errors over tokens, percentiles lie at (i + 1/2) / n.
Two equal rows of logits give exactly 0. Letters: R rows (one scored token each), V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moeserve.errors import InternalError

Floats = NDArray[np.float64]

# What is widened to fp64 at a time.
MOST_VALUES = 1 << 20


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its standard error; with a single sample the error is infinite, written null."""

    value: float
    error: float

    def to_json(self) -> dict[str, float | None]:
        return {"value": self.value, "error": self.error if math.isfinite(self.error) else None}


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Of each scored token: both losses in nats, divergence, same likeliest token, delta p."""

    reference_nll_R: Floats
    tested_nll_R: Floats
    kl_R: Floats
    same_top_R: NDArray[np.bool_]
    delta_p_R: Floats

    def __len__(self) -> int:
        return len(self.kl_R)


@dataclass(frozen=True, slots=True)
class Divergence:
    """``ratio`` is of perplexities, tested over reference; ``kl_quantiles`` map shares to nats."""

    tokens: int
    reference_perplexity: Estimate
    tested_perplexity: Estimate
    ratio: Estimate
    kl: Estimate
    kl_quantiles: dict[float, float]
    kl_max: float
    same_top: Estimate
    delta_p: Estimate
    rms_delta_p: float


def compare_logits(reference_RV: Tensor, tested_RV: Tensor, target_R: Tensor) -> TokenScores:
    """Scores of one chunk, in fp64; ``target_R`` are the tokens that really came."""
    rows = max(1, MOST_VALUES // reference_RV.shape[1])
    parts = (slice(at, at + rows) for at in range(0, len(target_R), rows))
    return join([_compare(reference_RV[r], tested_RV[r], target_R[r]) for r in parts])


def _compare(reference_RV: Tensor, tested_RV: Tensor, target_R: Tensor) -> TokenScores:
    for name, logits_RV in (("reference", reference_RV), ("tested", tested_RV)):
        if not logits_RV.isfinite().all():
            raise InternalError(f"the logits of the {name} model hold NaN or an infinity")
    log_p_RV = reference_RV.double().log_softmax(-1)
    log_q_RV = tested_RV.double().log_softmax(-1)
    log_p_R = log_p_RV.gather(1, target_R[:, None])[:, 0]
    log_q_R = log_q_RV.gather(1, target_R[:, None])[:, 0]
    # Rounding can leave the sum a few ulp below 0, which no divergence is.
    kl_R = (log_p_RV.exp() * (log_p_RV - log_q_RV)).sum(-1).clamp(min=0.0)
    return TokenScores(
        reference_nll_R=(-log_p_R).numpy(),
        tested_nll_R=(-log_q_R).numpy(),
        kl_R=kl_R.numpy(),
        same_top_R=(reference_RV.argmax(-1) == tested_RV.argmax(-1)).numpy(),
        delta_p_R=(log_q_R.exp() - log_p_R.exp()).numpy(),
    )


def join(parts: Iterable[TokenScores]) -> TokenScores:
    """One after the other."""
    listed = list(parts)
    return TokenScores(
        np.concatenate([p.reference_nll_R for p in listed]),
        np.concatenate([p.tested_nll_R for p in listed]),
        np.concatenate([p.kl_R for p in listed]),
        np.concatenate([p.same_top_R for p in listed]),
        np.concatenate([p.delta_p_R for p in listed]),
    )


def summarise(scores: TokenScores) -> Divergence:
    """Means with errors; of at least one token."""
    assert len(scores), "nothing was scored"
    quantiles = (0.01, 0.5, 0.9, 0.99, 0.999)
    at = np.quantile(scores.kl_R, quantiles, method="hazen")
    return Divergence(
        tokens=len(scores),
        reference_perplexity=exponential(mean(scores.reference_nll_R)),
        tested_perplexity=exponential(mean(scores.tested_nll_R)),
        ratio=exponential(mean(scores.tested_nll_R - scores.reference_nll_R)),
        kl=mean(scores.kl_R),
        kl_quantiles=dict(zip(quantiles, map(float, at), strict=True)),
        kl_max=float(scores.kl_R.max()),
        same_top=mean(scores.same_top_R.astype(np.float64)),
        delta_p=mean(scores.delta_p_R),
        rms_delta_p=float(np.sqrt(np.square(scores.delta_p_R).mean())),
    )


def mean(values: Floats) -> Estimate:
    """The mean, and sqrt(variance / (n - 1))."""
    n = len(values)
    return Estimate(
        float(values.mean()), float(values.std()) / math.sqrt(n - 1) if n > 1 else math.inf
    )


def exponential(estimate: Estimate) -> Estimate:
    """exp of a mean, with the error carried through to first order."""
    value = math.exp(estimate.value)
    return Estimate(value, value * estimate.error)
