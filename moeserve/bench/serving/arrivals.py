"""When requests of a given rate are due.

As `vllm bench serve` defines it: gaps are drawn from a gamma distribution of shape ``burstiness``
and mean 1 / rate (1 is Poisson, less is burstier, more is steadier), there is one before
each request, and all are scaled so that the last request is due at count / rate.

Pure. Letters in names are shapes: S requests.
"""

from __future__ import annotations

import math

import numpy as np

from moeserve.errors import ConfigError

KINDS = ("poisson", "gamma", "constant")
MOST_REQUESTS = 10_000_000


def arrival_times(
    count: int, rate: float, *, kind: str = "poisson", burstiness: float = 1.0, seed: int = 0
) -> list[float]:
    """[S] seconds after the start, ascending; ``rate`` is requests/s, infinity is all at once."""
    if not 1 <= count <= MOST_REQUESTS:
        raise ConfigError(f"{count} requests: expected 1 to {MOST_REQUESTS}")
    if not rate > 0:
        raise ConfigError(f"--request-rate={rate}: expected more than 0 requests/s, or inf")
    if kind not in KINDS:
        raise ConfigError(f"--arrivals={kind!r}: expected one of {', '.join(KINDS)}")
    if not (burstiness > 0 and math.isfinite(burstiness)):
        raise ConfigError(f"--burstiness={burstiness}: expected a number above 0")
    if burstiness != 1 and kind != "gamma":
        raise ConfigError(f"--burstiness={burstiness}: is of --arrivals gamma, not {kind}")
    if math.isinf(rate):
        return [0.0] * count
    if kind == "constant":
        return [(i + 1) / rate for i in range(count)]
    gaps_S = np.random.default_rng(seed).gamma(burstiness, 1.0, count)
    at_S = np.cumsum(gaps_S)
    if not at_S[-1] > 0:  # bursts so extreme that every gap is less than a float can say
        return [count / rate] * count
    at_S *= (count / rate) / at_S[-1]
    return [float(at_s) for at_s in at_S]
