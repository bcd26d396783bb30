"""A forward pass that is run again and again over the same tensors: its arguments are made once.

What a run costs outside the kernels is four calls with numbers; no tensor is made, and no shape
looked at. Letters: see ``ops``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeserve.errors import InternalError
from moeserve.kernels.cpu import _cpu
from moeserve.kernels.cpu.handles import NativePart, address, embed_args, rows_at, step_args
from moeserve.kernels.ops import AttentionBatch, KvCache, Trunk


@dataclass(frozen=True, slots=True)
class NativePass:
    """``step``, ``embed``, ``layers`` (less the step) and ``head`` are arguments of native calls.

    ``inputs`` and ``memory`` hold what these point to.
    """

    step: tuple[Any, ...]
    embed: tuple[Any, ...]
    layers: tuple[Any, ...]
    head: tuple[Any, ...]
    logits_RN: Tensor
    trunk: Trunk
    attention: AttentionBatch
    rows_R: Tensor
    memory: tuple[Any, ...]

    def __call__(self) -> Tensor:
        """InternalError, or IndexError for a position, says what does not fit."""
        step = _cpu.Step(*self.step)
        if not _cpu.embed(*self.embed):
            raise InternalError(f"embed: a token id is not in 0..{self.embed[2] - 1}")
        x_at, stack, caches, ids_at = self.layers
        if not _cpu.forward_layers(x_at, stack, step, caches, ids_at):
            raise InternalError(
                f"forward_layers: slots, contexts or blocks of {self.attention} do not fit the "
                f"{len(caches)} caches of {len(self.trunk.stack.layers)} layers"
            )
        if not _cpu.head(*self.head):
            rows = self.head[1]
            raise InternalError(f"head: a row of {self.rows_R.tolist()} is not in 0..{rows - 1}")
        return self.logits_RN


def new_pass(
    trunk: Trunk,
    caches: Sequence[KvCache],
    token_ids_T: Tensor,
    position_T: Tensor,
    slot_T: Tensor,
    attention: AttentionBatch,
    rows_R: Tensor,
) -> NativePass:
    """``Ops.new_pass``; the logits are one tensor."""
    stack: NativePart = trunk.stack.data
    head: NativePart = trunk.head.data
    rows, wanted, hidden = len(token_ids_T), len(rows_R), stack.hidden
    assert hidden == head.hidden == trunk.embedding_WH.shape[1], (hidden, head.hidden)
    x_TH = torch.empty(rows, hidden)
    chosen = torch.empty(rows * sum(stack.top_ks), dtype=torch.int32)
    logits_RN = torch.empty(wanted, trunk.head.weights.head.out_features)
    x_at, handles = rows_at(x_TH, rows, hidden), [cache.data.handle for cache in caches]
    return NativePass(
        step_args(trunk.rope, position_T, slot_T, attention),
        (*embed_args(trunk.embedding_WH, token_ids_T), x_at),
        (x_at, stack.handle, handles, chosen.data_ptr()),
        (x_at, rows, address(rows_R, torch.int64), wanted, head.handle, logits_RN.data_ptr()),
        logits_RN,
        trunk,
        attention,
        rows_R,
        (caches, token_ids_T, position_T, slot_T, x_TH, chosen),
    )
