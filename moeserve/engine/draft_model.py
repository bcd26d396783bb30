"""Guesses of a smaller model that has the same tokens, made behind the tokens that a step samples.

The draft model reads a request from its first token on, into a KV cache of its own, in which a
request has blocks of its own; it guesses greedily, one token after the other. What it has not read
of a request (its prompt; all of it after a preemption, a prefix hit or KV from elsewhere; what came
while nothing was to be guessed) it reads before it guesses, so many tokens a step at most: until
then the request has no guesses. Of what it guessed and read itself, that stays which the request
went on with. Requests for which no block is free, which have a grammar, or are longer than the
draft model's positions have no guesses. Guesses change no token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from moeserve.core import Chunk, Drafted, RequestId, Sampled
from moeserve.engine.sequence import tokens_between
from moeserve.kernels.guesses import BEST
from moeserve.models.batch import Span, StepBatch, pack_spans
from moeserve.models.decoder import Decoder, ModelKvCache
from moeserve.models.moe import RoutingObserver


@dataclass(slots=True)
class _Past:
    """Of a request: its blocks, and how many of its first tokens are read (``length``). Behind them
    the guesses in ``guessed`` are read, right or wrong."""

    blocks: list[int] = field(default_factory=list)
    length: int = 0
    guessed: Sequence[int] = ()

    def unread(self, tokens: Sequence[int]) -> Sequence[int]:
        """Of the tokens from ``length`` on, those that are left to read: one at least. What was
        guessed is forgotten, but for its right beginning."""
        right, most = 0, min(len(self.guessed), len(tokens) - 1)
        while right < most and self.guessed[right] == tokens[right]:
            right += 1
        self.length, self.guessed = self.length + right, ()
        return tokens[right:]


@dataclass(frozen=True, slots=True)
class _Turn:
    """A request's next tokens to read; all there are if it ``guesses`` then. ``before`` are those
    that could have been read in steps before."""

    request_id: RequestId
    past: _Past
    token_ids: Sequence[int]
    before: int
    guesses: bool = True

    def within(self, most: int) -> _Turn:
        """With so many of those before at most, and then without guesses."""
        if self.before <= most:
            return self
        return _Turn(self.request_id, self.past, self.token_ids[:most], most, guesses=False)


class DraftModel:
    """A ``DraftMaker``. ``draft`` has ``num_blocks`` blocks of ``block_size`` tokens, and reads
    ``most_tokens`` in a step beside those that the step before sampled."""

    def __init__(
        self, target: Decoder, draft: Decoder, num_blocks: int, block_size: int, most_tokens: int
    ) -> None:
        self._target = target
        self._draft = draft
        self._block_size = block_size
        self._most_tokens = most_tokens
        self._cache = draft.new_cache(num_blocks, block_size)
        self._pasts: dict[RequestId, _Past] = {}
        self._free = list(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that no request has."""
        return len(self._free)

    def forget(self, request_ids: Iterable[RequestId]) -> None:
        """What is kept of them; ids that are not known are left out."""
        for request_id in request_ids:
            past = self._pasts.pop(request_id, None)
            if past is not None:
                self._free += past.blocks

    def forward_micro(
        self,
        steps: Sequence[StepBatch],
        cache: ModelKvCache,
        observer: RoutingObserver | None,
        states: list[Tensor],
    ) -> list[Tensor]:
        """Without states: the draft model needs none."""
        return self._target.forward_micro(steps, cache, observer)

    def make(
        self,
        chunks: Sequence[Chunk],
        states: Sequence[Tensor],
        sampled: Collection[Sampled],
        count: int,
    ) -> tuple[Drafted, ...]:
        """``count`` guesses behind each of ``sampled`` that is read by then: those of whom least
        is left to read come first."""
        made = {one.request_id: one.token_ids for one in sampled}
        wanted = []
        for chunk in chunks:
            token_ids = made.get(chunk.request.id, ())
            if token_ids and chunk.request.params.grammar is None:
                wanted += self._turns(chunk, token_ids)
        turns: list[_Turn] = []
        left = self._most_tokens
        for turn in sorted(wanted, key=lambda turn: turn.before):
            turn = turn.within(left)
            more = len(turn.token_ids) + count * turn.guesses
            if turn.token_ids and self._make_room(turn.past, more):
                turns.append(turn)
                left -= turn.before
        return self._chain(turns, count)

    def _turns(self, chunk: Chunk, token_ids: Sequence[int]) -> list[_Turn]:
        """The request's, with all that is left to read; none where it has tokens that are unknown
        here."""
        request, end = chunk.request, chunk.start + len(chunk.token_ids) - chunk.samples + 1
        known = len(request.prompt_ids) + len(chunk.output_ids)
        if known != end:
            return []
        past = self._pasts.setdefault(request.id, _Past())
        if past.length > known:  # what was sampled then did not come to be
            past.length, past.guessed = 0, ()
        had = tokens_between(request.prompt_ids, chunk.output_ids, past.length, known)
        unread = past.unread((*had, *token_ids))
        if max(unread) >= self._draft.spec.vocab:
            return []
        before = max(0, len(unread) - len(token_ids) - 1)
        return [_Turn(request.id, past, unread, before)]

    def _make_room(self, past: _Past, more: int) -> bool:
        """For so many tokens behind those that are read; False where there is none."""
        end = past.length + more
        if end > self._draft.spec.max_positions:
            return False
        missing = -(-end // self._block_size) - len(past.blocks)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            past.blocks.append(self._free.pop())
        return True

    def _chain(self, turns: Sequence[_Turn], count: int) -> tuple[Drafted, ...]:
        """Reads, and guesses from the end of those that are read, each from the guess before."""
        found: dict[RequestId, list[int]] = {turn.request_id: [] for turn in turns}
        spans = [
            Span(turn.token_ids, turn.past.length, turn.past.blocks, int(turn.guesses))
            for turn in turns
        ]
        for turn in turns:
            turn.past.length += len(turn.token_ids)
        guessing = [turn for turn in turns if turn.guesses]
        for i in range(count):
            if not spans:
                break
            drafts = self._best(spans)
            guessing = self._note(guessing, drafts, found)
            spans = [
                Span((found[turn.request_id][-1],), turn.past.length + i, turn.past.blocks)
                for turn in guessing
            ]
        for turn in turns:
            turn.past.guessed = found[turn.request_id][: count - 1]
        return tuple(Drafted(t.request_id, tuple(found[t.request_id]), t.before) for t in turns)

    def _note(
        self, guessing: Sequence[_Turn], drafts: Sequence[int], found: dict[RequestId, list[int]]
    ) -> list[_Turn]:
        """Those that go on: whose guess is a token of both models."""
        go_on = []
        for turn, draft in zip(guessing, drafts, strict=True):
            if 0 <= draft < min(self._target.spec.vocab, self._draft.spec.vocab):
                found[turn.request_id].append(draft)
                go_on.append(turn)
        return go_on

    def _best(self, spans: Sequence[Span]) -> list[int]:
        """The likeliest token behind each span with logits; negative where they are no numbers."""
        step = pack_spans(spans, self._block_size)
        logits = self._draft.forward(step, self._cache)
        rows = [BEST] * len(step.logit_rows_R)
        return [row.token_id for row in self._draft.ops.sample(logits, rows, frozenset())]
