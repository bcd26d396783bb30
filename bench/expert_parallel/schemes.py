"""Steps over ranks by many schemes, in turn: so that what disturbs the machine disturbs all alike.

A load is what every rank has in a step: so many streams that decode, or tokens of prompts. A scheme
is a variant of the traffic with a number of microbatches, fixed or chosen as the engine chooses
(``engine.ranks.microbatches``), which has learned before it is timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from expert_parallel.group import GroupStep, RankGroup, Spans, TrafficVariant

from moeserve.engine.ranks.microbatches import (
    FixedMicrobatches,
    MeasuredMicrobatches,
    MicrobatchPolicy,
    StepShape,
)
from moeserve.testbed.network import Bed

LEARNING_STEPS = 40
AUTO = "auto"


@dataclass(frozen=True, slots=True)
class LoadCase:
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
class Scheme:
    """``microbatches`` is a number, or "auto"."""

    variant: TrafficVariant
    microbatches: int | str


@dataclass(slots=True)
class SchemeSamples:
    """The steps of one scheme, by round; ``counts`` how many steps had so many microbatches."""

    rounds: list[list[GroupStep]] = field(default_factory=list)
    counts: dict[int, int] = field(default_factory=dict)

    @property
    def steps(self) -> list[GroupStep]:
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
    def least_s(self) -> float:
        """Of the fastest step."""
        return min(t.seconds for t in self.steps)

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
class Repetitions:
    """``length`` of sequences and ``prompt``, after which they decode; the steps of a round, and
    those before them that are not timed."""

    length: int
    prompt: int
    steps: int
    rounds: int
    untimed: int = 2


def fill(group: RankGroup, sequences: int, repetitions: Repetitions) -> None:
    """Write the KV of whole sequences: decoding then writes what is there already."""
    for s in range(sequences):
        group.step([[(s, 0, repetitions.length)]] * group.world, 1, TrafficVariant())


def measure(
    group: RankGroup,
    load: LoadCase,
    schemes: Sequence[Scheme],
    repetitions: Repetitions,
    rates: Sequence[int | None],
    set_rate: Callable[[int | None], None],
) -> list[Mapping[Scheme, SchemeSamples]]:
    """Every scheme at every rate in turn, ``rounds`` times; by rate."""
    choosers: list[dict[Scheme, MicrobatchPolicy]] = [
        {
            scheme: MeasuredMicrobatches()
            if scheme.microbatches == AUTO
            else FixedMicrobatches(int(scheme.microbatches))
            for scheme in schemes
        }
        for _ in rates
    ]
    found = [{scheme: SchemeSamples() for scheme in schemes} for _ in rates]
    for turn in range(repetitions.rounds):
        for rate, chooser, samples_of in zip(rates, choosers, found, strict=True):
            set_rate(rate)
            for scheme, samples in samples_of.items():
                # What the links still held back from another rate goes by; auto learns first.
                learns = scheme.microbatches == AUTO and not turn
                for step in range(LEARNING_STEPS if learns else repetitions.untimed):
                    _one(group, load, scheme, chooser[scheme], repetitions, step)
                of_round = []
                for step in range(repetitions.steps):
                    count, taken = _one(group, load, scheme, chooser[scheme], repetitions, step)
                    samples.counts[count] = samples.counts.get(count, 0) + 1
                    of_round.append(taken)
                samples.rounds.append(of_round)
    return list(found)


def _one(
    group: RankGroup,
    load: LoadCase,
    scheme: Scheme,
    chooser: MicrobatchPolicy,
    repetitions: Repetitions,
    step: int,
) -> tuple[int, GroupStep]:
    count = chooser.choose(load.shape)
    spans = load.spans(group.world, step, repetitions.length, repetitions.prompt)
    taken = group.step(spans, count, scheme.variant)
    chooser.learn(load.shape, count, taken.seconds, taken.waited_s)
    return count, taken


def link_bytes(
    group: RankGroup, bed: Bed, load: LoadCase, variant: TrafficVariant, repetitions: Repetitions
) -> float:
    """What the kernel counts leaving all hosts in a step."""
    before = sum(bed.count(host).sent_bytes for host in range(bed.hosts))
    for step in range(repetitions.steps):
        spans = load.spans(group.world, step, repetitions.length, repetitions.prompt)
        group.step(spans, 1, variant)
    after = sum(bed.count(host).sent_bytes for host in range(bed.hosts))
    return (after - before) / repetitions.steps
