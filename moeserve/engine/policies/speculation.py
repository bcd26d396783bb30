"""How many drafts a step checks: as many as make tokens come sooner, which may be none.

SmartSpec's goodput (Liu et al. 2024): the tokens that a step is expected to make, over the seconds
that it is predicted to take. Drafts of all requests are taken from the likeliest on, as long as
that grows; so each request has its own number in every step, by its own guesses and by what a
token more costs at this load. Which drafts are checked changes no token (law 1). Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moeserve.core import Drafted
from moeserve.engine.policies.choices import Drafter
from moeserve.engine.policies.made import MadeDrafts
from moeserve.engine.policies.ngrams import NOTHING, DraftSource, Guess, in_order
from moeserve.engine.sequence import SequenceState
from moeserve.engine.step_cost import DecodeCost, StepLine

# Of one request in one step.
MOST_DRAFTS = 8
# Drafts have to bring so much more than none: what steps cost is known no better.
GAIN = 1.02
# Where goodput is so much lower than with fewer drafts, more are not looked at.
GIVE_UP = 0.9
# Steps in a row without a draft that pays before it is left off; for so many steps, twice as many
# each time; and where it is tried anew after a long while, so many guesses are made unasked.
TRIAL = 5
SHORTEST_REST, LONGEST_REST = 4, 512
FEW_STEPS = 4
PROBES = 3
# Steps with drafts after which it is looked what steps without cost, in so many at most; and until
# that is looked at again, if it has to.
CONTROL_AFTER, CONTROL, CONTROL_AGAIN = 8, 5, 64
# Tokens that are read in a step, of all sequences, while nothing pays.
MOST_READ = 32


class Rest:
    """When to leave off. A rest ends early where no more than half as many generate as when it
    began, for ``FEW_STEPS`` in a row: less is others that come and go."""

    def __init__(self) -> None:
        self._left = 0
        self._length = SHORTEST_REST
        self._generating = 0
        self._few = 0
        self._tries = 1

    @property
    def pays(self) -> bool:
        """Whether drafts paid in the last step that was asked for."""
        return not self._tries

    @property
    def probes(self) -> bool:
        """Whether so much time has gone by that all may be different."""
        return self._length == LONGEST_REST and self._tries < PROBES

    @property
    def begins(self) -> bool:
        """Whether the next step is not one to ask for."""
        return self._left > 0

    def over(self, generating: int) -> bool:
        """Whether the next step is one to ask for; asked for each."""
        if not self._left:
            return True
        self._left -= 1
        self._few = self._few + 1 if 2 * generating <= self._generating else 0
        if self._few == FEW_STEPS:
            self._left, self._length = 0, SHORTEST_REST
        return False

    def note(self, generating: int, *, paid: bool) -> None:
        """Of a step that was asked for."""
        if paid:
            # What is only tried pays too, as far as is known: one step tells little.
            self._tries, self._length = 0, max(SHORTEST_REST, self._length // 2)
            return
        self._tries += 1
        if self._tries >= TRIAL:
            self._left, self._generating, self._few = self._length, generating, 0
            self._tries = 1
            self._length = min(2 * self._length, LONGEST_REST)


class Control:
    """When to leave drafts out although they seem to pay: what a step costs without can only be
    seen where several come one after the other."""

    def __init__(self) -> None:
        self._wait = CONTROL_AFTER
        self._left = 0

    def due(self, *, known: bool) -> bool:
        """Of a step whose drafts would pay; ``known`` is what it costs without."""
        if self._left:
            self._left = 0 if known else self._left - 1
        elif self._wait:
            self._wait -= 1
        elif not known:
            self._left, self._wait = CONTROL - 1, CONTROL_AGAIN
            return True
        return self._left > 0


class Speculation(Drafter):
    """Takes what ``source`` guesses, and has steps make what ``made`` then has, as far as it pays.

    ``decodes`` says what steps cost that decode alone, ``steps`` those that have prompts too, both
    without what is made behind them.
    """

    def __init__(
        self,
        source: DraftSource | None,
        decodes: DecodeCost,
        steps: StepLine,
        most: int = MOST_DRAFTS,
        made: MadeDrafts | None = None,
    ) -> None:
        self._source = source
        self._made = made
        self._decodes = decodes
        self._steps = steps
        self._most = most
        self._rest = Rest()
        self._control = Control()

    def awake(self, generating: int) -> bool:
        return self._rest.over(generating)

    def take(self, drafted: Sequence[Drafted], seconds: float) -> None:
        self._decodes.drafting_s = seconds
        if self._made is not None:
            self._made.take(drafted, seconds)

    def propose(self, seqs: Sequence[SequenceState], beside: int) -> Sequence[Sequence[int]]:
        read = None if self._rest.pays else MOST_READ
        for source in (self._source, self._made):
            if source is not None:
                source.learn(seqs, read)
        seconds = self._seconds(beside)
        if seconds is None or not seqs:
            return ()
        found = [self._look_up(seq) for seq in seqs]
        to_make = self._worth_making(seqs, found, seconds)
        guesses = found if self._made is None else list(map(self._likelier, seqs, found))
        chances = in_order(guesses)[: self._most_to_try(len(seqs))]
        costs = self._with_making(seconds, len(seqs), to_make)
        count = worthwhile_drafts(costs, len(seqs), chances)
        paid = bool(count or to_make)
        if paid and self._control.due(known=bool(beside) or self._decodes.steady(len(seqs))):
            self.to_make = 0
            return ()
        probes = self._made is not None and self._rest.probes
        self._rest.note(len(seqs), paid=paid)
        self.to_make = 0 if self._rest.begins else to_make or min(int(probes), self._most)
        return take_likeliest(guesses, chances[count - 1], count) if count else ()

    def _look_up(self, seq: SequenceState) -> Guess:
        if self._source is None or seq.request.params.grammar is not None:
            return NOTHING
        return self._source.guess(seq, self._most)

    def _likelier(self, seq: SequenceState, found: Guess) -> Guess:
        """Of what was looked up and what was made: the one of which more is right."""
        assert self._made is not None, "asked for before"
        if seq.request.params.grammar is not None:
            return NOTHING
        made = self._made.guess(seq, self._most)
        return made if sum(made.chances) > sum(found.chances) else found

    def _worth_making(
        self,
        seqs: Sequence[SequenceState],
        found: Sequence[Guess],
        seconds: Callable[[int], float],
    ) -> int:
        """How many guesses a step had best make for the next one, against those it has anyway."""
        if self._made is None:
            return 0
        generating = len(seqs)
        room = self._most_to_try(generating)
        chances = in_order(found)[:room]
        count = worthwhile_drafts(seconds, generating, chances)
        rate = (generating + sum(chances[:count])) / seconds(generating + count)
        tokens, best, wanted = float(generating), GAIN * rate, 0
        for count, right in enumerate(self._made.expected(seqs, self._most), 1):
            if generating * count > room:
                break
            tokens += right
            costs = self._with_making(seconds, generating, count)
            rate = tokens / costs(generating * (1 + count))
            if rate > best:
                best, wanted = rate, count
            elif rate < GIVE_UP * best:
                break
        return wanted

    def _most_to_try(self, generating: int) -> int:
        """Drafts of all requests: what twice as many tokens cost as were ever measured may be far
        from what is hoped."""
        return max(generating, 2 * self._decodes.largest - generating)

    def _with_making(
        self, seconds: Callable[[int], float], generating: int, count: int
    ) -> Callable[[int], float]:
        """Of a step that makes so many guesses beside."""
        if self._made is None or not count:
            return seconds
        more = self._made.seconds(count, generating, seconds(generating))
        return lambda tokens: seconds(tokens) + more

    def _seconds(self, beside: int) -> Callable[[int], float] | None:
        """Of a step with so many tokens beside its prompts; None where too little was measured."""
        if not beside:
            return self._decodes.seconds if self._decodes.known else None
        line = self._steps.line
        return None if line is None else lambda tokens: line[0] + line[1] * (tokens + beside)


class FixedDrafts(Drafter):
    """Takes the first ``count`` guesses of each, and has them made where ``made`` is to have them,
    whatever they cost: what ``Speculation`` is measured against."""

    def __init__(
        self, source: DraftSource | None, count: int, made: MadeDrafts | None = None
    ) -> None:
        self._source = source
        self._made = made
        self._count = count
        self.to_make = 0 if made is None else count

    def take(self, drafted: Sequence[Drafted], seconds: float) -> None:
        if self._made is not None:
            self._made.take(drafted, seconds)

    def propose(self, seqs: Sequence[SequenceState], beside: int) -> Sequence[Sequence[int]]:
        source = self._made or self._source
        if source is None or not self._count:
            return ()
        source.learn(seqs)
        return [source.guess(seq, self._count).token_ids for seq in seqs]


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
