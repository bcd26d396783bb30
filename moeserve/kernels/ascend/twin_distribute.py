"""Dispatch and combine between NPUs in plain torch, by their documentation; ranks are threads.

``npu_moe_distribute_dispatch_v2`` and ``..._combine_v2`` of one group meet in this process under
HCCL's name of the group. Rows that nobody sent, scales of them and rows that were not active are
noise; what the documentation forbids is an InternalError: arguments of a group that differ between
ranks, layers or calls, a mask where ranks have other numbers of rows, a combine without its
dispatch, an expert twice in a row. The documentation calls the combine a sum of weighed rows and
leaves its order open: here it is in fp32 in order of the choices, rounded once. The number that
codes are made of is cast to int8 in a way that is not stated: here to nearest.

Letters: B rows of a call, C choices, A rows that a rank can get, H features, S slots of a rank.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moeserve.kernels.ascend.twin_options import demand, known
from moeserve.kernels.thread_meeting import ThreadMeeting

ASSIST = 128
# Who sent a row: rank, row, choice.
Origin = tuple[int, int, int]
# What must be equal in all calls of a group.
COMMON = (
    "ep_world_size moe_expert_num global_bs comm_alg shared_expert_num shared_expert_rank_num "
    "expert_shard_type".split()
)
OPTIONS: Mapping[str, Any] = {
    "x_active_mask": None,
    "shared_expert_num": 1,
    "shared_expert_rank_num": 0,
    "expert_shard_type": 0,
    "tp_world_size": 0,
    "tp_rank_id": 0,
    "group_tp": "",
    "global_bs": 0,
    "comm_alg": "",
    "zero_expert_num": 0,
    "copy_expert_num": 0,
    "const_expert_num": 0,
}


@dataclass(slots=True)
class _Group:
    """Where the ranks of one group meet, and what their calls have said."""

    meeting: ThreadMeeting
    said: dict[str, Any]
    open_dispatch: dict[int, bool] = field(default_factory=lambda: defaultdict(bool))


class DistributeTwin:
    """The two operators; groups last as long as it does."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._groups: dict[str, _Group] = {}

    def dispatch(
        self,
        x: Tensor,
        expert_ids: Tensor,
        group_ep: str,
        ep_world_size: int,
        ep_rank_id: int,
        moe_expert_num: int,
        **given: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        name = "npu_moe_distribute_dispatch_v2"
        modes = {"expert_scales": None, "quant_mode": 0, "expert_token_nums_type": 1}
        o = known(name, given, **OPTIONS, **modes)
        said = vars(o) | {"ep_world_size": ep_world_size, "moe_expert_num": moe_expert_num}
        group = self._group(name, group_ep, said)
        demand(not group.open_dispatch[ep_rank_id], name, "the combine of the last is missing")
        group.open_dispatch[ep_rank_id] = True
        demand(x.dtype in (torch.float16, torch.bfloat16), name, "x is fp16 or bf16")
        demand(o.quant_mode in (0, 2) and o.expert_token_nums_type == 1, name, "modes of the twin")
        active_B = require_rows(name, len(x), expert_ids, moe_expert_num, o.x_active_mask)
        rows, scales = quantised(x) if o.quant_mode == 2 else (x, torch.full((len(x),), torch.nan))
        sent = [
            (int(expert_ids[b, c]), (ep_rank_id, b, c), rows[b], scales[b])
            for b in range(len(x))
            if active_B[b]
            for c in range(expert_ids.shape[1])
        ]
        came = group.meeting.meet(ep_rank_id, (sent, len(x), o.x_active_mask is not None))
        tokens = {size for _, size, _ in came}
        demand(
            len(tokens) == 1 or not any(masked for _, _, masked in came),
            name,
            "a mask where ranks have other numbers of rows",
        )
        most = ep_world_size * max(tokens)
        demand(o.global_bs in (0, most), name, f"global_bs {o.global_bs}, where ranks have {most}")
        local = moe_expert_num // ep_world_size
        mine = sorted(
            (one for some, _, _ in came for one in some if one[0] // local == ep_rank_id),
            key=lambda one: (one[0], one[1]),
        )
        return handed_out(mine, rows, expert_ids.shape[1], most, local, ep_world_size)

    def combine(
        self,
        expand_x: Tensor,
        expert_ids: Tensor,
        assist_info_for_combine: Tensor,
        ep_send_counts: Tensor,
        expert_scales: Tensor,
        group_ep: str,
        ep_world_size: int,
        ep_rank_id: int,
        moe_expert_num: int,
        **given: Any,
    ) -> Tensor:
        name = "npu_moe_distribute_combine_v2"
        o = known(name, given, **OPTIONS, expand_scales=None, comm_quant_mode=0)
        said = vars(o) | {"ep_world_size": ep_world_size, "moe_expert_num": moe_expert_num}
        group = self._group(name, group_ep, said)
        demand(group.open_dispatch[ep_rank_id], name, "no dispatch before it")
        group.open_dispatch[ep_rank_id] = False
        demand(o.comm_quant_mode == 0, name, "modes of the twin")
        demand(expand_x.dtype in (torch.float16, torch.bfloat16), name, "rows are fp16 or bf16")
        demand(expert_scales.dtype is torch.float32, name, "weights are fp32")
        active_B = require_rows(name, len(expert_ids), expert_ids, moe_expert_num, o.x_active_mask)
        origins = assist_info_for_combine.view(-1)[: len(expand_x) * ASSIST].view(-1, ASSIST)
        back = {
            tuple(origins[a, :3].tolist()): expand_x[a].clone()
            for a in range(int(ep_send_counts.sum()))
        }
        came: dict[Origin, Tensor] = {}
        for some in group.meeting.meet(ep_rank_id, back):
            came |= {origin: row for origin, row in some.items() if origin[0] == ep_rank_id}
        out = torch.full((len(expert_ids), expand_x.shape[1]), torch.nan, dtype=expand_x.dtype)
        for b in range(len(expert_ids)):
            if active_B[b]:
                total = torch.zeros(expand_x.shape[1])
                for c in range(expert_ids.shape[1]):
                    total = total + expert_scales[b, c] * came[ep_rank_id, b, c].float()
                out[b] = total.to(expand_x.dtype)
        return out

    def _group(self, name: str, key: str, said: Mapping[str, Any]) -> _Group:
        demand(1 <= len(key) < 128, name, f"a group called {key!r}")
        common = {what: said[what] for what in COMMON}
        demand(said["tp_world_size"] in (0, 1) and not said["group_tp"], name, "no tensor ranks")
        world, experts = common["ep_world_size"], common["moe_expert_num"]
        demand(world > 1 and experts % world == 0, name, f"{experts} experts on {world} ranks")
        demand(said["shared_expert_rank_num"] == 0, name, "the twin has no ranks of shared experts")
        with self._lock:
            group = self._groups.setdefault(key, _Group(ThreadMeeting(world), common))
        demand(group.said == common, name, f"{common} where the group began with {group.said}")
        return group


def require_rows(
    name: str, rows: int, ids_BC: Tensor, experts: int, mask: Tensor | None
) -> list[bool]:
    """Which rows take part."""
    demand(rows > 0 and ids_BC.dtype is torch.int32 and len(ids_BC) == rows, name, "rows")
    demand(bool(((ids_BC >= 0) & (ids_BC < experts)).all()), name, "an expert is out of range")
    demand(all(len(set(r)) == len(r) for r in ids_BC.tolist()), name, "an expert twice in a row")
    if mask is None:
        return [True] * rows
    demand(mask.dtype is torch.bool and mask.shape == (rows,), name, "the mask is of rows")
    active = [bool(b) for b in mask.tolist()]
    demand(active == sorted(active, reverse=True), name, "active rows come first")
    return active


def quantised(x_BH: Tensor) -> tuple[Tensor, Tensor]:
    """127 / most is the factor, and one over it the scale."""
    factor_B = 127.0 / x_BH.float().abs().amax(1)
    codes = (x_BH.float() * factor_B[:, None]).round().to(torch.int8)
    return codes, 1.0 / factor_B


def handed_out(
    mine: list[tuple[int, Origin, Tensor, Tensor]],
    rows_BH: Tensor,
    chosen: int,
    most: int,
    local: int,
    world: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What a rank's call gives for the rows that came, in order of its experts."""
    size, whole = most * min(local, chosen), rows_BH.dtype is torch.int8
    out = torch.full((size, rows_BH.shape[1]), -77 if whole else torch.nan, dtype=rows_BH.dtype)
    scales = torch.full((size,), torch.nan)
    assist = torch.randint(-(2**30), 2**30, (size * ASSIST,), dtype=torch.int32)
    counts = torch.zeros(local, dtype=torch.int64)
    received = torch.zeros(world * local, dtype=torch.int32)
    for a, (expert, origin, row, scale) in enumerate(mine):
        out[a], scales[a] = row, scale
        assist[a * ASSIST : a * ASSIST + 3] = torch.tensor(origin, dtype=torch.int32)
        counts[expert % local] += 1
        received[(expert % local) * world + origin[0]] += 1
    nothing = torch.empty(0)
    return out, scales, assist, counts, received, nothing.int(), nothing
