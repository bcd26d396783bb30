"""The operators of torch_npu, each behind one typed function with its documented limits.

Nothing else of ours names ``torch.ops.npu``. What is outside of a limit is an InternalError here,
with the value, rather than whatever the device makes of it: callers ask ``limits`` first. torch_npu
must have been imported (or ``twin`` registered) before.

Letters: see ``ops``; R rows, and L a latent's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from moeserve.errors import InternalError
from moeserve.kernels.ascend.buffers import AtlasGeneration, ExpertTraffic
from moeserve.kernels.ascend.limits import (
    MASK,
    MLA_MOST_ROWS,
    MOST_INNER,
    MOST_SEQUENCES,
    distribute_lacks,
)

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
NEEDED = (
    "npu_rms_norm",
    "npu_swiglu",
    "npu_quant_matmul",
    "npu_grouped_matmul",
    "npu_moe_init_routing_v2",
)
# Without these something falls back.
USED = (
    *NEEDED,
    "npu_clipped_swiglu",
    "npu_moe_gating_top_k",
    "npu_scatter_pa_kv_cache",
    "npu_fused_infer_attention_score_v2",
)
# Between ranks, where they are asked to carry tokens.
BETWEEN_RANKS = ("npu_moe_distribute_dispatch_v2", "npu_moe_distribute_combine_v2")
# Weights in the format of the cube units.
FORMATS = ("npu_format_cast",)
CALLED = (*USED, *BETWEEN_RANKS, *FORMATS)
DROPLESS, COUNTS, NOT_QUANTISED, GATHER = 0, 1, -1, 0
BY_ROWS, ONE_OUTPUT = 0, 3
RIGHT_DOWN_CAUSAL = 3
AS_THEY_ARE, INT8_BY_TOKEN = 0, 2
FRACTAL_NZ = 29


def has(operator: str) -> bool:
    """Whether this torch_npu knows it."""
    return hasattr(torch.ops.npu, operator)


def lacking() -> list[str]:
    """Of those that the backend cannot do without."""
    return [name for name in NEEDED if not has(name)]


def require(holds: bool, operator: str, what: object) -> None:
    if not holds:
        raise InternalError(f"{operator} does not take {what}")


def rms_norm(x: Tensor, gamma_H: Tensor, eps: float) -> Tensor:
    """Over the last dimension; 2 to 8 dimensions, one dtype."""
    name = "npu_rms_norm"
    require(x.dtype in FLOATS and gamma_H.dtype is x.dtype, name, (x.dtype, gamma_H.dtype))
    require(2 <= x.dim() <= 8, name, x.shape)
    return cast("Tensor", torch.ops.npu.npu_rms_norm(x, gamma_H, eps)[0])


def swiglu(gate_up_R2I: Tensor) -> Tensor:
    """silu(first half) * second half."""
    require(gate_up_R2I.dtype in FLOATS, "npu_swiglu", gate_up_R2I.dtype)
    return cast("Tensor", torch.ops.npu.npu_swiglu(gate_up_R2I, -1))


def clipped_swiglu(gate_up_R2I: Tensor) -> Tensor:
    """GPT-OSS: see ``Activation.CLAMPED``; gate is the first half."""
    require(
        gate_up_R2I.dtype in FLOATS and gate_up_R2I.is_contiguous() and gate_up_R2I.dim() > 1,
        "npu_clipped_swiglu",
        (gate_up_R2I.dtype, gate_up_R2I.shape),
    )
    return cast(
        "Tensor",
        torch.ops.npu.npu_clipped_swiglu(
            gate_up_R2I, dim=-1, alpha=1.702, limit=7.0, bias=1.0, interleaved=False
        ),
    )


def quant_matmul(codes_RK: Tensor, codes_KN: Tensor, ones_1: Tensor) -> Tensor:
    """int32 [R, N], exact: with that output ``scale`` is asked for and not applied."""
    name = "npu_quant_matmul"
    both = codes_RK, codes_KN
    require(all(x.dtype is torch.int8 and x.dim() == 2 for x in both), name, "other than int8")
    require(max(x.shape[-1] for x in both) <= MOST_INNER, name, [x.shape for x in both])
    require(ones_1.dtype is torch.float32 and ones_1.shape == (1,), name, ones_1.shape)
    return cast(
        "Tensor",
        torch.ops.npu.npu_quant_matmul(codes_RK, codes_KN, ones_1, output_dtype=torch.int32),
    )


def matmul(x_RK: Tensor, weight_KN: Tensor) -> Tensor:
    """[R, N] of one float dtype: a grouped product without groups."""
    name = "npu_grouped_matmul"
    require(x_RK.dtype in FLOATS and weight_KN.dtype is x_RK.dtype, name, x_RK.dtype)
    require(max(x_RK.shape[-1], weight_KN.shape[-1]) <= MOST_INNER, name, weight_KN.shape)
    made = torch.ops.npu.npu_grouped_matmul([x_RK], [weight_KN], split_item=0, group_type=-1)
    return cast("Tensor", made[0])


def grouped_matmul(x_RK: Tensor, weight_EKN: Tensor, counts_E: Tensor) -> Tensor:
    """[R, N]: the first counts[0] rows times matrix 0, and so on; rows past the sum are garbage.

    int8 gives int32, exact; floats their own dtype.
    """
    name = "npu_grouped_matmul"
    kind = x_RK.dtype
    require(kind in (*FLOATS, torch.int8) and weight_EKN.dtype is kind, name, kind)
    require(max(x_RK.shape[-1], weight_EKN.shape[-1]) <= MOST_INNER, name, weight_EKN.shape)
    require(counts_E.dtype is torch.int64 and len(counts_E) > 1, name, (counts_E.dtype, "groups"))
    made = torch.ops.npu.npu_grouped_matmul(
        [x_RK],
        [weight_EKN],
        group_list=counts_E,
        split_item=ONE_OUTPUT,
        group_type=BY_ROWS,
        group_list_type=COUNTS,
        output_dtype=torch.int32 if kind is torch.int8 else None,
    )
    return cast("Tensor", made[0])


def gating_top_k(
    logits_TE: Tensor,
    top_k: int,
    *,
    bias_E: Tensor | None,
    groups: int,
    topk_groups: int,
    top2: bool,
    sigmoid: bool,
) -> tuple[Tensor, Tensor]:
    """ids int32 [T, C], best first, and the normed scores fp32 [T, E] that they were chosen by
    (before the bias)."""
    name = "npu_moe_gating_top_k"
    require(logits_TE.dtype in FLOATS and logits_TE.dim() == 2, name, logits_TE.dtype)
    require(bias_E is None or bias_E.dtype is logits_TE.dtype, name, "a bias of another dtype")
    _, ids_TC, normed_TE = torch.ops.npu.npu_moe_gating_top_k(
        logits_TE,
        top_k,
        bias=bias_E,
        k_group=topk_groups,
        group_count=groups,
        group_select_mode=int(top2),
        norm_type=int(sigmoid),
        out_flag=True,
    )
    return ids_TC, normed_TE


def init_routing(
    x_TH: Tensor, scale_T: Tensor | None, ids_TC: Tensor, experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Rows in order of their experts: x [T * C, H]; where choice c of row t went, int32 [T * C], -1
    where its expert is not below ``experts``; rows of each expert, int64 [E]; and their scales.

    Rows past the sum of the counts are garbage, and so are their scales.
    """
    name = "npu_moe_init_routing_v2"
    require(x_TH.dtype in (*FLOATS, torch.int8) and x_TH.dim() == 2, name, x_TH.dtype)
    require(ids_TC.dtype is torch.int32 and ids_TC.dim() == 2, name, ids_TC.dtype)
    require(scale_T is None or scale_T.dtype is torch.float32, name, "a scale that is not fp32")
    require(experts < 10240, name, f"{experts} experts")
    rows, place, counts_E, scale = torch.ops.npu.npu_moe_init_routing_v2(
        x_TH,
        ids_TC,
        scale=scale_T,
        active_num=-1,
        expert_num=experts + 1,
        drop_pad_mode=DROPLESS,
        expert_tokens_num_type=COUNTS,
        expert_tokens_num_flag=True,
        quant_mode=NOT_QUANTISED,
        active_expert_range=[0, experts],
        row_idx_type=GATHER,
    )
    return rows, place, counts_E, None if scale_T is None else scale


