"""Tokens between NPUs by torch_npu's fused dispatch and combine.

The operators want the same number of rows from every rank in every call, so a rank's tokens are
followed by rows that are not active and go nowhere. Rows are bf16; where experts are int8, the
operator makes codes of them, with a scale for each, before they are sent. Each choice goes to its
slot by itself, and comes home as a row of bf16, which the operator weighs and adds.

A dispatch is followed by its combine with nothing between them on HCCL's group, which nothing else
may use: so microbatches take turns as a whole. The operators wait for all ranks for as long as HCCL
does (HCCL_EXEC_TIMEOUT); a rank that is lost is found by heartbeats before that.

Letters: T tokens, B rows of a call, C choices, A rows that a rank can get, H hidden, S slots.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from moeserve.comm.dispatcher import DispatchStats, ShardedExperts
from moeserve.comm.group import Topology
from moeserve.comm.libraries.choices import copies_of_choices, slot_of_choices
from moeserve.kernels.ascend import calls
from moeserve.kernels.ascend.calls import EpGroup
from moeserve.kernels.ascend.dispatch import experts_of
from moeserve.kernels.ascend.ops import AscendOps
from moeserve.kernels.ops import Routed
from moeserve.observe.progress import Progress


class MoeDistributeDispatcher:
    """``held`` is what HCCL's group lasts as long as. ``stats.came`` stays 0, for the host does not
    learn what came; the bytes of ``combine_bytes`` are those that come back."""

    def __init__(
        self,
        ops: AscendOps,
        group: EpGroup,
        topology: Topology,
        progress: Progress,
        held: object = None,
    ) -> None:
        self.stats = DispatchStats()
        self._ops = ops
        self._group = group
        self._held = held
        self._progress = progress
        home = topology.node_R[group.rank]
        self._abroad = [r for r, node in enumerate(topology.node_R) if node != home]

    def moe(
        self, lane: int, sharded: ShardedExperts, x_TH: Tensor, routed: Routed
    ) -> Generator[None, None, None]:
        ops, group, part = self._ops, self._group, sharded.part
        self._progress.begin("dispatch")
        sent = sharded.table.assign(routed.ids_TC, group.rank)
        slot_TC = slot_of_choices(sent, len(x_TH), group.slots)
        self._count(sharded, slot_TC)
        self._progress.begin("shared expert")
        shared_TH = ops.shared(part, routed)
        yield
        self._progress.begin("experts")
        total_TH = self._mixture(sharded, routed, slot_TC.to(ops.device))
        x_TH += total_TH if shared_TH is None else total_TH + shared_TH

    def close(self) -> None:
        self._held = None

    def _mixture(self, sharded: ShardedExperts, routed: Routed, slot_TC: Tensor) -> Tensor:
        ops, group, experts = self._ops, self._group, sharded.part.weights.experts
        (tokens, chosen), device = slot_TC.shape, ops.device
        x_BH = torch.zeros(group.tokens, experts.hidden, dtype=torch.bfloat16, device=device)
        # An expert may not be twice in a row, also in one that goes nowhere.
        slot_BC = torch.arange(chosen, dtype=torch.int32, device=device).repeat(group.tokens, 1)
        weight_BC = torch.zeros(group.tokens, chosen, device=device)
        x_BH[:tokens] = routed.normed_TH.bfloat16()
        slot_BC[:tokens] = slot_TC.int()
        weight_BC[:tokens] = routed.weights_TC.to(device)
        active_B = torch.arange(group.tokens, device=device) < tokens
        whole = experts_of(sharded.part).ups.whole
        went = calls.distribute(x_BH, slot_BC, weight_BC, active_B, group, quantised=whole)
        # Slots without an expert come last, and nothing goes there.
        count_E = went.count_S[: experts.num_experts].contiguous()
        rows_AH = ops.in_order(went.rows_AH, went.scale_A, count_E, experts)
        out_BH = calls.collect(rows_AH.bfloat16(), went, slot_BC, weight_BC, active_B, group)
        return out_BH[:tokens].float()

    def _count(self, sharded: ShardedExperts, slot_TC: Tensor) -> None:
        stats, hidden = self.stats, sharded.wire.hidden
        copies, far = copies_of_choices(slot_TC, self._group.slots, self._group.rank, self._abroad)
        stats.rounds += 1
        stats.tokens += len(slot_TC)
        stats.copies += copies
        stats.inter_node += far
        whole = experts_of(sharded.part).ups.whole
        stats.dispatch_bytes += copies * (hidden + 4 if whole else 2 * hidden)
        stats.combine_bytes += copies * 2 * hidden
