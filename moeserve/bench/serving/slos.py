"""Limits on latencies, and which requests keep them.

Goodput is requests that keep all limits, a second of the run. A failed request keeps none; an
answer of one token has a TPOT of 0, as ``vllm bench serve`` counts it. Pure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moeserve.bench.serving.outcomes import Outcome
from moeserve.errors import ConfigError

METRICS = ("ttft", "tpot", "e2el")
_UNITS = {"": 1e-3, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True, slots=True)
class Slo:
    """``metric`` is at most ``limit_s``."""

    metric: str
    limit_s: float

    def kept(self, outcome: Outcome) -> bool:
        if not outcome.ok:
            return False
        if self.metric == "tpot":
            return (outcome.tpot_s or 0.0) <= self.limit_s
        found = outcome.ttft_s if self.metric == "ttft" else outcome.e2el_s
        return found is not None and found <= self.limit_s


def parse_slos(words: Iterable[str]) -> tuple[Slo, ...]:
    """``ttft:200ms``, ``e2el:3s``, ``tpot:50`` (milliseconds), each metric once."""
    found: dict[str, Slo] = {}
    for word in words:
        read = re.fullmatch(r"(\w+):(\d+(?:\.\d+)?)(ms|s|)", word)
        if read is None or read[1] not in METRICS:
            raise ConfigError(
                f"--slo {word!r}: expected {', '.join(METRICS)} and a limit, as in ttft:200ms"
            )
        limit_s = float(read[2]) * _UNITS[read[3]]
        if not (limit_s > 0 and math.isfinite(limit_s)):
            raise ConfigError(f"--slo {word!r}: a limit is above 0")
        if read[1] in found:
            raise ConfigError(f"--slo {word!r}: {read[1]} has a limit already")
        found[read[1]] = Slo(read[1], limit_s)
    return tuple(found.values())


def kept_by(outcomes: Iterable[Outcome], slos: Sequence[Slo]) -> int:
    """How many requests keep all."""
    return sum(all(slo.kept(outcome) for slo in slos) and outcome.ok for outcome in outcomes)
