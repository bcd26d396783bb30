"""How many microbatches a step is cut into: measured, never a rule.

Cutting a step lets the communication of one part hide behind the work of another, and makes every
part smaller, thus less efficient; which weighs more depends on machine, network and batch. So for
each kind of step (tokens of the busiest rank by powers of two; decode alone or prompts too) this
keeps the seconds per token of the number in use, and now and then lets a neighbour on the ladder
1, 2, 4 run in every other step until it is clear which is faster.

A rival is tried at first, then after ``PERIOD`` steps (more, if it lost clearly), and as soon as
the steps' time drifts. A larger number is tried only where even the rank that waits least waits for
a share of ``GAIN`` or more: overlap can win no more than that. Medians, so that a step that was
interrupted decides nothing.

Pure: times are arguments.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

LARGEST = 4
GAIN = 0.03
MARGIN = 0.98  # a rival must be so much faster to win
CLEAR = 1.1
DRIFT = 1.25
TRIES, KEPT = 3, 9
PERIOD = 192
MOST_PERIODS = 8
SOONEST = 32


@dataclass(frozen=True, slots=True)
class StepShape:
    """What kind of step: ``tokens`` of the rank that has most of them."""

    tokens: int
    decode: bool


class MicrobatchPolicy(Protocol):
    """Chooses for all ranks; ``learn`` hears of every step that ``choose`` decided.

    ``waited`` are the seconds that the rank which waited least for others spent so.
    """

    def choose(self, shape: StepShape) -> int: ...

    def learn(self, shape: StepShape, count: int, seconds: float, waited: float) -> None: ...


@dataclass(frozen=True, slots=True)
class FixedMicrobatches:
    """Always the same number."""

    count: int

    def choose(self, shape: StepShape) -> int:
        return self.count

    def learn(self, shape: StepShape, count: int, seconds: float, waited: float) -> None: ...


@dataclass(slots=True)
class _Arm:
    """A number of microbatches, with its latest seconds per token and shares of waiting."""

    count: int
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    shares: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))


@dataclass(slots=True)
class _Kind:
    """What is known of one kind of step, which has room for ``most`` microbatches."""

    most: int
    best: _Arm = field(default_factory=lambda: _Arm(1))
    rival: _Arm | None = None
    rivals_turn: bool = False
    upward: bool = True
    steps: int = 0  # since the last comparison
    pause: int = TRIES
    periods: int = 1
    drifted: bool = False
    settled: float | None = None  # seconds per token of the best after the last comparison


class MeasuredMicrobatches:
    """The number that has proved fastest for the kind of step, give or take what trying costs."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[int, bool], _Kind] = {}

    def choose(self, shape: StepShape) -> int:
        kind = self._kind(shape)
        if kind.rival is not None and kind.rivals_turn:
            return kind.rival.count
        return kind.best.count

    def learn(self, shape: StepShape, count: int, seconds: float, waited: float) -> None:
        if shape.tokens < 1 or seconds <= 0:
            return
        kind = self._kind(shape)
        arm = kind.rival if kind.rival is not None and count == kind.rival.count else kind.best
        if arm.count != count:
            return
        arm.seconds.append(seconds / shape.tokens)
        arm.shares.append(waited / seconds)
        kind.steps += 1
        if kind.rival is None:
            _challenge(kind)
        else:
            kind.rivals_turn = not kind.rivals_turn
            _judge(kind, kind.rival)

    def _kind(self, shape: StepShape) -> _Kind:
        size = max(1, shape.tokens).bit_length() - 1
        return self._kinds.setdefault((size, shape.decode), _Kind(min(LARGEST, 1 << size)))


def _challenge(kind: _Kind) -> None:
    """Begin a comparison if it is time for one."""
    if len(kind.best.seconds) < TRIES:
        return
    now = median(kind.best.seconds)
    changed = kind.settled is not None and not 1 / DRIFT < now / kind.settled < DRIFT
    if changed and kind.steps >= SOONEST:
        kind.periods, kind.drifted, kind.upward = 1, True, True
    elif kind.steps < kind.pause:
        return
    up = 2 * kind.best.count
    if kind.upward and up <= kind.most and median(kind.best.shares) >= GAIN:
        kind.rival = _Arm(up)
    elif kind.best.count > 1 and not (kind.upward and kind.settled is None):
        kind.rival = _Arm(kind.best.count // 2)
    elif kind.best.count > 1:
        _settle(kind)  # it has just beaten the one below, and there is none above
    kind.rivals_turn = True


def _judge(kind: _Kind, rival: _Arm) -> None:
    """End the comparison if it is decided."""
    tries = len(rival.seconds)
    if kind.rivals_turn or tries < TRIES:
        return
    now = median(kind.best.seconds)
    lost = min(rival.seconds) > CLEAR * now
    won = max(rival.seconds) * CLEAR < now
    if not lost and not won and tries < KEPT:
        return
    kind.rival = None
    if median(rival.seconds) < MARGIN * now:
        kind.upward = rival.count > kind.best.count
        kind.best, kind.periods = rival, 1
        kind.steps, kind.pause, kind.settled = 0, TRIES, None
        if not kind.upward:
            _settle(kind)
        return
    kind.periods = min(MOST_PERIODS, 2 * kind.periods) if lost else 1
    _settle(kind)


def _settle(kind: _Kind) -> None:
    """Leave the best alone for a while; next time look the other way."""
    kind.settled = median(kind.best.seconds)
    kind.steps, kind.pause = 0, SOONEST if kind.drifted else kind.periods * PERIOD
    kind.drifted = False
    kind.upward = not kind.upward or kind.best.count == 1


def median(values: Iterable[float]) -> float:
    """The upper one of two."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2]
