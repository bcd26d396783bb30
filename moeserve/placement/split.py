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
    """Slots of expert e, ascending: ``slot_S[first_E1[e] : first_E1[e + 1]]``."""

    slot_S: I32
    first_E1: I32

    @property
    def copies_E(self) -> I32:
        return np.diff(self.first_E1)


def slots_of(expert_S: I32, num_experts: int) -> Slots:
    counts_E = np.bincount(expert_S, minlength=num_experts)
    first_E1 = np.concatenate(([0], np.cumsum(counts_E))).astype(np.int32)
    return Slots(np.argsort(expert_S, kind="stable").astype(np.int32), first_E1)


def split_batch(ids_TC: I32, slots: Slots, *, ranks: int, home: int) -> I32:
    """[T, C] slots, -1 where a token has no choice: the rule word by word."""
    per_rank = len(slots.slot_S) // ranks
    first, table = slots.first_E1.tolist(), slots.slot_S.tolist()
    load_R = [0] * ranks
    slot_TC = np.full(ids_TC.shape, -1, np.int32)
    visited_T: list[set[int]] = [{home} for _ in ids_TC]
    pairs = 0
    for t, ids in enumerate(ids_TC.tolist()):
        for c, e in enumerate(ids):
            pairs += e >= 0
            if e >= 0 and first[e + 1] - first[e] == 1:
                slot_TC[t, c] = table[first[e]]
                load_R[table[first[e]] // per_rank] += 1
                visited_T[t].add(table[first[e]] // per_rank)
    slack = slack_of(pairs, ranks)
    for t, ids in enumerate(ids_TC.tolist()):
        for c, e in enumerate(ids):
            if e < 0 or slot_TC[t, c] >= 0:
                continue
            ordered = sorted(
                (load_R[s // per_rank], (s // per_rank - home) % ranks, s)
                for s in table[first[e] : first[e + 1]]
            )
            near = [option for option in ordered if option[2] // per_rank in visited_T[t]]
            chosen = near[0] if near and near[0][0] <= ordered[0][0] + slack else ordered[0]
            slot_TC[t, c] = chosen[2]
            load_R[chosen[2] // per_rank] += 1
            visited_T[t].add(chosen[2] // per_rank)
    return slot_TC


def split_batches(
    ids_BTC: I32, expert_BS: I32, num_experts: int, *, ranks: int, home_B: I32
) -> I32:
    """[B, T, C]: ``split_batch`` of many batches at once, each with slots and a home of its own."""
    rows_LS, row_B = np.unique(expert_BS, axis=0, return_inverse=True)
    copies_LE, table_LEM = _tables(rows_LS, num_experts)
    at_B11 = row_B.reshape(-1, 1, 1)
    known_BTC = np.maximum(ids_BTC, 0)
    chosen_BTC: I32 = np.where(ids_BTC < 0, np.int32(-1), table_LEM[at_B11, known_BTC, 0])
    open_BTC = (ids_BTC >= 0) & (copies_LE[at_B11, known_BTC] > 1)
    if not open_BTC.any():
        return chosen_BTC
    per_rank, batches = expert_BS.shape[1] // ranks, len(ids_BTC)
    rank_BTC = np.where(open_BTC | (ids_BTC < 0), ranks, chosen_BTC // per_rank)
    batch_B = np.arange(batches)
    flat_N = (rank_BTC + batch_B[:, None, None] * (ranks + 1)).ravel()
    load_BR1 = np.bincount(flat_N, minlength=batches * (ranks + 1)).reshape(batches, ranks + 1)
    slack_B = slack_of((ids_BTC >= 0).sum(axis=(1, 2)), ranks)
    for t in range(ids_BTC.shape[1]):
        visited_BR1 = np.zeros((batches, ranks + 1), np.bool_)
        np.put_along_axis(visited_BR1, rank_BTC[:, t], True, axis=1)
        visited_BR1[batch_B, home_B] = True
        for c in range(ids_BTC.shape[2]):
            at_W = np.flatnonzero(open_BTC[:, t, c])
            if len(at_W):
                slot_WM = table_LEM[row_B[at_W], ids_BTC[at_W, t, c]]
                here = (load_BR1[at_W], visited_BR1[at_W], home_B[at_W], slack_B[at_W])
                slot_W = _choose(slot_WM, *here, per_rank)
                chosen_BTC[at_W, t, c] = slot_W
                load_BR1[at_W, slot_W // per_rank] += 1
                visited_BR1[at_W, slot_W // per_rank] = True
    return chosen_BTC


def _choose(
    slot_WM: I32, load_WR1: I64, visited_WR1: NDArray[np.bool_], home_W: I32, slack_W: I64,
    per_rank: int,
) -> I32:  # fmt: skip
    ranks = load_WR1.shape[1] - 1
    absent_WM = slot_WM < 0
    rank_WM = np.where(absent_WM, ranks, slot_WM // per_rank)
    load_WM = np.take_along_axis(load_WR1, rank_WM, axis=1)
    never = np.iinfo(np.int64).max
    key_WM = np.where(absent_WM, never, load_WM * ranks + (rank_WM - home_W[:, None]) % ranks)
    seen_WM = np.take_along_axis(visited_WR1, rank_WM, axis=1) & ~absent_WM
    near_WM = np.where(seen_WM, key_WM, never)
    row_W = np.arange(len(slot_WM))
    least_W, nearest_W = key_WM.argmin(axis=1), near_WM.argmin(axis=1)
    stays_W = seen_WM[row_W, nearest_W] & (
        load_WM[row_W, nearest_W] <= load_WM[row_W, least_W] + slack_W
    )
    chosen_W: I32 = slot_WM[row_W, np.where(stays_W, nearest_W, least_W)]
    return chosen_W


def _tables(expert_LS: I32, num_experts: int) -> tuple[I64, I32]:
    """Slots of each expert: how many [L, E], and which [L, E, M], -1 behind the last."""
    each = [slots_of(expert_S, num_experts) for expert_S in expert_LS]
    copies_LE = np.stack([slots.copies_E for slots in each]).astype(np.int64)
    table_LEM = np.full((*copies_LE.shape, int(copies_LE.max())), -1, np.int32)
    for l, slots in enumerate(each):
        row_S = np.repeat(np.arange(num_experts), slots.copies_E)
        table_LEM[l, row_S, np.arange(len(row_S)) - slots.first_E1[row_S]] = slots.slot_S
    return copies_LE, table_LEM
