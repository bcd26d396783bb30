"""Whether the KV of a prefix is fetched or computed: whichever has lately been cheaper.

Fetching takes ``latency + bytes / rate``, computing ``tokens / rate``; all three are exponential
means of what was measured here. A choice is kept until the other is cheaper by ``MARGIN``, so that
noise does not turn it to and fro. What is not measured yet is tried: fetching is believed to be
cheap until it was measured, computing dear. Where computing wins, one hit in ``PROBE_EVERY`` is
fetched all the same, so that a path that has become fast is found out. Pure: times are arguments.
"""

from __future__ import annotations

from dataclasses import dataclass

MARGIN = 0.2
PROBE_EVERY = 32
# Weight of the newest measurement.
NEWEST = 0.2


@dataclass(slots=True)
class RecomputeCounts:
    """Choices: hits that were fetched, those of them that were probes, and hits that were computed
    instead, with their tokens."""

    fetched: int = 0
    probes: int = 0
    recomputed: int = 0
    recomputed_tokens: int = 0


@dataclass(slots=True)
class _Mean:
    value: float = 0.0
    known: bool = False

    def add(self, value: float) -> None:
        self.value += (value - self.value) * (NEWEST if self.known else 1.0)
        self.known = True


class RecomputePolicy:
    """Of one peer. ``fetch_cost`` and ``compute_cost`` are seconds."""

    def __init__(self) -> None:
        self.counts = RecomputeCounts()
        self._latency = _Mean()
        self._byte_s = _Mean()
        self._token_s = _Mean()
        self._computes = False
        self._refused = 0

    def asked(self, seconds: float) -> None:
        """A member was asked for something small, and answered."""
        self._latency.add(max(seconds, 0.0))

    def fetched(self, nbytes: int, seconds: float) -> None:
        """So many bytes came, the asking included."""
        if nbytes > 0:
            self._byte_s.add(max(seconds - self._latency.value, 1e-9) / nbytes)

    def computed(self, tokens: int, seconds: float) -> None:
        """So many tokens were prefilled."""
        if tokens > 0:
            self._token_s.add(max(seconds, 1e-9) / tokens)

    def fetch_cost(self, nbytes: int) -> float:
        return self._latency.value + nbytes * self._byte_s.value

    def compute_cost(self, tokens: int) -> float:
        return tokens * self._token_s.value

    def choose_fetch(self, tokens: int, nbytes: int) -> bool:
        """Whether to fetch ``nbytes`` that hold ``tokens``, rather than compute these; counted."""
        if self._token_s.known and self._byte_s.known:
            fetch, compute = self.fetch_cost(nbytes), self.compute_cost(tokens)
            if self._computes:
                self._computes = fetch * (1 + MARGIN) > compute
            else:
                self._computes = fetch > compute * (1 + MARGIN)
        if not self._computes:
            self.counts.fetched += 1
            return True
        self._refused += 1
        if self._refused % PROBE_EVERY == 0:
            self.counts.fetched += 1
            self.counts.probes += 1
            return True
        self.counts.recomputed += 1
        self.counts.recomputed_tokens += tokens
        return False
