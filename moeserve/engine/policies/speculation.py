"""How many drafts a step checks: as many as make tokens come sooner, which may be none.

SmartSpec's goodput (Liu et al. 2024): the tokens that a step is expected to make, over the seconds
that it is predicted to take. Drafts of all requests are taken from the likeliest on, as long as
that grows; so each request has its own number in every step, by its own guesses and by what a
token more costs at this load. Which drafts are checked changes no token (law 1). Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moeserve.engine.policies.ngrams import NOTHING, DraftSource, Guess, in_order
from moeserve.engine.sequence import SequenceState
from moeserve.engine.step_cost import DecodeCost, StepLine

# Of one request in one step.
MOST_DRAFTS = 8
# Drafts have to bring so much more than none: what steps cost is known no better.
GAIN = 1.02
# Where goodput is so much lower than with fewer drafts, more are not looked at.
GIVE_UP = 0.9


class Speculation:
    """A ``Drafter`` that takes what ``source`` guesses as far as it pays.

    ``decodes`` says what steps cost that decode alone, ``steps`` those that have prompts too.
    """

    def __init__(
        self, source: DraftSource, decodes: DecodeCost, steps: StepLine, most: int = MOST_DRAFTS
    ) -> None:
        self._source = source
        self._decodes = decodes
        self._steps = steps
        self._most = most

    def propose(self, seqs: Sequence[SequenceState], beside: int) -> Sequence[Sequence[int]]:
        self._source.learn(seqs)
        seconds = self._seconds(beside)
        if seconds is None or not seqs:
            return ()
        guesses = [self._guess(seq) for seq in seqs]
        chances = in_order(guesses)
        count = worthwhile_drafts(seconds, len(seqs), chances)
        return take_likeliest(guesses, chances[count - 1], count) if count else ()

    def _guess(self, seq: SequenceState) -> Guess:
        if seq.request.params.grammar is not None:
            return NOTHING
        return self._source.guess(seq, self._most)

    def _seconds(self, beside: int) -> Callable[[int], float] | None:
        """Of a step with so many tokens beside its prompts; None where too little was measured."""
        if not beside:
            return self._decodes.seconds if self._decodes.known else None
        line = self._steps.line
        return None if line is None else lambda tokens: line[0] + line[1] * (tokens + beside)


class FixedDrafts:
    """A ``Drafter`` that takes the first ``count`` guesses of each, whatever they cost: what
    ``Speculation`` is measured against."""

    def __init__(self, source: DraftSource, count: int) -> None:
        self._source = source
        self._count = count

    def propose(self, seqs: Sequence[SequenceState], beside: int) -> Sequence[Sequence[int]]:
        self._source.learn(seqs)
        if not self._count:
            return ()
        return [self._source.guess(seq, self._count).token_ids for seq in seqs]


def worthwhile_drafts(
    seconds: Callable[[int], float], generating: int, chances: Sequence[float]
) -> int:
    """How many drafts, of which the likeliest are taken first, make most tokens a second."""
    made, best, found = float(generating), GAIN * generating / seconds(generating), 0
    for count, chance in enumerate(chances, 1):
        made += chance
        rate = made / seconds(generating + count)
        if rate > best:
            best, found = rate, count
        elif rate < GIVE_UP * best:
            break
    return found


def take_likeliest(guesses: Sequence[Guess], least: float, count: int) -> list[tuple[int, ...]]:
    """The ``count`` likeliest drafts, of which the last has the chance ``least``; of equal ones,
    those of earlier sequences."""
    taken: list[tuple[int, ...]] = []
    equal = count - sum(chance > least for guess in guesses for chance in guess.chances)
    for guess in guesses:
        fit = sum(chance > least for chance in guess.chances)
        while equal and fit < len(guess.chances) and guess.chances[fit] == least:
            fit, equal = fit + 1, equal - 1
        taken.append(guess.token_ids[:fit])
    return taken
