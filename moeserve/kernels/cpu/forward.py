"""A forward pass that is run again and again over the same tensors: its arguments are made once.

A run is one native call; no tensor is made, and no shape looked at. Letters: see ``ops``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeserve.errors import InternalError
from moeserve.kernels.cpu import _cpu
from moeserve.kernels.cpu.handles import (
    NativePart,
    NativeStep,
    address,
    embed_args,
    new_step,
    rows_at,
)
from moeserve.kernels.ops import AttentionBatch, KvCache, Trunk

# What ``_cpu.run_pass`` counts from 1.
POSITION, TOKEN, LAYERS, ROW = range(1, 5)


@dataclass(frozen=True, slots=True)
class NativePass:
    """``memory`` is what the handle points to beside what is named."""

    handle: _cpu.Pass
    logits_RN: Tensor
    trunk: Trunk
    attention: AttentionBatch
    rows_R: Tensor
    memory: tuple[Any, ...]

    def __call__(self) -> Tensor:
        """Raises as the operations by themselves do."""
        if fault := _cpu.run_pass(self.handle):
            raise self._error(fault)
        return self.logits_RN

    def _error(self, fault: int) -> Exception:
        trunk = self.trunk
        if fault == POSITION:
            return IndexError("a position is outside the rotary tables")
        if fault == TOKEN:
            return InternalError(f"embed: a token id is not in 0..{len(trunk.embedding_WH) - 1}")
        if fault == ROW:
            return InternalError(f"head: a row of {self.rows_R.tolist()} is not one of the step")
        assert fault == LAYERS, fault
        return InternalError(
            f"forward_layers: slots, contexts or blocks of {self.attention} do not fit the caches "
            f"of {len(trunk.stack.layers)} layers"
        )


def new_pass(
    trunk: Trunk,
    caches: Sequence[KvCache],
    token_ids_T: Tensor,
    position_T: Tensor,
    slot_T: Tensor,
    attention: AttentionBatch,
    rows_R: Tensor,
    states_TH: Tensor | None,
) -> NativePass:
    """``Ops.new_pass``; the logits are one tensor."""
    stack: NativePart = trunk.stack.data
    head: NativePart = trunk.head.data
    rope, rows, hidden = trunk.rope, len(token_ids_T), stack.hidden
    assert hidden == head.hidden == trunk.embedding_WH.shape[1], (hidden, head.hidden)
    assert len(position_T) == rows, (position_T, rows)
    step = new_step(rope, position_T, slot_T, attention)
    native: NativeStep = step.data
    x_TH = torch.empty(rows, hidden) if states_TH is None else states_TH
    chosen = torch.empty(rows * sum(stack.top_ks), dtype=torch.int32)
    logits_RN = torch.empty(len(rows_R), trunk.head.weights.head.out_features)
    handle = _cpu.Pass(
        native.handle,
        address(position_T, torch.int64),
        address(rope.cos_WR, torch.float32),
        address(rope.sin_WR, torch.float32),
        len(rope.cos_WR),
        *embed_args(trunk.embedding_WH),
        address(token_ids_T, torch.int64),
        rows_at(x_TH, rows, hidden),
        stack.handle,
        [cache.data.handle for cache in caches],
        chosen.data_ptr(),
        address(rows_R, torch.int64),
        len(rows_R),
        head.handle,
        logits_RN.data_ptr(),
    )
    memory = (step, caches, token_ids_T, x_TH, chosen)
    return NativePass(handle, logits_RN, trunk, attention, rows_R, memory)
