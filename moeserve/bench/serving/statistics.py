"""Percentiles, rates, requests outstanding.

Pure. Percentiles interpolate between the two nearest values, as numpy's do by default.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moeserve.bench.serving.outcomes import Outcome


@dataclass(frozen=True, slots=True)
class Spread:
    """Of ``count`` values, in their unit; all 0 where there are none."""

    count: int
    mean: float
    std: float
    least: float
    most: float
    percentiles: Mapping[float, float]  # the median is always among them


def spread(values: Sequence[float], percentiles: Iterable[float]) -> Spread:
    asked = sorted({50.0, *percentiles})
    if not len(values):
        return Spread(0, 0.0, 0.0, 0.0, 0.0, dict.fromkeys(asked, 0.0))
    array = np.asarray(values, np.float64)
    found = np.percentile(array, asked).tolist()
    return Spread(
        len(values),
        float(array.mean()),
        float(array.std()),
        float(array.min()),
        float(array.max()),
        dict(zip(asked, found, strict=True)),
    )


def outstanding(outcomes: Iterable[Outcome]) -> list[tuple[float, int]]:
    """(time, requests sent and not ended from then on), ascending. What ends when another is sent
    has ended before."""
    changes = [(o.sent_s, 1) for o in outcomes]
    changes += [(o.end_s, -1) for o in outcomes]
    changes.sort()
    steps: list[tuple[float, int]] = []
    level = 0
    for at_s, change in changes:
        level += change
        if steps and steps[-1][0] == at_s:
            steps[-1] = (at_s, level)
        else:
            steps.append((at_s, level))
    return steps


def mean_outstanding(outcomes: Sequence[Outcome]) -> float:
    """Over the run, each moment alike."""
    duration_s = duration(outcomes)
    return sum(o.end_s - o.sent_s for o in outcomes) / duration_s if duration_s else 0.0


def duration(outcomes: Sequence[Outcome]) -> float:
    """Seconds from the first request's sending to the last one's end."""
    if not outcomes:
        return 0.0
    return max(o.end_s for o in outcomes) - min(o.sent_s for o in outcomes)


def token_rate(outcomes: Sequence[Outcome], bin_s: float) -> list[float]:
    """Output tokens/s in each bin of the run, from its start; failed answers count as far as they
    came. Messages that do not say how many tokens they have share those of their answer."""
    last_s = max((o.end_s for o in outcomes), default=0.0)
    bins = np.zeros(int(last_s / bin_s) + 1)
    for o in outcomes:
        untold = sum(tokens == 0 for tokens in o.message_tokens)
        share = max(0, o.output_tokens - sum(o.message_tokens)) / untold if untold else 0.0
        for at_s, tokens in zip(o.message_s, o.message_tokens, strict=True):
            bins[min(int(at_s / bin_s), len(bins) - 1)] += tokens or share
    rates: list[float] = (bins / bin_s).tolist()
    return rates
