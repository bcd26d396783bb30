"""Choices one by one: the slot that each goes to, and what its expert makes of it.

Libraries number slots through all ranks, as plans do: slot s is on rank s // S. So an expert with
several slots is several experts to them, of which a token chooses one.

Letters: T tokens, C choices, P pairs of token and choice, N copies, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moeserve.comm.table import Assigned
from moeserve.kernels.ops import MoeWeights, Ops, Part


def slot_of_choices(sent: Assigned, tokens: int, slots: int) -> Tensor:
    """int64 [T, C] where the copies lie, -1 for no choice."""
    slot_NC = sent.copies.slot_NC.long()
    rank_N = torch.arange(len(sent.count_R)).repeat_interleave(torch.tensor(sent.count_R))
    rank_N = rank_N.to(slot_NC.device)
    found_TC = slot_NC.new_full((tokens, slot_NC.shape[1]), -1)
    n, c = (slot_NC >= 0).nonzero(as_tuple=True)
    found_TC[sent.copies.token_N.long()[n], c] = rank_N[n] * slots + slot_NC[n, c]
    return found_TC


def copies_of_choices(
    slot_TC: Tensor, slots: int, rank: int, abroad: Sequence[int]
) -> tuple[int, int]:
    """How many choices go to other ranks, and how many of these to ``abroad``."""
    there_P = slot_TC[slot_TC >= 0] // slots
    far = torch.isin(there_P, torch.tensor(list(abroad), device=there_P.device))
    away, afar = torch.stack([(there_P != rank).sum(), far.sum()]).tolist()
    return away, afar


def rows_of_choices(ops: Ops, part: Part[MoeWeights], x_PH: Tensor, slot_P: Tensor) -> Tensor:
    """fp32 [P, H]: what the expert in each row's slot of this rank makes of it, not weighed."""
    if not len(x_PH):
        return x_PH.float()
    ones_P1 = torch.ones(len(x_PH), 1, device=x_PH.device)
    slot_P1 = slot_P[:, None].int().contiguous()
    return ops.moe_ffn(x_PH.float().contiguous(), part.weights.experts, slot_P1, ones_P1)
