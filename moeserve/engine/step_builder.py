"""A step under construction: chunks of requests within a budget of tokens.

The scheduler decides who gets a chunk, in which order; what a chunk holds is decided here. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

from moeserve.core import (
    UNKNOWN,
    BlockId,
    BudgetBy,
    Chunk,
    LayerGroup,
    Refusal,
    RequestId,
    StepChoice,
    StepPlan,
)
from moeserve.engine.blocks import BlockPool
from moeserve.engine.policies.layered import LayeredPrefill
from moeserve.engine.sequence import SequenceState

# Of a step's tokens, those that can be scored (``Chunk.scored``): each needs a row of logits, as
# long as the vocabulary.
MOST_SCORED = 256


class StepBuilder:
    """``budget`` tokens are left of the step, of which ``scores`` can be scored; ``rank`` is the
    home of all that run in it. With ``layered`` some prompts run in a group of layers only.

    ``chunks[i]`` is of ``seqs[i]``; the first ``newest`` of them came by ``add_newest``.
    ``expired`` hit their deadline when the step began, ``preempted`` gave up their blocks for it.
    Of what the step leaves: ``staying`` requests are generating after it, ``leaving`` ones get
    their last token from it, as far as that is known before, and ``left`` tokens of running
    requests had no room in it, or are not through all layers yet.

    ``prompts`` are those whose KV is on its way: they get their chunks before others start, in this
    order, but those of ``later`` after them: an ``Admission`` may set both.

    What ``StepChoice`` says of the step is gathered here by whoever decides it: ``admitted``,
    ``refused``, ``swapped_out``, ``swapped_in``, ``group`` and ``groups`` as there; its budget by
    ``limit``. ``now`` is when it is planned.
    """

    def __init__(
        self,
        budget: int,
        rank: int,
        expired: Iterable[RequestId] = (),
        now: float = 0.0,
        layered: LayeredPrefill | None = None,
    ) -> None:
        self.budget = budget
        self.now = now
        self.scores = MOST_SCORED
        self.seqs: list[SequenceState] = []
        self.chunks: list[Chunk] = []
        self.expired = tuple(expired)
        self.preempted: list[RequestId] = []
        self.prompts: list[SequenceState] = []
        self.later: list[SequenceState] = []
        self.newest = 0
        self.staying = 0
        self.leaving = 0
        self.left = 0
        self.decodes = 0
        self.prefill_tokens = 0
        self.drafted = 0
        self.most_drafts = 0
        self.admitted = 0
        self.refused = Refusal.NONE
        self.swapped_out = 0
        self.swapped_in = 0
        self.group: tuple[int, int] | None = None
        self.groups = 1
        self._most = budget
        self._most_by = BudgetBy.MOST
        self.draft_next = 0  # see ``StepPlan``
        self._rank = rank
        self._layered = layered
        self._grouped = 0  # of the chunks, those at the end that do not run in all layers
        if layered is not None:
            layered.begin()

    def limit(self, tokens: int, by: BudgetBy) -> None:
        """No more than so many tokens beside those that are there."""
        if tokens < self.budget:
            self._most -= self.budget - tokens
            self._most_by = by
            self.budget = tokens

    def add_newest(self, seqs: Sequence[SequenceState], leaving: int) -> None:
        """First of all, the newest token of each, which must be the only one to be computed.

        They fit, and so many of them are ``leaving``.
        """
        assert not self.seqs, "something else was added first"
        new, rank = tuple.__new__, self._rank
        self.chunks += [
            new(
                Chunk,
                (
                    seq.request,
                    (seq.output_ids[-1],),
                    seq.computed,
                    seq.blocks,
                    1,
                    seq.output_ids,
                    rank,
                    seq.reached,
                    None,
                ),
            )
            for seq in seqs
        ]
        self.seqs += seqs
        self.newest = self.decodes = len(seqs)
        self.staying += len(seqs) - leaving
        self.leaving += leaving
        self.budget -= len(seqs)
        assert self.budget >= 0, self.budget

    def add_following(self, seqs: Sequence[SequenceState]) -> None:
        """As ``add_newest`` of those that get their newest token from the step before, which runs:
        instead of it there is ``UNKNOWN``."""
        assert not self.seqs, "something else was added first"
        self.chunks += [
            Chunk(
                seq.request,
                (UNKNOWN,),
                seq.computed + 1,
                seq.blocks,
                1,
                seq.output_ids,
                self._rank,
                max(seq.reached, seq.computed + 1),
            )
            for seq in seqs
        ]
        self.seqs += seqs
        self.newest = self.decodes = len(seqs)
        self.leaving = sum(seq.length + 2 >= seq.end_length for seq in seqs)
        self.staying = len(seqs) - self.leaving
        self.budget -= len(seqs)
        assert self.budget >= 0, self.budget

    def following(self, pool: BlockPool, budget: int) -> StepBuilder | None:
        """One more token for each request of this step, if that is all that it has; None too where
        blocks are missing, or all have left."""
        if self.newest != len(self.seqs) or any(seq.finish is not None for seq in self.seqs):
            return None
        seqs = [seq for seq in self.seqs if not seq.leaving]
        growing = [seq for seq in seqs if len(seq.blocks) * pool.block_size <= seq.length]
        if not seqs or len(growing) > pool.num_free:
            return None
        for seq in growing:
            seq.blocks += tuple(pool.allocate(1))
        builder = StepBuilder(budget, self._rank)
        builder.refused = self.refused  # who waits waits for the same
        builder.add_following(seqs)
        return builder

    def add(self, seq: SequenceState, draft_ids: tuple[int, ...] = ()) -> None:
        """The sequence's next tokens, as many as the budgets have room for, if any.

        ``draft_ids`` follow the newest token, which must then be the only one to be computed.
        """
        stop, layers = min(seq.length, seq.computed + self.budget), None
        if self._layered is not None and not seq.generating:
            stop, layers = self._part(self._layered, seq)
        if seq.request.params.prompt_logprobs is not None:
            stop = self._score(seq, stop)
        through = layers is None or layers.last
        self.left += seq.length - (stop if through else seq.computed)
        if stop == seq.computed:
            return
        token_ids = seq.tokens(seq.computed, stop)
        if seq.generating:
            self.decodes += 1
            self.drafted += len(draft_ids)
            self.most_drafts = max(self.most_drafts, len(draft_ids))
            token_ids += draft_ids
        else:
            assert not draft_ids, seq.request.id
        ends = stop == seq.length and through
        chunk = Chunk(
            request=seq.request,
            token_ids=token_ids,
            start=seq.computed,
            blocks=seq.blocks,
            samples=1 + len(draft_ids) if ends else 0,
            output_ids=seq.output_ids,
            rank=self._rank,
            reached=seq.reached,
            layers=layers,
        )
        self._put(seq, chunk)
        if not seq.generating:
            self.prefill_tokens += chunk.work
        if layers is not None:
            run = layers.stop - layers.start
            self.group, self.groups = (layers.start, layers.stop), -(-layers.of // run)
        if ends and seq.leaving:
            self.leaving += 1
        elif ends:
            self.staying += 1
        if layers is None:
            self.budget -= len(token_ids)
        assert self.budget >= 0, self.budget

    def add_all(self, seqs: Iterable[SequenceState]) -> None:
        for seq in seqs:
            self.add(seq)

    def _part(self, layered: LayeredPrefill, seq: SequenceState) -> tuple[int, LayerGroup | None]:
        """Where the chunk of a prompt ends, and the layers it runs in."""
        if seq.request.params.prompt_logprobs is not None:
            return layered.whole(seq, self.budget), None
        beside = 0
        if seq.length - seq.computed > self.budget:  # else nobody asks
            whole = self.chunks[: len(self.chunks) - self._grouped]
            beside = sum(len(chunk.token_ids) for chunk in whole)
        part = layered.part(seq, self.budget, beside)
        if part.layers is not None:
            self.budget = part.budget
        return part.stop, part.layers

    def _put(self, seq: SequenceState, chunk: Chunk) -> None:
        """Behind all others that run in all layers, or in the same ones."""
        at = len(self.chunks)
        if chunk.layers is None:
            at -= self._grouped
        else:
            self._grouped += 1
        self.seqs.insert(at, seq)
        self.chunks.insert(at, chunk)

    def _score(self, seq: SequenceState, stop: int) -> int:
        """Where a chunk that would end at ``stop`` ends, so that what it scores fits."""
        first, behind = max(seq.computed, seq.reached), len(seq.request.prompt_ids) - 1
        if min(stop, behind) - first > self.scores:
            stop = first + self.scores
        self.scores -= max(0, min(stop, behind) - first)
        return stop

    def take(self) -> tuple[list[SequenceState], list[Chunk], int]:
        """``seqs``, ``chunks`` and ``newest``, which are gone then."""
        taken = self.seqs, self.chunks, self.newest
        self.seqs, self.chunks, self.newest = [], [], 0
        return taken

    def blocks_of_left(self) -> set[BlockId]:
        """All blocks of those whose chunk is for nothing, because they have left."""
        pairs = zip(self.seqs, self.chunks, strict=True)
        left = (chunk.blocks for seq, chunk in pairs if seq.finish is not None)
        return set(chain.from_iterable(left))

    def plan(self, ended: tuple[RequestId, ...], *, ahead: bool = False) -> StepPlan:
        """The step as it will run."""
        said = (
            self.decodes,
            self.prefill_tokens,
            self._most,
            self._most_by,
            self.admitted,
            self.refused,
            len(self.preempted),
            self.drafted,
            self.most_drafts,
            self.group,
            self.groups,
            self.swapped_out,
            self.swapped_in,
        )
        choice = tuple.__new__(StepChoice, said)
        chunks, preempted = tuple(self.chunks), tuple(self.preempted)
        return StepPlan(chunks, self.expired, preempted, ended, ahead, self.draft_next, choice)