def write_cache(
    k_TGD: Tensor, v_TGV: Tensor, k_BPGD: Tensor, v_BPGV: Tensor, slot_T: Tensor
) -> None:
    """Row t to place ``slot_T[t]`` (int32 or int64, distinct) of both caches, in place."""
    name = "npu_scatter_pa_kv_cache"
    kinds = {x.dtype for x in (k_TGD, v_TGV, k_BPGD, v_BPGV)}
    require(len(kinds) == 1, name, kinds)
    require(k_TGD.dim() == 3 and k_TGD.shape[:2] == v_TGV.shape[:2], name, k_TGD.shape)
    require(all(x.is_contiguous() for x in (k_TGD, v_TGV, k_BPGD, v_BPGV)), name, "strides")
    require(slot_T.dtype in (torch.int32, torch.int64), name, slot_T.dtype)
    torch.ops.npu.npu_scatter_pa_kv_cache(k_TGD, v_TGV, k_BPGD, v_BPGV, slot_T, cache_mode="Norm")


def paged_attention(
    q_TAD: Tensor,
    k_BPX: Tensor,
    v_BPX: Tensor,
    *,
    rope: tuple[Tensor, Tensor] | None,
    mask_MM: Tensor | None,
    ends: Sequence[int],
    contexts: Sequence[int],
    blocks_SM: Tensor,
    kv_heads: int,
    scale: float,
) -> Tensor:
    """[T, A, V] in bf16; layout TND over blocks [B, P, G * D].

    Sequence s has the rows up to ``ends[s]``, which are the last of its ``contexts[s]`` tokens.
    ``mask_MM`` is the upper triangle of 2048 x 2048 (bool, True: not seen), None where every
    sequence has one row. ``rope`` are the rotated parts of queries [T, A, 64] and keys [B, P, 64].
    """
    name = "npu_fused_infer_attention_score_v2"
    tensors = (q_TAD, k_BPX, v_BPX, *(rope or ()))
    require(all(x.dtype is torch.bfloat16 for x in tensors), name, "other than bfloat16")
    require(all(x.is_contiguous() for x in tensors), name, "strides")
    require(len(ends) == len(contexts) == len(blocks_SM) <= MOST_SEQUENCES, name, len(ends))
    require(blocks_SM.dtype is torch.int32 and blocks_SM.dim() == 2, name, blocks_SM.dtype)
    rows = [end - start for start, end in zip((0, *ends), ends, strict=False)]
    require(rope is None or max(rows, default=0) <= MLA_MOST_ROWS, name, f"{max(rows)} rows")
    require(mask_MM is not None or max(rows, default=1) == 1, name, "several rows and no mask")
    require(mask_MM is None or mask_MM.shape == (MASK, MASK), name, "another mask")
    out, _ = torch.ops.npu.npu_fused_infer_attention_score_v2(
        q_TAD,
        k_BPX,
        v_BPX,
        query_rope=None if rope is None else rope[0],
        key_rope=None if rope is None else rope[1],
        atten_mask=mask_MM,
        actual_seq_qlen=list(ends),
        actual_seq_kvlen=list(contexts),
        block_table=blocks_SM,
        num_query_heads=q_TAD.shape[1],
        num_key_value_heads=kv_heads,
        softmax_scale=scale,
        input_layout="TND",
        sparse_mode=0 if mask_MM is None else RIGHT_DOWN_CAUSAL,
        block_size=k_BPX.shape[1],
    )
    return cast("Tensor", out)


