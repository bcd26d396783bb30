"""Steps over ranks in many ways, in turn: so that what disturbs the machine disturbs all alike.

A load is what every rank has in a step: so many streams that decode, or tokens of prompts. A way is
a variant of the traffic with a number of microbatches, fixed or chosen as the engine chooses
(``engine.ranks.microbatches``), which has learned before it is timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from moeserve.bench.crew import Crew, Spans, Taken, Variant
from moeserve.engine.ranks.microbatches import (
    FixedMicrobatches,
    MeasuredMicrobatches,
    MicrobatchPolicy,
    StepShape,
)

LEARNING_STEPS = 40
AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Load:
    """``tokens`` of every rank in a step."""

    what: str  # "decode" or "prefill"
    tokens: int

    @property
    def shape(self) -> StepShape:
        return StepShape(self.tokens, self.what == "decode")

    def spans(self, world: int, step: int, length: int, prompt: int) -> Spans:
        """Of sequences that are ``length`` long: in decode one token of each, walking from
        ``prompt`` to the end again and again; in prefill whole ones from the beginning."""
        if self.what == "decode":
            at = prompt + step % (length - prompt)
            return [[(s, at, at + 1) for s in range(self.tokens)]] * world
        whole, rest = divmod(self.tokens, length)
        own = [(s, 0, length) for s in range(whole)] + ([(whole, 0, rest)] if rest else [])
        return [own] * world

    def sequences(self, length: int) -> int:
        return self.tokens if self.what == "decode" else -(-self.tokens // length)


@dataclass(frozen=True, slots=True)
class Way:
    """``micro`` is a number, or "auto"."""

    variant: Variant
    micro: int | str


@dataclass(slots=True)
class Samples:
    """The steps of one way, by round; ``counts`` how many steps had so many microbatches."""

    rounds: list[list[Taken]] = field(default_factory=list)
    counts: dict[int, int] = field(default_factory=dict)

    @property
    def steps(self) -> list[Taken]:
        return [taken for of_round in self.rounds for taken in of_round]

    @property
    def seconds(self) -> float:
        """Of a step: the median of all."""
        return statistics.median(t.seconds for t in self.steps)

    @property
    def range_s(self) -> tuple[float, float]:
        """The least and the greatest median of a round."""
        return min(self.round_s), max(self.round_s)

    @property
    def round_s(self) -> list[float]:
        """The median step of each round."""
        return [statistics.median(t.seconds for t in r) for r in self.rounds]

    @property
    def waiting(self) -> float:
        """The share of a step that even the rank which waits least waits."""
        return statistics.median(t.waited_s / t.seconds for t in self.steps)

    @property
    def sent_bytes(self) -> float:
        return statistics.mean(t.sent_bytes for t in self.steps)

    @property
    def busiest_bytes(self) -> float:
        return statistics.mean(t.busiest_bytes for t in self.steps)

    @property
    def copies(self) -> float:
        """Per token and layer."""
        return sum(t.copies for t in self.steps) / sum(t.token_layers for t in self.steps)


@dataclass(frozen=True, slots=True)
class Effort:
    """``length`` of sequences and ``prompt``, after which they decode; the steps of a round."""

    length: int
    prompt: int
    steps: int
    rounds: int


def fill(crew: Crew, sequences: int, effort: Effort) -> None:
    """Write the KV of whole sequences: decoding then writes what is there already."""
    for s in range(sequences):
        crew.step([[(s, 0, effort.length)]] * crew.world, 1, Variant())


def measure(
    crew: Crew,
    load: Load,
    ways: Sequence[Way],
    effort: Effort,
    rates: Sequence[int | None],
    set_rate: Callable[[int | None], None],
) -> list[Mapping[Way, Samples]]:
    """Every way at every rate in turn, ``rounds`` times; by rate."""
    choosers: list[dict[Way, MicrobatchPolicy]] = [
        {
            way: MeasuredMicrobatches() if way.micro == AUTO else FixedMicrobatches(int(way.micro))
            for way in ways
        }
        for _ in rates
    ]
    found = [{way: Samples() for way in ways} for _ in rates]
    for turn in range(effort.rounds):
        for rate, chooser, samples_of in zip(rates, choosers, found, strict=True):
            set_rate(rate)
            for way, samples in samples_of.items():
                # What the links still held back from another rate goes by; auto learns first.
                for step in range(LEARNING_STEPS if way.micro == AUTO and not turn else 2):
                    _one(crew, load, way, chooser[way], effort, step)
                of_round = []
                for step in range(effort.steps):
                    count, taken = _one(crew, load, way, chooser[way], effort, step)
                    samples.counts[count] = samples.counts.get(count, 0) + 1
                    of_round.append(taken)
                samples.rounds.append(of_round)
    return list(found)


def _one(
    crew: Crew, load: Load, way: Way, chooser: MicrobatchPolicy, effort: Effort, step: int
) -> tuple[int, Taken]:
    count = chooser.choose(load.shape)
    spans = load.spans(crew.world, step, effort.length, effort.prompt)
    taken = crew.step(spans, count, way.variant)
    chooser.learn(load.shape, count, taken.seconds, taken.waited_s)
    return count, taken
