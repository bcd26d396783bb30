"""How many different experts a step touches. Pure.

A token chooses ``top_k`` different experts of E. Expert e is chosen by a token with probability
p_e; these add up to ``top_k``. Tokens are taken to choose independently of each other, so that n of
them touch sum over e of 1 - (1 - p_e)^n experts on average: exact for that, whatever the choice of
one token looks like. Equal use is p_e = top_k / E.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from functools import lru_cache

from moeserve.errors import ConfigError
from moeserve.offload.model.halving import last_that

# Of a layer's experts that tokens use, if they choose by chance: from here on a step reads all.
NEARLY_ALL = 0.75
# Of 1 / rank^s: from here on all but ``top_k`` experts are as good as never used.
STEEPEST = 64.0


def equal_use(experts: int, top_k: int) -> tuple[float, ...]:
    """p_e where no expert is preferred."""
    return (top_k / experts,) * experts


def use_of(counts: Sequence[float], top_k: int) -> tuple[float, ...]:
    """p_e from how often each expert was chosen, in any unit: in proportion, none above 1, adding
    up to ``top_k``. ConfigError where fewer than ``top_k`` experts were ever chosen."""
    if any(not 0 <= c < float("inf") for c in counts):
        raise ConfigError("counts of experts must be finite and at least 0")
    if sum(c > 0 for c in counts) < top_k:
        raise ConfigError(
            f"counts of experts name fewer than {top_k} experts that were used: give counts of "
            f"more tokens"
        )
    sure: set[int] = set()
    while True:
        rest = sum(c for e, c in enumerate(counts) if e not in sure)
        scale = (top_k - len(sure)) / rest if rest else 0.0
        above = {e for e, c in enumerate(counts) if e not in sure and c * scale >= 1}
        if not above:
            break
        sure |= above
    return tuple(1.0 if e in sure else c * scale for e, c in enumerate(counts))


@lru_cache(maxsize=256)
def use_alike(experts: int, top_k: int, shared: float) -> tuple[float, ...]:
    """p_e, falling, where a token's choice is another token's too with probability ``shared`` = sum
    of p_e^2 / ``top_k``: in proportion to 1 / rank^s, none above 1, with the s that gives it."""
    if top_k >= experts or shared <= top_k / experts:
        return equal_use(experts, top_k)

    def use(s: float) -> tuple[float, ...]:
        return use_of([(e + 1) ** -s for e in range(experts)], top_k)

    def too_level(s: float) -> bool:
        return math.fsum(p * p for p in use(s)) < shared * top_k

    return use(last_that(too_level, 0.0, STEEPEST, halvings=40))


def common_use(one: Sequence[float], other: Sequence[float], top_k: int) -> tuple[float, ...]:
    """p_e from counts of two halves of requests: as far from equal use as both agree on. What a few
    requests prefer is not what all do, and is in one half only; r, by which the halves correlate,
    says how much of their sum's differences is not by chance: 2 r / (1 + r) (Spearman-Brown)."""
    use = use_of([a + b for a, b in zip(one, other, strict=True)], top_k)
    if min(map(max, (one, other))) <= 0:
        return use
    equal = top_k / len(use)
    r = max(0.0, correlation(one, other))
    return tuple(equal + 2 * r / (1 + r) * (p - equal) for p in use)


def correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    """0 where either does not vary."""
    if len(set(xs)) < 2 or len(set(ys)) < 2:
        return 0.0
    return statistics.correlation(xs, ys)


def expected_distinct(use: Iterable[float], tokens: float) -> float:
    """How many of these experts ``tokens`` tokens touch; those left out of ``use`` do not count."""
    if tokens <= 0:
        return 0.0
    return math.fsum(1.0 - math.pow(1.0 - p, tokens) for p in use)


def least_used(use: Sequence[float], resident: int) -> tuple[float, ...]:
    """``use`` of those that are not among the ``resident`` most used ones."""
    return tuple(sorted(use, reverse=True)[resident:])


def uses_nearly_all(tokens: float, top_k: int, experts: int) -> bool:
    """1 - (1 - C / E)^T of the experts are used by T tokens of C choices each, by chance."""
    return 1.0 - math.pow(1.0 - min(1.0, top_k / experts), tokens) >= NEARLY_ALL
