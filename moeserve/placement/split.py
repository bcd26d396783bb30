"""Which copy of a replicated expert a token uses: the rule of the runtime and of the cost model.

A sender with home h routes a batch of T tokens over R ranks; its load of a rank is the pairs
(token, choice) it has sent there. It begins with the pairs that have no choice, those of experts
with one slot. Then, tokens ascending and choices ascending, a pair whose expert has several slots

1. looks for the least loaded: slots by (load of their rank, (rank - h) mod R, slot), least first;
2. looks for the nearest: the least of those, in the same order, whose rank is h or one that the
   token goes to anyway (for its experts with one slot, or by a choice made before);
3. takes the nearest where there is one and its rank's load exceeds the least loaded one's by at
   most ``slack_of(pairs, R)``, and the least loaded otherwise; the rank's load grows by one.

Whole numbers only, and no sender knows of another. The slack was chosen by counting, on recorded
routing (docs/placement.md). Letters: B batches, T tokens, C choices, E experts, S slots, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

I32 = NDArray[np.int32]
I64 = NDArray[np.int64]


@overload
def slack_of(pairs: int, ranks: int) -> int: ...
@overload
def slack_of(pairs: I64, ranks: int) -> I64: ...
def slack_of(pairs: int | I64, ranks: int) -> int | I64:
    """A few pairs, so that tiny batches stay together, and a quarter of a rank's fair share."""
    return 3 + pairs // (4 * ranks)


@dataclass(frozen=True, slots=True, eq=False)
class Slots:
    """Slots of expert e, ascending: ``slot_S[first_E1[e] : first_E1[e + 1]]``; ``count`` are all,
    empty ones too."""

    slot_S: I32
    first_E1: I32
    count: int

    @property
    def copies_E(self) -> I32:
        return np.diff(self.first_E1)


def slots_of(expert_S: I32, num_experts: int) -> Slots:
    """-1 is an empty slot."""
    counts_E = np.bincount(expert_S[expert_S >= 0], minlength=num_experts)
    first_E1 = np.concatenate(([0], np.cumsum(counts_E))).astype(np.int32)
    ordered_S = np.argsort(expert_S, kind="stable").astype(np.int32)
    return Slots(ordered_S[len(expert_S) - first_E1[-1] :], first_E1, len(expert_S))


def split_batch(ids_TC: I32, slots: Slots, *, ranks: int, home: int) -> I32:
    """[T, C] slots, -1 where a token has no choice: the rule word by word."""
    sender = _Sender(slots, ranks, home)
    slot_TC = np.full(ids_TC.shape, -1, np.int32)
    visited_T: list[set[int]] = [{home} for _ in ids_TC]
    several: list[tuple[int, int, int]] = []
    for t, ids in enumerate(ids_TC.tolist()):
        for c, e in enumerate(ids):
            options = sender.slots_of_expert(e)
            if len(options) == 1:
                slot_TC[t, c] = sender.take(options[0], visited_T[t])
            elif options:
                several.append((t, c, e))
    slack = slack_of(int((ids_TC >= 0).sum()), ranks)
    for t, c, e in several:
        slot_TC[t, c] = sender.take(sender.choose(e, visited_T[t], slack), visited_T[t])
    return slot_TC