@dataclass(frozen=True, slots=True)
class EpGroup:
    """Ranks that move tokens by the operators: what must be equal in all calls, on all ranks and in
    all layers. ``name`` is HCCL's of the group, in which nothing else may run; ``slots`` are those
    of a rank, ``tokens`` the rows of every rank in every call."""

    name: str
    world: int
    rank: int
    slots: int
    tokens: int
    generation: AtlasGeneration


@dataclass(frozen=True, slots=True)
class Dispatched:
    """Rows of this rank's slots in their order [A, H], as many as could come at most: those past
    the sum of ``count_S`` (int64) are garbage. ``scale_A`` where they are int8. ``handle`` is for
    the combine that must follow, and has no meaning of its own."""

    rows_AH: Tensor
    scale_A: Tensor | None
    count_S: Tensor
    handle: tuple[Tensor, Tensor, Tensor]


def distribute(
    x_BH: Tensor,
    slot_BC: Tensor,
    weight_BC: Tensor,
    active_B: Tensor,
    group: EpGroup,
    *,
    quantised: bool,
) -> Dispatched:
    """Rows (bf16) to the ranks of their slots, which are numbered through the ranks (int32, those
    of a row distinct). Rows that are not active come last and go nowhere. ``quantised`` to int8 by
    row, before they are sent."""
    name = "npu_moe_distribute_dispatch_v2"
    tokens, hidden = x_BH.shape
    why = distribute_lacks(
        ExpertTraffic(group.world, group.slots, tokens, hidden, slot_BC.shape[1]), group.generation
    )
    require(not why, name, why)
    require(tokens == group.tokens, name, f"{tokens} rows where a rank has {group.tokens}")
    require(x_BH.dtype is torch.bfloat16, name, x_BH.dtype)
    require(slot_BC.dtype is torch.int32 and weight_BC.dtype is torch.float32, name, "dtypes")
    require(active_B.dtype is torch.bool and active_B.shape == (tokens,), name, active_B.shape)
    made = torch.ops.npu.npu_moe_distribute_dispatch_v2(
        x_BH,
        slot_BC,
        **_of_group(group),
        x_active_mask=active_B,
        expert_scales=weight_BC if group.generation is AtlasGeneration.A2 else None,
        quant_mode=INT8_BY_TOKEN if quantised else AS_THEY_ARE,
        expert_token_nums_type=COUNTS,
    )
    rows, scale, assist, count_S, received, _, scales = made
    return Dispatched(rows, scale if quantised else None, count_S, (assist, received, scales))


