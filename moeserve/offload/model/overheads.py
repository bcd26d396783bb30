"""What steps take beside products and attention, by what they hold. Pure.

Norms, rotations, routing, rounding, the combine, the many small products where a model has several
instead of one large one, and Python's part. Seconds; "numbers" are tokens times the hidden size.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from moeserve.errors import ConfigError

MOST_POINTS = 64
LEAST_FACTOR, MOST_FACTOR = 0.5, 2.0


@dataclass(frozen=True, slots=True)
class RestCurve:
    """``seconds[i]`` of a layer through which ``numbers[i]`` numbers pass.

    Both rise, from nothing at 0; straight between points, and in proportion beyond the last. No
    points are no seconds.
    """

    numbers: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        fits = len(self.numbers) == len(self.seconds) <= MOST_POINTS
        ascends = all(a < b for a, b in pairwise((0.0, *self.numbers)))
        grows = all(a <= b for a, b in pairwise((0.0, *self.seconds)))
        if not (fits and ascends and grows):
            raise ConfigError(f"{self}: what layers take beside does not rise; calibrate again")

    def at(self, numbers: float) -> float:
        if not self.numbers or numbers <= 0:
            return 0.0
        if numbers >= self.numbers[-1]:
            return self.seconds[-1] * numbers / self.numbers[-1]
        return between((0.0, *self.numbers), (0.0, *self.seconds), numbers)


@dataclass(frozen=True, slots=True)
class Overheads:
    """``step`` seconds in any case, ``row`` for each token that is sampled, ``layer`` for each
    layer, and for each layer ``decode`` by the numbers of tokens that generate and ``prompt`` by
    those of prompts. ``attention`` is how many times as long as by itself attention of decoding
    tokens takes in a step. ``streamed`` is of a layer whose experts are read from disk, ``record``
    of each that is read."""

    step: float = 0.0
    row: float = 0.0
    layer: float = 0.0
    decode: RestCurve = field(default_factory=RestCurve)
    prompt: RestCurve = field(default_factory=RestCurve)
    attention: float = 1.0
    streamed: float = 0.0
    record: float = 0.0

    def __post_init__(self) -> None:
        least = min(self.step, self.row, self.layer, self.streamed, self.record)
        if not (least >= 0 and LEAST_FACTOR <= self.attention <= MOST_FACTOR):
            raise ConfigError(
                f"overheads {self} are below 0, or attention not within {LEAST_FACTOR:g} to "
                f"{MOST_FACTOR:g}; calibrate again"
            )

    def with_ends(self, known: Overheads, other: Overheads) -> Overheads:
        """With a step and rows that take ``other``'s seconds where they took ``known``'s."""
        step = max(0.0, self.step - known.step) + other.step
        return replace(self, step=step, row=max(0.0, self.row - known.row) + other.row)

    def times(self, factor: float) -> Overheads:
        """With so many times the seconds."""

        def curve(one: RestCurve) -> RestCurve:
            return replace(one, seconds=tuple(factor * seconds for seconds in one.seconds))

        return Overheads(
            factor * self.step,
            factor * self.row,
            factor * self.layer,
            curve(self.decode),
            curve(self.prompt),
            self.attention,
            factor * self.streamed,
            factor * self.record,
        )

    def of_layer(self, decoding: float, prompts: float) -> float:
        """Beside ``layer``, with so many numbers of either kind."""
        return self.decode.at(decoding) + self.prompt.at(prompts)


def between(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """Straight between points; ``x`` lies within ``xs``, which ascend."""
    i = max(1, bisect_left(xs, x))
    return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1])
