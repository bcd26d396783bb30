"""Guesses of a multi-token prediction module, one behind the other.

The module (DeepSeek-V3) joins the trunk's state at a position with the token after it, and guesses
the token after that; behind the first guess its own state stands for the trunk's. Here is what
``Ops.new_guesser`` takes, and its meaning in other operations, the oracle of natives. Letters: see
``ops``; R tokens that follow states of the trunk, S sequences, B blocks of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeserve.core import RequestId, SamplingParams
from moeserve.kernels.ops import (
    AttentionBatch,
    HeadWeights,
    KvCache,
    Linear,
    Ops,
    Part,
    Rope,
    Stack,
    Step,
)
from moeserve.kernels.sampling import SamplingRow

BEST = SamplingRow(RequestId(""), SamplingParams(temperature=0.0), (), (), takes_best=True)


@dataclass(frozen=True, slots=True)
class GuessModule:
    """``trunk_norm_H`` is applied to the trunk's states, as its head does it, before the module's
    own ``hidden_norm_H``. ``run`` runs the layer where it is not all in memory."""

    trunk_norm_H: Tensor
    embedding_norm_H: Tensor
    hidden_norm_H: Tensor
    eps: float
    embedding_WH: Tensor
    project: Linear
    rope: Rope
    stack: Stack
    head: Part[HeadWeights]
    run: Callable[[Tensor, Step, KvCache], None] | None = None


@dataclass(frozen=True, slots=True)
class GuessRows:
    """``token_ids`` R, each after the state in the row of ``states_TH`` that ``state_rows`` says.
    The sequences stand one after the other with ``counts`` tokens each, which lie in the cache from
    ``starts`` on; their positions are ``shifts`` more. ``blocks`` have room for all guesses but
    the last."""

    states_TH: Tensor
    state_rows: Sequence[int]
    token_ids: Sequence[int]
    counts: Sequence[int]
    starts: Sequence[int]
    shifts: Sequence[int]
    blocks: Sequence[Sequence[int]]


# Token of each guess, of each sequence; -1 where the best is no number, and then what is guessed
# behind it means nothing.
Guesser = Callable[[GuessRows, int], list[list[int]]]


def composed_guesser(ops: Ops, module: GuessModule, cache: KvCache, block_size: int) -> Guesser:
    def guess(rows: GuessRows, count: int) -> list[list[int]]:
        at = rows.states_TH.device
        states_RH = rows.states_TH.index_select(0, torch.tensor(rows.state_rows).to(at))
        normed_RH = ops.rms_norm(states_RH, module.trunk_norm_H, module.eps)
        ids, starts, counts = list(rows.token_ids), list(rows.starts), list(rows.counts)
        best, head = [BEST] * len(counts), module.head.weights
        found: list[list[int]] = []
        for _ in range(count):
            step, last_S = _step_of(ops, module, rows, starts, counts, block_size)
            x_RH = module_states(ops, module, normed_RH, torch.tensor(ids), step, cache)
            logits_SV = ops.head(x_RH, last_S, module.head)
            found.append([row.token_id for row in ops.sample(logits_SV, best, frozenset())])
            normed_RH = ops.rms_norm(x_RH.index_select(0, last_S.to(at)), head.norm_H, head.eps)
            starts = [start + had for start, had in zip(starts, counts, strict=True)]
            ids, counts = [max(0, token_id) for token_id in found[-1]], [1] * len(counts)
        return found

    return guess


def module_states(
    ops: Ops, module: GuessModule, normed_RH: Tensor, ids_R: Tensor, step: Step, cache: KvCache
) -> Tensor:
    """The residual stream after the module's layers, before its norm: [R, H]."""
    token_RH = ops.embed(module.embedding_WH, ids_R)
    pair_R2H = torch.cat(
        (
            ops.rms_norm(token_RH, module.embedding_norm_H, module.eps),
            ops.rms_norm(normed_RH, module.hidden_norm_H, module.eps),
        ),
        -1,
    )
    x_RH = ops.linear(pair_R2H, module.project)
    if module.run is None:
        ops.forward_layers(x_RH, module.stack, step, [cache])
    else:
        module.run(x_RH, step, cache)
    return x_RH


def _step_of(
    ops: Ops,
    module: GuessModule,
    rows: GuessRows,
    starts: Sequence[int],
    counts: Sequence[int],
    size: int,
) -> tuple[Step, Tensor]:
    """So many tokens of each, and the last row of each."""
    spans = [range(start, start + had) for start, had in zip(starts, counts, strict=True)]
    slots = [
        blocks[p // size] * size + p % size
        for blocks, span in zip(rows.blocks, spans, strict=True)
        for p in span
    ]
    positions = [p + shift for shift, span in zip(rows.shifts, spans, strict=True) for p in span]
    ends_S = torch.tensor(counts).cumsum(0)
    starts_S1 = torch.cat((torch.zeros(1, dtype=torch.int64), ends_S)).int()
    contexts_S = torch.tensor([span.stop for span in spans], dtype=torch.int32)
    blocks_SB = torch.tensor(rows.blocks, dtype=torch.int32)
    attention = AttentionBatch(starts_S1, contexts_S, blocks_SB)
    step = ops.new_step(module.rope, torch.tensor(positions), torch.tensor(slots), attention)
    return step, ends_S - 1
