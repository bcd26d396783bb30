"""Which copies of a token go to which rank: one per rank that it needs, with the slots there.

Among the slots of a replicated expert the rule is that of ``placement.split``, which the cost model
follows too. Whatever it chooses, results are the same (law 1).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeserve.comm.layout import LayerLayout
from moeserve.kernels.wire import SLOT_DTYPE, Copies
from moeserve.placement.split import slots_of, split_batch


def assign(ids_TC: Tensor, layout: LayerLayout, rank: int, ranks_per_unit: int = 1) -> Copies:
    """Copies of this batch, sent by ``rank``; those it keeps for itself are among them. A unit is
    of so many ranks, and gets one copy; its slots are numbered through them."""
    slots = slots_of(layout.expert_S, layout.num_experts)
    slot_TC = split_batch(ids_TC.numpy(), slots, ranks=layout.world, home=rank)
    return by_unit(slot_TC, layout.world // ranks_per_unit, layout.slots * ranks_per_unit)


def by_unit(slot_TC: NDArray[np.int32], units: int, per_unit: int) -> Copies:
    """One copy for each unit that has a slot of the token; -1 is no slot."""
    unit_TC = np.where(slot_TC >= 0, slot_TC // per_unit, -1)
    starts, tokens, locals_ = [0], [], []
    for u in range(units):
        token_N = np.flatnonzero((unit_TC == u).any(axis=1))
        there_NC = unit_TC[token_N] == u
        tokens.append(token_N)
        locals_.append(np.where(there_NC, slot_TC[token_N] - u * per_unit, -1))
        starts.append(starts[-1] + len(token_N))
    return Copies(
        torch.tensor(starts, dtype=torch.int32),
        torch.from_numpy(np.concatenate(tokens).astype(np.int32)),
        torch.from_numpy(np.concatenate(locals_)).to(SLOT_DTYPE),
    )
