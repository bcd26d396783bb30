"""Admission that foresees memory: Past-Future (Gong et al., ASPLOS 2025; LightLLM).

A request is admitted where there is room for it now, as ``FirstComeFirstServed`` wants it, and
where the most KV that all running ones and it will hold at once, before they have ended, is
predicted to fit, too. The *past* says how long answers are: those of the same kind that ended
lately and are longer than what a request has made by now, of which it is taken to be one, drawn by
its id and so the same in every step. The *future* is the worst moment: when the i-th of them ends,
sorted by what they still make, the i that are there hold what they have now and i times that. So
many predictions are made side by side (``draws``), and all have to agree.

Until answers have ended nothing is known, and requests start as blocks are free. Where blocks are
missing all the same, whoever gives up its own is chosen by cost: of the least urgent, who would
hold most for longest, per token that has to be computed again; the first one admitted never is.

Law 2 holds: pure. Letters: N running sequences, D draws.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from moeserve.core import FinishReason, RequestId
from moeserve.engine.blocks import BlockPool
from moeserve.engine.policies.choices import most_tokens, room_of
from moeserve.engine.sequence import SequenceState
from moeserve.engine.step_builder import StepBuilder

# Ended answers of a kind that are remembered, and from how many on they count.
REMEMBERED = 200
LEARNED = 8
# Kinds that are told apart; those of the rest are one.
MOST_KINDS = 256
DRAWS = 16
# A request that was refused is looked at again after so many steps.
LOOK_AGAIN = 8

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Kind = tuple[str, int]


class AnswerPast:
    """How long answers of one kind were lately."""

    def __init__(self) -> None:
        self._last: deque[int] = deque(maxlen=REMEMBERED)
        self._sorted: Ints | None = None

    def __len__(self) -> int:
        return len(self._last)

    def note(self, made: int) -> None:
        """One has ended with so many tokens."""
        self._last.append(made)
        self._sorted = None

    def lengths(self, made_N: Ints, shares_ND: Floats) -> Ints:
        """[N, D]: how long answers will be that have so many tokens and have not ended: of the
        longer ones, that which so large a share of them are shorter than. Where none was longer, a
        tenth more than there is."""
        if self._sorted is None:
            self._sorted = np.sort(np.fromiter(self._last, np.int64, len(self._last)))
        past = self._sorted
        first_N = past.searchsorted(made_N, side="right")
        longer_N = len(past) - first_N
        at_ND = first_N[:, None] + (shares_ND * longer_N[:, None]).astype(np.int64)
        found_ND = past[np.minimum(at_ND, len(past) - 1)]
        beyond_N1 = (made_N + made_N // 10 + 1)[:, None]
        return np.where(longer_N[:, None] > 0, found_ND, beyond_N1)


def worst_moment(held_N: Ints, left_ND: Ints, slack: int = 0) -> Ints:
    """[D]: the most tokens that sequences hold together before they have ended, each ``held_N`` now
    and one more in every step that is left; and ``slack`` for each that is there."""
    order_ND = np.argsort(-left_ND, axis=0, kind="stable")
    sorted_ND = np.take_along_axis(left_ND, order_ND, axis=0)
    there_N1 = np.arange(1, len(held_N) + 1)[:, None]
    totals_ND = held_N[order_ND].cumsum(axis=0) + there_N1 * (sorted_ND + slack)
    worst_D: Ints = totals_ND.max(axis=0)
    return worst_D


class PastFuture:
    """An ``Admission``. ``limit`` is the longest sequence there may be."""

    spare = 1

    def __init__(self, limit: int, draws: int = DRAWS) -> None:
        self._limit = limit
        self._draws = draws
        self._all = AnswerPast()
        self._pasts: dict[Kind, AnswerPast] = {}
        self._known: dict[RequestId, SequenceState] = {}
        self._shares: dict[RequestId, Floats] = {}
        self._pool: BlockPool | None = None
        self._refused_for = 0  # steps
        self._picked: SequenceState | None = None

    def begin(
        self,
        builder: StepBuilder,
        running: Collection[SequenceState],
        waiting: Mapping[RequestId, SequenceState],
        pool: BlockPool,
    ) -> None:
        if self._learn(running):
            self._refused_for = 0
        self._picked, self._pool = None, pool

    def pick(self, waiting: Mapping[RequestId, SequenceState], now: float) -> SequenceState | None:
        """The first one, where KV will hold out; whoever is alone always."""
        if self._picked is not None and self._picked.request.id not in waiting:
            self._known[self._picked.request.id] = self._picked
        self._picked = seq = next(iter(waiting.values()), None)
        if seq is None or not self._known or len(self._all) < LEARNED:
            return seq
        return seq if self._may_start(seq) else None

    def victim(self, running: Collection[SequenceState]) -> SequenceState:
        least_urgent = max(seq.request.priority for seq in running)
        first = next(iter(running))
        others = [s for s in running if s.request.priority == least_urgent and s is not first]
        if len(others) < 2 or len(self._all) < LEARNED:
            return others[-1] if others else first
        left_N = self._left(others)[:, 0]
        held_N = np.array([seq.length for seq in others])
        computed_N = np.array([max(1, seq.computed) for seq in others])
        worth_N = left_N * (held_N + left_N / 2) / computed_N
        return others[len(others) - 1 - int(np.argmax(worth_N[::-1]))]

    def _may_start(self, seq: SequenceState) -> bool:
        """Where there is no room now, others find that out at less cost; and what was refused is
        looked at again when somebody has left, or after a while."""
        pool = self._pool
        assert pool is not None, "begin comes first"
        if pool.blocks_for(seq.length) > pool.num_free - len(self._known):
            return True
        if 0 < self._refused_for < LOOK_AGAIN:
            self._refused_for += 1
            return False
        fits = self._fits([*self._known.values(), seq], pool)
        self._refused_for = int(not fits)
        return fits

    def _fits(self, seqs: Sequence[SequenceState], pool: BlockPool) -> bool:
        """The last one beside the others, which run."""
        blocks, shared = room_of(seqs[:-1], pool)
        held_N = np.array([max(1, seq.length - shared) for seq in seqs])
        held_N[-1] = seqs[-1].length
        worst_D = worst_moment(held_N, self._left(seqs), pool.block_size // 2)
        return bool((worst_D <= blocks * pool.block_size).all())

    def _left(self, seqs: Sequence[SequenceState]) -> Ints:
        """[N, D]: tokens that they will still make, one at least."""
        made_N = np.array([len(seq.output_ids) for seq in seqs])
        most_N = np.array([most_tokens(seq, self._limit) for seq in seqs])
        shares_ND = np.stack([self._shares_of(seq) for seq in seqs])
        length_ND = np.empty(shares_ND.shape, np.int64)
        rows_by_kind: dict[Kind | None, list[int]] = {}
        for row, seq in enumerate(seqs):
            kind = _kind(seq)
            known = kind in self._pasts and len(self._pasts[kind]) >= LEARNED
            rows_by_kind.setdefault(kind if known else None, []).append(row)
        for found, rows in rows_by_kind.items():
            past = self._all if found is None else self._pasts[found]
            length_ND[rows] = past.lengths(made_N[rows], shares_ND[rows])
        left_ND: Ints = np.maximum(np.minimum(length_ND, most_N[:, None]) - made_N[:, None], 1)
        return left_ND

    def _shares_of(self, seq: SequenceState) -> Floats:
        """Where among the answers of its kind a request stands in each draw, from 0 to 1."""
        shares_D = self._shares.get(seq.request.id)
        if shares_D is None:
            digest = blake2b(seq.request.id.encode(), digest_size=2 * self._draws).digest()
            shares_D = np.frombuffer(digest, "<u2").astype(np.float64) / 65536
            self._shares[seq.request.id] = shares_D
        return shares_D

    def _learn(self, running: Collection[SequenceState]) -> bool:
        """Whether somebody has left."""
        left = False
        for seq in self._known.values():
            left = left or seq.finish is not None
            if seq.finish in (FinishReason.STOP, FinishReason.LENGTH):
                self._note(seq)
        self._known = {seq.request.id: seq for seq in running}
        if len(self._shares) > 4 * len(self._known) + 256:
            self._shares = {id_: s for id_, s in self._shares.items() if id_ in self._known}
        return left

    def _note(self, seq: SequenceState) -> None:
        kind, made = _kind(seq), len(seq.output_ids)
        past = self._pasts.get(kind)
        if past is None and len(self._pasts) < MOST_KINDS:
            past = self._pasts[kind] = AnswerPast()
        if past is not None:
            past.note(made)
        self._all.note(made)


def _kind(seq: SequenceState) -> Kind:
    """Whose answers are alike: the domain that a client names, and how long they may be."""
    return seq.request.domain, seq.request.params.max_tokens.bit_length()
