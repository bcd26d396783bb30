"""Chains of guesses, each chain one native call. Letters: see ``guesses``."""

from __future__ import annotations

from itertools import chain
from typing import cast

import torch
from torch import Tensor

from moeserve.errors import InternalError
from moeserve.kernels.cpu import _cpu
from moeserve.kernels.cpu.handles import NativePart, address, embed_args, matrix
from moeserve.kernels.guesses import GuessModule, GuessRows
from moeserve.kernels.ops import KvCache


class NativeGuesser:
    """``Ops.new_guesser``. One call at a time."""

    def __init__(self, module: GuessModule, cache: KvCache) -> None:
        stack, head = cast("NativePart", module.stack.data), cast("NativePart", module.head.data)
        rope, hidden, eps = module.rope, module.project.out_features, module.eps
        assert module.project.in_features == 2 * hidden, module.project
        assert hidden == stack.hidden == head.hidden == module.embedding_WH.shape[1], module
        assert len(module.stack.layers) == 1, module.stack
        at, is_bf16, vocabulary, _ = embed_args(module.embedding_WH)
        table, pairs = rope.cos_WR.shape
        assert rope.sin_WR.shape == (table, pairs), (rope.sin_WR.shape, table, pairs)
        self._hidden = hidden
        self._memory = module, cache
        self._handle = _cpu.Guesser(
            at,
            is_bf16,
            vocabulary,
            norm_of(module.trunk_norm_H, hidden, eps),
            norm_of(module.embedding_norm_H, hidden, eps),
            norm_of(module.hidden_norm_H, hidden, eps),
            matrix(module.project),
            stack.handle,
            head.handle,
            address(rope.cos_WR, torch.float32),
            address(rope.sin_WR, torch.float32),
            table,
            pairs,
            rope.interleaved,
            cache.data.handle,
        )

    def __call__(self, rows: GuessRows, count: int) -> list[list[int]]:
        states_TH, sequences = rows.states_TH, len(rows.counts)
        self._check(states_TH, rows)
        if not count:
            return []
        found = _cpu.guess(
            self._handle,
            states_TH.data_ptr(),
            rows.state_rows,
            rows.token_ids,
            rows.counts,
            rows.starts,
            rows.shifts,
            [*chain.from_iterable(rows.blocks)],
            len(rows.blocks[0]),
            count,
        )
        if not found:
            raise InternalError(f"guess: tokens, positions or blocks of {rows} do not fit")
        return [found[i : i + sequences] for i in range(0, count * sequences, sequences)]

    def _check(self, states_TH: Tensor, rows: GuessRows) -> None:
        assert states_TH.dtype is torch.float32, states_TH.dtype
        assert states_TH.is_contiguous(), states_TH.stride()
        assert states_TH.shape[1] == self._hidden, states_TH.shape
        sequences = len(rows.counts)
        assert sequences == len(rows.starts) == len(rows.shifts) == len(rows.blocks) > 0, rows
        assert len(set(map(len, rows.blocks))) == 1, rows.blocks
        assert len(rows.state_rows) == len(rows.token_ids) == sum(rows.counts), rows
        assert 0 <= min(rows.state_rows) <= max(rows.state_rows) < len(states_TH), rows
        assert min(rows.counts) > 0, rows
        assert min(rows.starts) >= 0, rows


def norm_of(weight_H: Tensor, hidden: int, eps: float) -> _cpu.Norm:
    assert weight_H.shape == (hidden,), (weight_H.shape, hidden)
    return _cpu.Norm(address(weight_H, torch.float32), eps)
