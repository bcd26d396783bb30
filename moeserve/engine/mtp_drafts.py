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
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moeserve.config.steps import MTP_WINDOW
from moeserve.core import Chunk, Drafted, RequestId, Sampled, SamplingParams
from moeserve.errors import ConfigError
from moeserve.kernels.sampling import SamplingRow
from moeserve.models.batch import Span, StepBatch, pack_spans
from moeserve.models.decoder import Decoder, ModelKvCache
from moeserve.models.moe import RoutingObserver

BLOCK = 16
WINDOW = MTP_WINDOW
BLOCKS_EACH = WINDOW // BLOCK
BEST = SamplingRow(RequestId(""), SamplingParams(temperature=0.0), (), (), takes_best=True)


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
        self._mtp = decoder.mtp
        self._cache = decoder.new_mtp_cache(most_requests * BLOCKS_EACH, BLOCK)
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
        rows: list[int] = []
        spans: list[Span] = []
        pasts: list[_Past] = []
        ids: list[RequestId] = []
        end = 0
        for chunk in chunks:
            end += len(chunk.token_ids)
            token_ids = made.get(chunk.request.id, ())
            if not token_ids or chunk.request.params.grammar is not None:
                continue
            position = chunk.start + len(chunk.token_ids) - chunk.samples
            past = self._past(chunk.request.id, position, len(token_ids) + count)
            if past is None:
                continue
            first = end - chunk.samples
            rows += range(first, first + len(token_ids))
            spans.append(Span(token_ids, past.length, past.blocks))
            past.length += len(token_ids)
            past.following = position + len(token_ids)
            pasts.append(past)
            ids.append(chunk.request.id)
        if not ids:
            return ()
        states_TH = states[0] if len(states) == 1 else torch.cat(list(states))
        normed_TH = self._decoder.final_norm(states_TH[torch.tensor(rows)])
        found = self._chain(normed_TH, spans, pasts, count)
        return tuple(map(Drafted, ids, found))

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

    def _chain(
        self, normed_TH: Tensor, spans: Sequence[Span], pasts: Sequence[_Past], count: int
    ) -> list[tuple[int, ...]]:
        """Of each span, whose tokens follow the states: guesses, fewer where one is no number."""
        decoder, mtp, norm = self._decoder, self._mtp, self._mtp.head.weights
        best = [BEST] * len(spans)
        found: list[list[int]] = [[] for _ in spans]
        sound = [True] * len(spans)
        for i in range(count):
            step = _packed(spans, pasts)
            x_TH = decoder.mtp_trunk(normed_TH, step, self._cache)
            logits = decoder.ops.head(x_TH, step.logit_rows_R, mtp.head)
            drafts = [row.token_id for row in decoder.ops.sample(logits, best, frozenset())]
            for s, draft in enumerate(drafts):
                sound[s] &= draft >= 0
                if sound[s]:
                    found[s].append(draft)
            if i + 1 < count:
                normed_TH = decoder.ops.rms_norm(
                    x_TH if len(x_TH) == len(spans) else x_TH[step.logit_rows_R],
                    norm.norm_H,
                    norm.eps,
                )
                spans = [
                    Span((max(0, draft),), past.length + i, past.blocks)
                    for draft, past in zip(drafts, pasts, strict=True)
                ]
        return [tuple(one) for one in found]


def _packed(spans: Sequence[Span], pasts: Sequence[_Past]) -> StepBatch:
    """What was dropped is not looked at, but distances to what was not stay the same."""
    step = pack_spans(spans, BLOCK)
    if not any(past.dropped for past in pasts):
        return step
    shift = torch.tensor([past.dropped * BLOCK for past in pasts])
    counts = torch.tensor([len(span.token_ids) for span in spans])
    return replace(step, positions_T=step.positions_T + shift.repeat_interleave(counts))
