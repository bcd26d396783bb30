"""Guesses that steps made themselves, and how often they are right.

A step that is asked to guesses what follows the tokens that it samples (``Drafter.to_make``); here
the guesses wait for the step that checks them. How likely the first is right is a moving mean of
its request, which begins with that of its kind (greedy or sampled); how likely the next ones are,
if those before were, of the kind. What a request went on with tells it, checked or not. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from moeserve.core import Drafted, RequestId
from moeserve.engine.policies.ngrams import NOTHING, Guess
from moeserve.engine.sequence import SequenceState
from moeserve.engine.step_cost import DecodeCost

# Before any was seen, so likely is a guess right, as if that had been seen so often: worth a try.
FIRST_CHANCE, FIRST_WEIGHT = 0.8, 2
# What the newest of many observations counts, of a kind and of a request; how many of its kind a
# request begins with.
FADE, OWN_FADE, OWN_WEIGHT = 0.01, 0.03, 16
# Before it was measured: what guesses of one position cost, as a share of the step.
FIRST_COST = 0.15


@dataclass(slots=True)
class _Own:
    """Of a request: guesses behind its first ``base`` outputs; its chances so far."""

    outputs: list[int]
    base: int
    token_ids: tuple[int, ...]
    share: float
    count: int = OWN_WEIGHT


class MadeDrafts:
    """A ``DraftSource`` of what the step before has guessed. One thread uses it."""

    def __init__(self) -> None:
        self._fresh: dict[RequestId, tuple[int, ...]] = {}
        self._own: dict[RequestId, _Own] = {}
        # By whether it is greedy and how many are before it: how often it was right, of how many.
        self._right: dict[tuple[bool, int], tuple[float, int]] = {}
        self._passes = DecodeCost()

    def take(self, drafted: Sequence[Drafted], seconds: float) -> None:
        """What the step that is over has made; those of steps before are of no use any more."""
        if not drafted:
            if self._fresh:
                self._fresh = {}
            return
        self._fresh = {one.request_id: one.token_ids for one in drafted}
        longest = max(len(one.token_ids) for one in drafted)
        if longest and not any(one.read for one in drafted):  # reading is done once
            self._passes.note(len(drafted), seconds / longest)

    def seconds(self, count: int, generating: int, step_s: float) -> float:
        """To make so many guesses for each of those that generate, where their step alone takes
        ``step_s``."""
        if self._passes.known:
            return count * self._passes.seconds(generating)
        return count * FIRST_COST * step_s

    def expected(self, seqs: Collection[SequenceState], most: int) -> list[float]:
        """How many first guesses, second ones, and so on up to ``most``, would be right if they
        were made for these."""
        right = [0.0] * most
        if not most:
            return right
        kinds = [[self._chance(greedy, i) for i in range(1, most)] for greedy in (False, True)]
        for seq in seqs:
            if seq.request.params.grammar is not None:
                continue
            greedy = seq.request.params.temperature == 0
            own = self._own.get(seq.request.id)
            chance = self._chance(greedy, 0) if own is None else own.share
            right[0] += chance
            for i, following in enumerate(kinds[greedy], 1):
                chance *= following
                right[i] += chance
        return right

    def learn(self, seqs: Collection[SequenceState], most: int | None = None) -> None:
        """``most`` is of no matter here: guesses are few."""
        own = self._own
        if not (own or self._fresh):
            return
        for seq in seqs:
            state = own.get(seq.request.id)
            fresh = self._fresh.get(seq.request.id, ())
            if state is None or state.outputs is not seq.output_ids:
                if not fresh:
                    continue
                share = self._chance(seq.request.params.temperature == 0, 0)
                state = own[seq.request.id] = _Own(seq.output_ids, 0, (), share)
            if state.token_ids:
                self._compare(seq, state)
            state.base, state.token_ids = len(seq.output_ids), fresh
        self._fresh = {}
        if len(own) > 2 * len(seqs) + 16:
            here = {seq.request.id for seq in seqs}
            self._own = {id_: state for id_, state in own.items() if id_ in here}

    def guess(self, seq: SequenceState, most: int) -> Guess:
        state = self._own.get(seq.request.id)
        if state is None or not state.token_ids or state.base != len(seq.output_ids):
            return NOTHING
        greedy, chance = seq.request.params.temperature == 0, state.share
        token_ids = state.token_ids[:most]
        chances = [chance]
        for i in range(1, len(token_ids)):
            chance *= self._chance(greedy, i)
            chances.append(chance)
        return Guess(token_ids, tuple(chances))

    def _chance(self, greedy: bool, index: int) -> float:
        """That a guess is right behind so many right ones; that before it, while few were seen."""
        chance = FIRST_CHANCE
        for i in range(index + 1):
            share, count = self._right.get((greedy, i), (0.0, 0))
            chance = (share * count + chance * FIRST_WEIGHT) / (count + FIRST_WEIGHT)
        return chance

    def _compare(self, seq: SequenceState, state: _Own) -> None:
        """Guesses with what came, as far as those before them were right."""
        greedy = seq.request.params.temperature == 0
        made = seq.output_ids[state.base : state.base + len(state.token_ids)]
        for i, (guessed, came) in enumerate(zip(state.token_ids, made, strict=False)):
            right = guessed == came
            share, count = self._right.get((greedy, i), (0.0, 0))
            share += max(FADE, 1 / (count + 1)) * (right - share)
            self._right[greedy, i] = share, count + 1
            if not i:
                state.count += 1
                state.share += max(OWN_FADE, 1 / state.count) * (right - state.share)
            if not right:
                return
