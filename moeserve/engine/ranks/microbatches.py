"""How many microbatches a step is cut into: measured, never a rule.

Cutting a step lets the communication of one part hide behind the work of another, and makes every
part smaller, thus less efficient; which weighs more depends on machine, network and batch. So each
kind of step (tokens of the busiest rank by powers of two; decode alone or prompts too) has a state
machine of its own, which keeps the seconds per token of the number in use and now and then compares
it with its neighbour on the ladder 1, 2, 4::

                       a larger number is worth a try
    start -> WARMUP -------------------------------------> COMPARING
               |  ^                                         |   |  ^
               |  +------------- larger won ----------------+   |  |
               |                                                |  |
               |  none is, and it is not 1         smaller won, |  | pause over,
               |                                or the old kept |  | or times drifted
               |                                                v  |
               +----------------------------------------------> SETTLED

WARMUP     gathers ``TRIES`` steps of a number that is new: the first one, or one that has just won
           as the larger. It then looks upward only, for it has just beaten the one below.
COMPARING  has the rival and the number in use run in turn. After ``TRIES`` steps of the rival it
           ends where one is clearly faster (``CLEAR``), after ``KEPT`` in any case; the rival wins
           where its median is less than ``MARGIN`` of the other's.
SETTLED    leaves the number alone for ``PERIOD`` steps, for longer each time a rival loses clearly,
           and for ``SOONEST`` where the time per token drifts by ``DRIFT``. It looks upward and
           downward in turn.

A larger number is worth a try only where even the rank that waits least waits for a share of
``GAIN`` or more: microbatches can win no more than that. Medians, so that a step that was
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
    """Chooses for all ranks; ``learn`` gets every step that ``choose`` decided.

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
class Samples:
    """The latest steps of ``count`` microbatches: seconds per token, and shares of waiting."""

    count: int
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    shares: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))


@dataclass(slots=True)
class Warmup:
    """``steps`` were measured since the number in use is in use."""

    steps: int = 0


@dataclass(slots=True)
class Comparing:
    """The number in use and ``rival`` take turns; ``rivals_turn`` says who runs next."""

    rival: Samples
    rivals_turn: bool = True


@dataclass(slots=True)
class Settled:
    """The number in use took ``seconds`` per token when it settled, ``steps`` ago; the next
    comparison is due after ``pause`` of them."""

    seconds: float
    pause: int
    steps: int = 0

    def drifted(self, now: float) -> bool:
        """Whether ``now`` seconds per token are another figure than when it settled."""
        return not 1 / DRIFT < now / self.seconds < DRIFT


State = Warmup | Comparing | Settled


@dataclass(slots=True)
class StepKind:
    """The state machine of one kind of step, which has room for ``most`` microbatches.

    ``best`` is the number in use. ``upward`` is where the next comparison looks first, ``periods``
    how long the next pause is, in ``PERIOD``; ``drifted`` shortens it once.
    """

    most: int
    best: Samples = field(default_factory=lambda: Samples(1))
    state: State = field(default_factory=Warmup)
    upward: bool = True
    periods: int = 1
    drifted: bool = False

    @property
    def count(self) -> int:
        """The number of microbatches of the next step."""
        state = self.state
        if isinstance(state, Comparing) and state.rivals_turn:
            return state.rival.count
        return self.best.count

    def record(self, count: int, seconds_per_token: float, share: float) -> None:
        """A step has been measured; one of a number that is no longer tried changes nothing."""
        state = self.state
        comparing = isinstance(state, Comparing) and count == state.rival.count
        samples = state.rival if isinstance(state, Comparing) and comparing else self.best
        if samples.count != count:
            return
        samples.seconds.append(seconds_per_token)
        samples.shares.append(share)
        match state:
            case Warmup():
                self._after_warmup_step(state)
            case Comparing():
                self._after_compared_step(state)
            case Settled():
                self._after_settled_step(state)

    def _after_warmup_step(self, state: Warmup) -> None:
        state.steps += 1
        if state.steps < TRIES:
            return
        if self._larger_is_worth_a_try():
            self._compare(2 * self.best.count)
        elif self.best.count > 1:
            self._settle()

    def _after_settled_step(self, state: Settled) -> None:
        state.steps += 1
        if state.steps >= SOONEST and state.drifted(median(self.best.seconds)):
            self.periods, self.drifted, self.upward = 1, True, True
        elif state.steps < state.pause:
            return
        if self.upward and self._larger_is_worth_a_try():
            self._compare(2 * self.best.count)
        elif self.best.count > 1:
            self._compare(self.best.count // 2)

    def _after_compared_step(self, state: Comparing) -> None:
        """Decided after a step of the rival, once there are enough of them."""
        state.rivals_turn = not state.rivals_turn
        rival, tries = state.rival, len(state.rival.seconds)
        if state.rivals_turn or tries < TRIES:
            return
        now = median(self.best.seconds)
        clearly_lost = min(rival.seconds) > CLEAR * now
        clearly_won = max(rival.seconds) * CLEAR < now
        if not clearly_lost and not clearly_won and tries < KEPT:
            return
        if median(rival.seconds) < MARGIN * now:
            self._replace(rival)
        else:
            self.periods = min(MOST_PERIODS, 2 * self.periods) if clearly_lost else 1
            self._settle()

    def _larger_is_worth_a_try(self) -> bool:
        return 2 * self.best.count <= self.most and median(self.best.shares) >= GAIN

    def _compare(self, count: int) -> None:
        self.state = Comparing(Samples(count))

    def _replace(self, rival: Samples) -> None:
        """The rival has won: a larger one looks further up, a smaller one settles."""
        self.upward = rival.count > self.best.count
        self.best, self.periods = rival, 1
        if self.upward:
            self.state = Warmup()
        else:
            self._settle()

    def _settle(self) -> None:
        """Leave the number in use alone for a while; next time look the other way."""
        pause = SOONEST if self.drifted else self.periods * PERIOD
        self.state = Settled(median(self.best.seconds), pause)
        self.drifted = False
        self.upward = not self.upward or self.best.count == 1


class MeasuredMicrobatches:
    """The number that has proved fastest for the kind of step, give or take what trying costs."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[int, bool], StepKind] = {}

    def choose(self, shape: StepShape) -> int:
        return self.kind_of(shape).count

    def learn(self, shape: StepShape, count: int, seconds: float, waited: float) -> None:
        if shape.tokens < 1 or seconds <= 0:
            return
        self.kind_of(shape).record(count, seconds / shape.tokens, waited / seconds)

    def kind_of(self, shape: StepShape) -> StepKind:
        """The machine that steps of this shape share."""
        size = max(1, shape.tokens).bit_length() - 1
        return self._kinds.setdefault((size, shape.decode), StepKind(min(LARGEST, 1 << size)))


def median(values: Iterable[float]) -> float:
    """The upper one of two."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2]