def collect(
    rows_AH: Tensor,
    dispatched: Dispatched,
    slot_BC: Tensor,
    weight_BC: Tensor,
    active_B: Tensor,
    group: EpGroup,
) -> Tensor:
    """[B, H] in bf16: of every row the sum of what its slots made of it (``rows_AH``, bf16, in the
    order of ``dispatched``), weighed. The order of that sum is the operator's. Rows that are not
    active are garbage."""
    name = "npu_moe_distribute_combine_v2"
    require(rows_AH.dtype is torch.bfloat16, name, rows_AH.dtype)
    require(rows_AH.shape == dispatched.rows_AH.shape, name, rows_AH.shape)
    assist, received, scales = dispatched.handle
    return cast(
        "Tensor",
        torch.ops.npu.npu_moe_distribute_combine_v2(
            rows_AH,
            slot_BC,
            assist,
            received,
            weight_BC,
            **_of_group(group),
            x_active_mask=active_B,
            expand_scales=scales if group.generation is AtlasGeneration.A2 else None,
        ),
    )


def _of_group(group: EpGroup) -> dict[str, str | int]:
    """The arguments that both operators share."""
    return {
        "group_ep": group.name,
        "ep_world_size": group.world,
        "ep_rank_id": group.rank,
        "moe_expert_num": group.world * group.slots,
        "shared_expert_num": 0,
        "global_bs": group.world * group.tokens,
        "comm_alg": "fullmesh" if group.generation is AtlasGeneration.A2 else "",
    }


def in_nz(weight_EKN: Tensor) -> Tensor:
    """The same numbers in FRACTAL_NZ, the order in which the cube units read them (int8)."""
    name = "npu_format_cast"
    require(weight_EKN.dtype is torch.int8, name, weight_EKN.dtype)
    require(weight_EKN.dim() in (2, 3) and weight_EKN.is_contiguous(), name, weight_EKN.shape)
    return cast("Tensor", torch.ops.npu.npu_format_cast(weight_EKN, FRACTAL_NZ))


def allow_nz(device: torch.device) -> bool:
    """Whether weights on the device can be cast, which torch_npu is allowed to do from now on."""
    if device.type != "npu" or not has(FORMATS[0]):
        return False
    backend: Any = getattr(torch, "npu")  # noqa: B009, torch_npu puts it there
    backend.config.allow_internal_format = True
    return True
