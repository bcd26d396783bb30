"""What a step that is over means for its requests: tokens taken, ends found, KV that now counts.

Tokens that follow a chunk are taken in order, up to the first that ends the request; of drafts only
those that were right stay computed. Pure, like ``scheduler``, whose requests these are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from moeserve.core import Chunk, Counters, FinishReason, RequestId, Sampled, TokenOut
from moeserve.engine.kv_manager import KvManager
from moeserve.engine.sequence import SequenceState


class Acceptance:
    """Takes note of results. Of the requests that run, those whose next token is their last are in
    ``leaving``, which it shares with the scheduler; ``end`` finishes one."""

    def __init__(
        self,
        kv: KvManager,
        counters: Counters,
        leaving: dict[RequestId, SequenceState],
        end: Callable[[SequenceState, FinishReason], None],
    ) -> None:
        self._kv = kv
        self._counters = counters
        self._leaving = leaving
        self._end = end

    def settle(
        self,
        seqs: Sequence[SequenceState],
        chunks: Sequence[Chunk],
        newest: int,
        sampled: Mapping[RequestId, Sampled],
    ) -> list[TokenOut]:
        """The step is over whose ``chunks[i]`` is of ``seqs[i]``; of the first ``newest`` only the
        newest token was computed, without drafts. Gives every token that it made."""
        outs: list[TokenOut] = []
        self._settle_newest(seqs[:newest], sampled, outs)
        for seq, chunk in zip(seqs[newest:], chunks[newest:], strict=True):
            if seq.finish is not None:
                continue  # ended while the step ran
            if chunk.samples:
                self._accept(seq, chunk, sampled[seq.request.id], outs)
            else:
                self._advance(seq, chunk.computed)
        return outs

    def _settle_newest(
        self,
        seqs: Sequence[SequenceState],
        sampled: Mapping[RequestId, Sampled],
        outs: list[TokenOut],
    ) -> None:
        """``_accept`` for those of whom only the newest token was computed, without drafts: all
        that nearly every step has, so nothing is looked at twice."""
        new, size, advanced = tuple.__new__, self._kv.pool.block_size, 0
        for seq in seqs:
            if seq.finish is not None:
                continue
            request_id, (token_id,), logprobs = sampled[seq.request.id]
            seq.output_ids.append(token_id)
            computed = seq.length
            seq.length = length = computed + 1
            finish = None
            if token_id in seq.end_ids or length + 1 >= seq.end_length:
                finish = self._check_end(seq)
            outs.append(
                new(TokenOut, (request_id, token_id, logprobs[0] if logprobs else None, finish))
            )
            if computed % size and seq.reached < computed:
                seq.computed = seq.reached = computed
                advanced += 1
            else:
                self._advance(seq, 1)
            if finish is not None:
                self._end(seq, finish)
        self._counters.computed_tokens += advanced

    def _accept(
        self, seq: SequenceState, chunk: Chunk, sampled: Sampled, outs: list[TokenOut]
    ) -> None:
        """Take the tokens that followed a chunk, in order, up to the first that ends the request.
        Only drafts that were right stay computed."""
        assert 1 <= len(sampled.token_ids) <= chunk.samples, (sampled, chunk.samples)
        before = seq.length
        finish: FinishReason | None = None
        for i, token_id in enumerate(sampled.token_ids):
            seq.append(token_id)
            finish = self._check_end(seq)
            logprobs = sampled.logprobs[i] if sampled.logprobs else None
            outs.append(TokenOut(seq.request.id, token_id, logprobs, finish))
            if finish is not None:
                break
        made = seq.length - before
        self._counters.drafts += chunk.samples > 1
        self._counters.drafted_tokens += chunk.samples - 1
        self._counters.accepted_tokens += made - 1
        self._advance(seq, chunk.kept(made))
        if finish is not None:
            self._end(seq, finish)

    def _check_end(self, seq: SequenceState) -> FinishReason | None:
        """Whether a request's newest token is its last; notes if the next one will be."""
        finish = seq.reason_to_end()
        if finish is None and seq.leaving:
            self._leaving[seq.request.id] = seq
        return finish

    def _advance(self, seq: SequenceState, count: int) -> None:
        """So many more tokens are computed; blocks that this fills can be shared."""
        self._counters.computed_tokens += count
        self._counters.recomputed_tokens += min(seq.reached - seq.computed, count)
        seq.computed += count
        seq.reached = max(seq.reached, seq.computed)
        self._kv.publish(seq, seq.computed - count)
