"""Experts that requests prefer: what of a step is there where what was used before is kept. Pure.

The tokens of one request choose alike, those of different requests do not. What a request chooses
with probability q of expert e has mean p = K / E over the experts; that a token's choice is another
token's of the same request too has probability ``repeat`` = E[q^2] / p. B requests that generate
use an expert in a step with probability u = 1 - (1 - q_1) ... (1 - q_B), which is taken for Beta
distributed: by its mean 1 - (1 - p)^B, and by E[(1 - u)^2] = (1 - 2 p + p repeat)^B.

Kept are the experts that most of the last steps have used, of which newer ones weigh more: as much
as ``WINDOW`` steps that all weigh alike. Those that the requests which run now have made have n =
``WINDOW`` (1 - exp(-made / ``WINDOW``)) of this weight; the others were of requests before, which
say nothing of these. An expert that i of n steps used is used next with probability (a + i) / (a +
b + n), and is ranked by i + j, with j of the other steps. Without a preference, and before the
first step, hits are in proportion to what is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, lgamma

from moeserve.errors import ConfigError

# Steps that count in full where half of what is known is forgotten in 12, as by ``Residency``.
WINDOW = 17
# Steps before were of requests one after the other: of so many, what they used is as much more even
# than what the same ones use again and again.
MIXED = 4
# After so many steps of a request all that counts is its own.
LONG = 5 * WINDOW
# Of u, below which all experts are alike.
LEAST_VARIANCE = 1e-9
# Of a + b: with 0 an expert would be used always or never, and Beta has no density.
LEAST_BOTH = 1e-6


@dataclass(frozen=True, slots=True)
class RoutingHabits:
    """What was counted of a model's routing, as shares: ``repeat`` as above, and ``foreseen``, how
    many of the experts that a layer needs and misses its router named when it was asked with the
    residual stream of the layer before; ``shared`` is how often a token's choice is another
    request's token's too. 0 is that it was not counted."""

    repeat: float = 0.0
    foreseen: float = 0.0
    shared: float = 0.0

    def __post_init__(self) -> None:
        if not all(0 <= share <= 1 for share in (self.repeat, self.foreseen, self.shared)):
            raise ConfigError(f"{self}: shares lie within 0..1; calibrate again")


UNKNOWN = RoutingHabits()


@dataclass(frozen=True, slots=True)
class KeptExperts:
    """Experts ranked by past use: ``share[n]`` of all of them are of rank n, and ``used[n]`` of all
    experts are of that rank and used by the next step. The most used ones come first."""

    share: tuple[float, ...]
    used: tuple[float, ...]

    def hits(self, kept: float) -> float:
        """How many of all experts the next step uses and finds, where ``kept`` of all are kept."""
        left, found = kept, 0.0
        for share, used in zip(self.share, self.used, strict=True):
            if share >= left:
                return found + (used * left / share if share else 0.0)
            left, found = left - share, found + used
        return found


def kept_experts(p: float, repeat: float, requests: float, made: float) -> KeptExperts:
    """For a step of the newest token of each of ``requests``, which have run for ``made`` steps."""
    used = 1.0 - (1.0 - p) ** requests
    variance = (1.0 - 2.0 * p + p * repeat) ** requests - (1.0 - used) ** 2
    if repeat <= p or variance <= LEAST_VARIANCE:
        return KeptExperts((1.0,), (used,))
    both = max(LEAST_BOTH, used * (1.0 - used) / variance - 1.0)
    a, b = used * both, (1.0 - used) * both
    steps = round(WINDOW * (1.0 - exp(-made / WINDOW)))
    own = beta_binomial(steps, a, b)
    others = beta_binomial(WINDOW - steps, MIXED * a, MIXED * b)
    next_time = [(a + i) / (a + b + steps) for i in range(steps + 1)]
    ranks = [
        [
            (own[i] * others[rank - i], next_time[i])
            for i in range(max(0, rank - len(others) + 1), min(rank, steps) + 1)
        ]
        for rank in range(WINDOW, -1, -1)
    ]
    return KeptExperts(
        tuple(sum(share for share, _ in rank) for rank in ranks),
        tuple(sum(share * probability for share, probability in rank) for rank in ranks),
    )


def beta_binomial(trials: int, a: float, b: float) -> Sequence[float]:
    """Probabilities of 0 to ``trials`` successes whose chance is Beta(a, b) distributed."""
    whole = lgamma(a) + lgamma(b) - lgamma(a + b) + lgamma(trials + a + b) - lgamma(trials + 1)
    return [
        exp(lgamma(i + a) - lgamma(i + 1) + lgamma(trials - i + b) - lgamma(trials - i + 1) - whole)
        for i in range(trials + 1)
    ]