class _Sender:
    """One batch as it is sent from ``home``: the pairs that each rank has got so far."""

    def __init__(self, slots: Slots, ranks: int, home: int) -> None:
        self._first, self._slots = slots.first_E1.tolist(), slots.slot_S.tolist()
        self._per_rank = slots.count // ranks
        self._ranks, self._home = ranks, home
        self.load_R = [0] * ranks

    def slots_of_expert(self, e: int) -> list[int]:
        """Ascending; none for -1, which is no choice."""
        found: list[int] = self._slots[self._first[e] : self._first[e + 1]] if e >= 0 else []
        return found

    def take(self, slot: int, visited: set[int]) -> int:
        """The slot, now that a token which ``visited`` those ranks has chosen it."""
        rank = slot // self._per_rank
        self.load_R[rank] += 1
        visited.add(rank)
        return slot

    def choose(self, e: int, visited: set[int], slack: int) -> int:
        """Steps 1 to 3 of the rule."""
        ordered = sorted(self.slots_of_expert(e), key=self._order)
        least_loaded = ordered[0]
        nearest = next((s for s in ordered if s // self._per_rank in visited), None)
        if nearest is None or self._load(nearest) > self._load(least_loaded) + slack:
            return least_loaded
        return nearest

    def _order(self, slot: int) -> tuple[int, int, int]:
        distance = (slot // self._per_rank - self._home) % self._ranks
        return self._load(slot), distance, slot

    def _load(self, slot: int) -> int:
        return self.load_R[slot // self._per_rank]


def split_batches(
    ids_BTC: I32, expert_BS: I32, num_experts: int, *, ranks: int, home_B: I32
) -> I32:
    """[B, T, C]: ``split_batch`` of many batches at once, each with slots and a home of its own."""
    rows_LS, row_B = np.unique(expert_BS, axis=0, return_inverse=True)
    copies_LE, table_LEM = _tables(rows_LS, num_experts)
    at_B11 = row_B.reshape(-1, 1, 1)
    known_BTC = np.maximum(ids_BTC, 0)
    slot_BTC: I32 = np.where(ids_BTC < 0, np.int32(-1), table_LEM[at_B11, known_BTC, 0])
    several_BTC = (ids_BTC >= 0) & (copies_LE[at_B11, known_BTC] > 1)
    if several_BTC.any():
        slack_B = slack_of((ids_BTC >= 0).sum(axis=(1, 2)), ranks)
        per_rank = expert_BS.shape[1] // ranks
        senders = _Senders(slot_BTC, several_BTC, home_B, slack_B, ranks=ranks, per_rank=per_rank)
        for t in range(ids_BTC.shape[1]):
            senders.begin_token(t)
            for c in range(ids_BTC.shape[2]):
                at_W = np.flatnonzero(several_BTC[:, t, c])
                if len(at_W):
                    slot_WM = table_LEM[row_B[at_W], ids_BTC[at_W, t, c]]
                    slot_BTC[at_W, t, c] = senders.choose(at_W, slot_WM)
    return slot_BTC


class _Senders:
    """``_Sender`` of B batches at once. Letters: W batches whose pair is chosen now, M slots of an
    expert, -1 behind the last; R1 the ranks and one more, for pairs that go nowhere yet."""

    def __init__(
        self,
        slot_BTC: I32,
        several_BTC: NDArray[np.bool_],
        home_B: I32,
        slack_B: I64,
        *,
        ranks: int,
        per_rank: int,
    ) -> None:
        """``slot_BTC`` of experts with one slot count at once; those with several are chosen."""
        batches = len(slot_BTC)
        self._home_B, self._slack_B = home_B, slack_B
        self._ranks, self._per_rank = ranks, per_rank
        self._every_B = np.arange(batches)
        self._rank_BTC = np.where(several_BTC | (slot_BTC < 0), ranks, slot_BTC // per_rank)
        flat_N = (self._rank_BTC + self._every_B[:, None, None] * (ranks + 1)).ravel()
        counts = np.bincount(flat_N, minlength=batches * (ranks + 1))
        self._load_BR1 = counts.reshape(batches, ranks + 1)
        self._visited_BR1 = np.zeros((batches, ranks + 1), np.bool_)

    def begin_token(self, t: int) -> None:
        """Token t of each batch goes to its home, and where experts with one slot are."""
        self._visited_BR1[:] = False
        np.put_along_axis(self._visited_BR1, self._rank_BTC[:, t], True, axis=1)
        self._visited_BR1[self._every_B, self._home_B] = True

    def choose(self, at_W: NDArray[np.intp], slot_WM: I32) -> I32:
        """Steps 1 to 3 of the rule, and the rank's load and visit, for batches ``at_W``."""
        absent_WM = slot_WM < 0
        rank_WM = np.where(absent_WM, self._ranks, slot_WM // self._per_rank)
        load_WM = np.take_along_axis(self._load_BR1[at_W], rank_WM, axis=1)
        distance_WM = (rank_WM - self._home_B[at_W, None]) % self._ranks
        never = np.iinfo(np.int64).max
        order_WM = np.where(absent_WM, never, load_WM * self._ranks + distance_WM)
        visited_WM = np.take_along_axis(self._visited_BR1[at_W], rank_WM, axis=1) & ~absent_WM
        row_W = np.arange(len(at_W))
        least_loaded_W = order_WM.argmin(axis=1)
        nearest_W = np.where(visited_WM, order_WM, never).argmin(axis=1)
        stays_W = visited_WM[row_W, nearest_W] & (
            load_WM[row_W, nearest_W] <= load_WM[row_W, least_loaded_W] + self._slack_B[at_W]
        )
        slot_W: I32 = slot_WM[row_W, np.where(stays_W, nearest_W, least_loaded_W)]
        self._load_BR1[at_W, slot_W // self._per_rank] += 1
        self._visited_BR1[at_W, slot_W // self._per_rank] = True
        return slot_W


def _tables(expert_LS: I32, num_experts: int) -> tuple[I64, I32]:
    """Slots of each expert: how many [L, E], and which [L, E, M], -1 behind the last."""
    each = [slots_of(expert_S, num_experts) for expert_S in expert_LS]
    copies_LE = np.stack([slots.copies_E for slots in each]).astype(np.int64)
    table_LEM = np.full((*copies_LE.shape, int(copies_LE.max())), -1, np.int32)
    for l, slots in enumerate(each):
        row_S = np.repeat(np.arange(num_experts), slots.copies_E)
        table_LEM[l, row_S, np.arange(len(row_S)) - slots.first_E1[row_S]] = slots.slot_S
    return copies_LE, table_LEM
