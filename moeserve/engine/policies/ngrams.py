"""Guesses of what follows, from all that was written before.

Prompt lookup (Saxena 2023: the tokens that followed the same few before, in the prompt) over
everything that requests of one scope wrote lately, as REST and SuffixDecoding do with a datastore
and with suffix trees: answers of one model resemble each other more than each its prompt. For each
of some last tokens there is the one that followed, and how often that was right, as a branch
predictor counts it. How likely a guess is right is measured by its kind: greedy or sampled, how
many tokens were looked up, how often that one was right. It is measured on every token that
requests make, checked drafts or not, so nothing has to be tried to be known.

Memory is bounded: ``MOST_ENTRIES`` in each of at most ``MOST_SCOPES`` scopes. Scopes share nothing,
so no tenant's time tells what another's answers are. Pure.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from moeserve.core import CacheScope, RequestId
from moeserve.engine.sequence import SequenceState

# As many last tokens are looked up; the most first.
ORDERS = (5, 3, 2, 1)
LONGEST = ORDERS[0]
# Of a table, in two generations: the older one is forgotten when the younger is half of it.
MOST_ENTRIES = 200_000
MOST_SCOPES = 64
# Tokens at the end of a prompt that are looked at: it costs microseconds for each.
MOST_PROMPT = 1024
# How sure an entry may be.
SUREST = 3
# Guesses that are less likely to be right, together with all before them, are not made.
LEAST_CHANCE = 0.05
# What the newest of many observations counts.
FADE = 0.01


class Guess(NamedTuple):
    """Tokens that may follow, and how likely each is right together with all before it."""

    token_ids: tuple[int, ...]
    chances: tuple[float, ...]


NOTHING = Guess((), ())


class DraftSource(Protocol):
    """Guesses how sequences go on."""

    def learn(self, seqs: Collection[SequenceState], most: int | None = None) -> None:
        """What these have made since they were seen last, of all together the newest ``most``
        tokens if that is said. Of others nothing need be kept."""
        ...

    def guess(self, seq: SequenceState, most: int) -> Guess:
        """What follows the newest token of one of them, ``most`` tokens at most."""
        ...


class NgramTable:
    """For some last tokens: the one that followed, and how sure that is, 0 to ``SUREST``."""

    def __init__(self, most: int = MOST_ENTRIES) -> None:
        self._half = max(1, most // 2)
        self._young: dict[tuple[int, ...], tuple[int, int]] = {}
        self._old: dict[tuple[int, ...], tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def find(self, context: tuple[int, ...]) -> tuple[int, int, int] | None:
        """The token, how sure, and how many of the last tokens it is from."""
        young, old = self._young.get, self._old.get
        for order in ORDERS:
            key = context[-order:]
            found = young(key) or old(key)
            if found is not None and len(key) == order:
                return found[0], found[1], order
        return None

    def put(self, context: tuple[int, ...], token_id: int) -> None:
        """``token_id`` followed these."""
        young, old = self._young, self._old.get
        for order in ORDERS:
            key = context[-order:]
            if len(key) < order:
                continue
            found = young.get(key) or old(key)
            if found is None:
                young[key] = (token_id, 0)
            elif found[0] == token_id:
                if found[1] < SUREST or key not in young:
                    young[key] = (token_id, min(SUREST, found[1] + 1))
            else:
                young[key] = (found[0], found[1] - 1) if found[1] else (token_id, 0)
        if len(young) >= self._half:
            self._young, self._old = {}, young


@dataclass(slots=True)
class _Seen:
    """Of a request: so many of its outputs are in the table; the newest tokens are ``context``."""

    outputs: list[int]
    learned: int
    context: tuple[int, ...]


class NgramDrafts:
    """A ``DraftSource`` that looks up the last tokens in a table of the request's scope."""

    def __init__(self, most_entries: int = MOST_ENTRIES) -> None:
        self._most = most_entries
        self._tables: OrderedDict[CacheScope, NgramTable] = OrderedDict()
        self._seen: dict[RequestId, _Seen] = {}
        # By whether it is greedy, order, and how sure: how often it was right, of how many.
        self._right: dict[tuple[bool, int, int], tuple[float, int]] = {}

    def chance(self, greedy: bool, order: int, sure: int) -> float:
        """How often such a guess was right lately; as good as not until some were."""
        share, count = self._right.get((greedy, order, sure), (0.5, 0))
        return (share * count + 1.0) / (count + 2)

    def learn(self, seqs: Collection[SequenceState], most: int | None = None) -> None:
        seen, room = self._seen, MOST_PROMPT if most is None else most
        for seq in seqs:
            state = seen.get(seq.request.id)
            if state is None or state.outputs is not seq.output_ids:
                state = seen[seq.request.id] = self._begin(seq, min(room, MOST_PROMPT))
                room -= 0 if most is None else min(room, len(seq.request.prompt_ids))
            new = seq.output_ids[state.learned :]
            if most is not None and len(new) > room:
                state.learned = len(seq.output_ids) - room
                state.context = seq.tokens(max(0, seq.length - room - LONGEST), seq.length - room)
                new = seq.output_ids[state.learned :]
            if new:
                self._read(seq, state, new)
                room -= 0 if most is None else len(new)
        if len(seen) > 2 * len(seqs) + 16:
            here = {seq.request.id for seq in seqs}
            self._seen = {id_: state for id_, state in seen.items() if id_ in here}

    def guess(self, seq: SequenceState, most: int) -> Guess:
        state = self._seen[seq.request.id]
        table, greedy = self._table(seq), seq.request.params.temperature == 0
        context, chance = state.context, 1.0
        token_ids: list[int] = []
        chances: list[float] = []
        while len(token_ids) < most and (found := table.find(context)) is not None:
            token_id, sure, order = found
            chance *= self.chance(greedy, order, sure)
            if chance < LEAST_CHANCE:
                break
            token_ids.append(token_id)
            chances.append(chance)
            context = (*context[1 - LONGEST :], token_id)
        return Guess(tuple(token_ids), tuple(chances)) if token_ids else NOTHING

    def _begin(self, seq: SequenceState, room: int) -> _Seen:
        """A request that is new here: the end of its prompt is read, which says nothing of
        chances."""
        table, prompt_ids = self._table(seq), seq.request.prompt_ids
        first = len(prompt_ids) - min(room, len(prompt_ids))
        context = prompt_ids[max(0, first - LONGEST) : first]
        for token_id in prompt_ids[first:]:
            table.put(context, token_id)
            context = (*context[1 - LONGEST :], token_id)
        return _Seen(seq.output_ids, 0, context)

    def _read(self, seq: SequenceState, state: _Seen, new: Iterable[int]) -> None:
        table, greedy = self._table(seq), seq.request.params.temperature == 0
        context = state.context
        for token_id in new:
            found = table.find(context)
            if found is not None:
                self._note((greedy, found[2], found[1]), found[0] == token_id)
            table.put(context, token_id)
            context = (*context[1 - LONGEST :], token_id)
            state.learned += 1
        state.context = context

    def _note(self, kind: tuple[bool, int, int], right: bool) -> None:
        share, count = self._right.get(kind, (0.0, 0))
        step = max(FADE, 1 / (count + 1))
        self._right[kind] = (share + step * (right - share), count + 1)

    def _table(self, seq: SequenceState) -> NgramTable:
        scope = seq.request.scope
        table = self._tables.get(scope)
        if table is None:
            table = self._tables[scope] = NgramTable(self._most)
            if len(self._tables) > MOST_SCOPES:
                self._tables.popitem(last=False)
        elif len(self._tables) > 1:
            self._tables.move_to_end(scope)
        return table


def in_order(guesses: Sequence[Guess]) -> list[float]:
    """All chances, best first. Those of one guess only fall, so a guess is taken from its front."""
    return sorted((chance for guess in guesses for chance in guess.chances), reverse=True)
