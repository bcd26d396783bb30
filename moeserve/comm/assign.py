"""Which copies of a token go to which rank: one per rank that it needs, with the slots there.

Among the slots of a replicated expert the rule is that of ``placement.split``, which the cost model
follows too. Whatever it chooses, results are the same (law 1).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moeserve.comm.layout import LayerLayout
from moeserve.kernels.wire import Copies
from moeserve.placement.split import slots_of, split_batch


def assign(ids_TC: Tensor, layout: LayerLayout, rank: int) -> Copies:
    """Copies of this batch, sent by ``rank``; those it keeps for itself are among them."""
    slots = slots_of(layout.expert_S, layout.num_experts)
    slot_TC = split_batch(ids_TC.numpy(), slots, ranks=layout.world, home=rank)
    rank_TC = np.where(slot_TC >= 0, slot_TC // layout.slots, -1)
    starts, tokens, locals_ = [0], [], []
    for r in range(layout.world):
        token_N = np.flatnonzero((rank_TC == r).any(axis=1))
        there_NC = rank_TC[token_N] == r
        tokens.append(token_N)
        locals_.append(np.where(there_NC, slot_TC[token_N] - r * layout.slots, -1))
        starts.append(starts[-1] + len(token_N))
    return Copies(
        torch.tensor(starts, dtype=torch.int32),
        torch.from_numpy(np.concatenate(tokens).astype(np.int32)),
        torch.from_numpy(np.concatenate(locals_).astype(np.int16)),
    )
