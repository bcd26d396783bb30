"""Guesses of the model's multi-token prediction module, made behind the tokens that a step samples.

The module (DeepSeek-V3) joins the trunk's state at a position with the token after it, and guesses
the token after that; for more than one guess its own state stands for the trunk's. It sees the
newest positions of a request, ``WINDOW`` at most, beginning with the last of the prompt, whose KV
is in a cache of its own: so what came of a prompt from elsewhere is not missed, and with the whole
prompt guesses were right no more often. After a pause it begins anew. Guesses change no token.
Letters: H hidden.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from moeserve.config.steps import MTP_WINDOW
from moeserve.core import Chunk, Drafted, RequestId, Sampled
from moeserve.errors import ConfigError
from moeserve.kernels.guesses import GuessRows
from moeserve.models.batch import StepBatch
from moeserve.models.decoder import Decoder, ModelKvCache
from moeserve.models.moe import RoutingObserver

BLOCK = 16
WINDOW = MTP_WINDOW
BLOCKS_EACH = WINDOW // BLOCK


@dataclass(slots=True)
class _Past:
    """Of a request: the block of every position that was kept, oldest first, of which ``length``
    positions are there; ``dropped`` blocks were before them. ``following`` is the position of the
    sequence that comes next."""

    blocks: tuple[int, ...]
    following: int = -1
    length: int = 0
    dropped: int = 0

    def make_room(self, count: int, most: int) -> None:
        """For so many positions more, of which none may be ``most`` or above."""
        while self.length + count > WINDOW:
            self.blocks = (*self.blocks[1:], self.blocks[0])
            self.dropped, self.length = self.dropped + 1, self.length - BLOCK
        if self.dropped * BLOCK + self.length + count > most:
            self.dropped = self.length = 0


class MtpDrafts:
    """Of ``most_requests`` at most; others have no guesses. ConfigError without such a module."""

    def __init__(self, decoder: Decoder, most_requests: int) -> None:
        if decoder.mtp is None:
            raise ConfigError(
                f"speculation=mtp: {decoder.spec.architecture} has no multi-token prediction "
                "module here: choose ngram or off"
            )
        self._decoder = decoder
        cache = decoder.new_mtp_cache(most_requests * BLOCKS_EACH, BLOCK)
        self._guess = decoder.ops.new_guesser(decoder.guess_module(), cache.layers[-1], BLOCK)
        self._most = decoder.spec.max_positions
        self._pasts: dict[RequestId, _Past] = {}
        self._free = [
            tuple(range(first, first + BLOCKS_EACH))
            for first in range(0, most_requests * BLOCKS_EACH, BLOCKS_EACH)
        ]

    def forget(self, request_ids: Iterable[RequestId]) -> None:
        """What is kept of them; ids that are not known are left out."""
        for request_id in request_ids:
            past = self._pasts.pop(request_id, None)
            if past is not None:
                self._free.append(past.blocks)

    def forward_micro(
        self,
        steps: Sequence[StepBatch],
        cache: ModelKvCache,
        observer: RoutingObserver | None,
        states: list[Tensor],
    ) -> list[Tensor]:
        return self._decoder.forward_micro(steps, cache, observer, states)

    def make(
        self,
        chunks: Sequence[Chunk],
        states: Sequence[Tensor],
        sampled: Collection[Sampled],
        count: int,
    ) -> tuple[Drafted, ...]:
        """``count`` guesses behind each of ``sampled``, but for those with a grammar. ``states``
        are the trunk's after the last layer, of all tokens of the chunks in order."""
        made = {one.request_id: one.token_ids for one in sampled}
        state_rows: list[int] = []
        token_ids: list[int] = []
        counts: list[int] = []
        pasts: list[_Past] = []
        starts: list[int] = []
        ids: list[RequestId] = []
        end = 0
        for chunk in chunks:
            end += len(chunk.token_ids)
            following = made.get(chunk.request.id, ())
            if not following or chunk.request.params.grammar is not None:
                continue
            position = chunk.start + len(chunk.token_ids) - chunk.samples
            past = self._past(chunk.request.id, position, len(following) + count)
            if past is None:
                continue
            first = end - chunk.samples
            state_rows += range(first, first + len(following))
            token_ids += following
            counts.append(len(following))
            starts.append(past.length)
            past.length += len(following)
            past.following = position + len(following)
            pasts.append(past)
            ids.append(chunk.request.id)
        if not ids:
            return ()
        rows = GuessRows(
            states[0] if len(states) == 1 else torch.cat(list(states)),
            state_rows,
            token_ids,
            counts,
            starts,
            # What was dropped is not looked at, but distances to what was not stay the same.
            [past.dropped * BLOCK for past in pasts],
            [past.blocks for past in pasts],
        )
        found = zip(*self._guess(rows, count), strict=True)
        return tuple(Drafted(id_, sound(one)) for id_, one in zip(ids, found, strict=True))

    def _past(self, request_id: RequestId, position: int, needed: int) -> _Past | None:
        past = self._pasts.get(request_id)
        if past is None:
            if not self._free:
                return None
            past = self._pasts[request_id] = _Past(self._free.pop())
        if past.following != position:
            past.length = past.dropped = 0
        past.make_room(needed, self._most)
        return past


def sound(token_ids: tuple[int, ...]) -> tuple[int, ...]:
    """Guesses up to the first that is no number."""
    return token_ids if min(token_ids) >= 0 else tuple(takewhile(lambda i: i >= 0, token_ids))
