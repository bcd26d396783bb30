"""Tokens between CUDA devices by DeepEP's dispatch and combine (``deep_ep.Buffer``).

Experts are slots, numbered through all ranks. The normal kernels send a token once to each rank
that has slots of it, as int8 codes with its scale where experts are int8 and 128 divides the
features (codes are carried as the bytes of an FP8 row, scales as those of its blocks, all alike),
else as bf16; a rank adds what its slots made of a row in fp32, in order of choices, and DeepEP adds
these rows of bf16. Those of low latency send bf16 to each slot, and add the rows that come back in
order of choices, weighed. Either leaves the result in bf16.

Normal kernels let the host wait for counts, for as long as DeepEP does (100 s); a rank that is lost
is found by heartbeats before that. Kernels of low latency have two buffers, so that a dispatch is
followed by its combine and microbatches take turns as a whole.

Implemented from the signatures of DeepEP's README (docs/legacy.md). Letters: T tokens, C choices, N
rows that came, P pairs of row and choice, H hidden, S slots of a rank, M rows that a slot can get.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeserve.comm.dispatcher import DispatchStats, ShardedExperts
from moeserve.comm.group import Topology
from moeserve.comm.libraries.choices import (
    copies_of_choices,
    rows_of_choices,
    slot_of_choices,
)
from moeserve.kernels.ops import MoeWeights, Ops, Part, Routed
from moeserve.kernels.wire import Wire
from moeserve.observe.progress import Progress

# Features of one scale of an FP8 row.
BLOCK = 128
# ``deep_ep.Buffer``, which has no types.
Buffer = Any


@dataclass(frozen=True, slots=True)
class BufferRank:
    """This rank among those of the buffer."""

    rank: int
    world: int
    topology: Topology

    @property
    def abroad(self) -> Sequence[int]:
        node_R = self.topology.node_R
        return [r for r in range(self.world) if node_R[r] != node_R[self.rank]]


class _DeepEp(ABC):
    """What both kinds share: everything but the kernels."""

    def __init__(self, ops: Ops, buffer: Buffer, own: BufferRank, progress: Progress) -> None:
        self.stats = DispatchStats()
        self._ops = ops
        self._buffer = buffer
        self._own = own
        self._progress = progress

    def moe(
        self, lane: int, sharded: ShardedExperts, x_TH: Tensor, routed: Routed
    ) -> Generator[None, None, None]:
        ops, own, slots = self._ops, self._own, sharded.layout.slots
        self._progress.begin("dispatch")
        sent = sharded.table.assign(routed.ids_TC, own.rank)
        slot_TC = slot_of_choices(sent, len(x_TH), slots)
        stats, row = self.stats, self._bytes_out(sharded.wire)
        copies, far = self._copies(sent.count_R, slot_TC, slots)
        stats.rounds += 1
        stats.tokens += len(x_TH)
        stats.copies += copies
        stats.inter_node += far
        stats.dispatch_bytes += copies * row
        total_TH = yield from self._mixture(sharded, routed, slot_TC.to(ops.device))
        self._progress.begin("shared expert")
        shared_TH = ops.shared(sharded.part, routed)
        x_TH += total_TH if shared_TH is None else total_TH + shared_TH

    def close(self) -> None:
        """The buffer goes with its last user."""
        self._buffer = None

    def _sent_back(self, rows: int, wire: Wire) -> None:
        self.stats.came += rows
        self.stats.combine_bytes += rows * 2 * wire.hidden

    @abstractmethod
    def _bytes_out(self, wire: Wire) -> int:
        """Of one copy."""

    @abstractmethod
    def _copies(self, count_R: Sequence[int], slot_TC: Tensor, slots: int) -> tuple[int, int]:
        """To other ranks, and to other nodes among them."""

    @abstractmethod
    def _mixture(
        self, sharded: ShardedExperts, routed: Routed, slot_TC: Tensor
    ) -> Generator[None, None, Tensor]:
        """fp32 [T, H]."""


class DeepEpDispatcher(_DeepEp):
    """By the normal kernels. ``came`` and ``combine_bytes`` count a rank's own rows too, which are
    not told apart from those of others."""

    def _bytes_out(self, wire: Wire) -> int:
        if as_codes(wire):
            return wire.hidden + 4 * (wire.hidden // BLOCK)
        return 2 * wire.hidden

    def _copies(self, count_R: Sequence[int], slot_TC: Tensor, slots: int) -> tuple[int, int]:
        others = sum(count_R) - count_R[self._own.rank]
        return others, sum(count_R[r] for r in self._own.abroad)

    def _mixture(
        self, sharded: ShardedExperts, routed: Routed, slot_TC: Tensor
    ) -> Generator[None, None, Tensor]:
        buffer, ops, wire, tokens = self._buffer, self._ops, sharded.wire, len(slot_TC)
        normed_TH, weight_TC = routed.normed_TH, routed.weights_TC
        if not tokens:  # one row that goes nowhere
            normed_TH = normed_TH.new_zeros(1, wire.hidden)
            slot_TC = slot_TC.new_full((1, wire.top_k), -1)
            weight_TC = weight_TC.new_zeros(1, wire.top_k)
        rows = self._payload(normed_TH, wire)
        ready = buffer.capture()
        later = {"async_finish": True, "allocate_on_comm_stream": True}
        *layout, known = buffer.get_dispatch_layout(
            slot_TC, sharded.layout.slots * self._own.world, previous_event=ready, **later
        )
        per_rank, per_node, per_slot, is_in_rank = layout
        yield
        self._progress.begin("waiting")
        came, slot_NC, weight_NC, _, handle, arrived = buffer.dispatch(
            rows,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=is_in_rank,
            num_tokens_per_expert=per_slot,
            topk_idx=slot_TC,
            topk_weights=weight_TC.contiguous(),
            previous_event=known,
            **later,
        )
        yield
        arrived.current_stream_wait()
        self._progress.begin("experts")
        x_NH = self._unpacked(came)
        y_NH = sums_of_rows(ops, sharded.part, x_NH, slot_NC, weight_NC).bfloat16()
        self._sent_back(len(y_NH), wire)
        back, _, done = buffer.combine(y_NH, handle, previous_event=buffer.capture(), **later)
        yield
        done.current_stream_wait()
        self._progress.begin("combine")
        total_TH: Tensor = back[:tokens].float()
        return total_TH

    def _payload(self, normed_TH: Tensor, wire: Wire) -> Tensor | tuple[Tensor, Tensor]:
        if not as_codes(wire):
            return normed_TH.bfloat16()
        codes_TH, scale_T = self._ops.quantize_per_token(normed_TH)
        scales = scale_T[:, None].expand(-1, wire.hidden // BLOCK).contiguous()
        return codes_TH.view(torch.float8_e4m3fn), scales

    def _unpacked(self, came: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """Codes and scales as the row that rounds to them."""
        if isinstance(came, Tensor):
            return came.float()
        codes_NH, scales = came
        return codes_NH.view(torch.int8).float() * scales[:, :1]


class DeepEpLowLatencyDispatcher(_DeepEp):
    """By the kernels of low latency; ``tokens`` is the most that a rank sends at a time."""

    def __init__(
        self, ops: Ops, buffer: Buffer, own: BufferRank, progress: Progress, tokens: int
    ) -> None:
        super().__init__(ops, buffer, own, progress)
        self._tokens = tokens

    def _bytes_out(self, wire: Wire) -> int:
        return 2 * wire.hidden

    def _copies(self, count_R: Sequence[int], slot_TC: Tensor, slots: int) -> tuple[int, int]:
        return copies_of_choices(slot_TC, slots, self._own.rank, self._own.abroad)

    def _mixture(
        self, sharded: ShardedExperts, routed: Routed, slot_TC: Tensor
    ) -> Generator[None, None, Tensor]:
        yield
        buffer, ops, slots = self._buffer, self._ops, sharded.layout.slots
        self._progress.begin("waiting")
        came_SMH, count_S, handle, _, _ = buffer.low_latency_dispatch(
            routed.normed_TH.bfloat16(),
            slot_TC,
            self._tokens,
            slots * self._own.world,
            use_fp8=False,
        )
        self._progress.begin("experts")
        place_M = torch.arange(came_SMH.shape[1], device=came_SMH.device)
        slot_P, m_P = (place_M[None] < count_S[:, None]).nonzero(as_tuple=True)
        y_PH = rows_of_choices(ops, sharded.part, came_SMH[slot_P, m_P], slot_P)
        y_SMH = torch.zeros_like(came_SMH)
        y_SMH[slot_P, m_P] = y_PH.bfloat16()
        self._sent_back(len(y_PH), sharded.wire)
        self._progress.begin("waiting")
        out_TH, _, _ = buffer.low_latency_combine(
            y_SMH, slot_TC, routed.weights_TC.contiguous(), handle
        )
        self._progress.begin("combine")
        total_TH: Tensor = out_TH.float()
        return total_TH


def as_codes(wire: Wire) -> bool:
    """Whether rows travel as int8 with scales."""
    return wire.payload is torch.int8 and wire.hidden % BLOCK == 0


def sums_of_rows(
    ops: Ops, part: Part[MoeWeights], x_NH: Tensor, slot_NC: Tensor, weight_NC: Tensor
) -> Tensor:
    """fp32 [N, H]: of each row what its slots here make of it (-1: elsewhere), weighed and added in
    order of choices."""
    n_P, c_P = (slot_NC >= 0).nonzero(as_tuple=True)
    y_PH = rows_of_choices(ops, part, x_NH[n_P], slot_NC[n_P, c_P])
    total_NH = torch.zeros(x_NH.shape, device=x_NH.device)
    for c in range(slot_NC.shape[1]):
        chosen = c_P == c
        n = n_P[chosen]
        total_NH[n] = total_NH[n] + weight_NC[n, c, None] * y_PH[chosen]
    return total_NH
