"""The operators in plain torch, by their documentation, for machines without an NPU.

``register`` gives torch the schemas of ``schemas.txt`` with these functions behind them, so that
``calls`` finds under ``torch.ops.npu`` what a device would offer: the same names, arguments and
defaults (an unknown keyword is refused by the schema), here on CPU tensors. Where torch_npu itself
was imported, its schemas stay and only the functions are added.

What the documentation leaves undefined is made of noise, and what it forbids is an InternalError,
so that nobody comes to rely on either. Each row is computed by itself: the twin is batch-invariant,
which says nothing of a device. Options that ``calls`` does not use are not emulated: they are
refused. Letters: see ``ops``; R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from moeserve.kernels.ascend.schemas import read_schemas
from moeserve.kernels.ascend.twin_distribute import DistributeTwin
from moeserve.kernels.ascend.twin_options import demand, known, refuse

NOISE = -(2**30) - 77
INT32 = 3  # torch's number of the dtype, which an `int?` argument receives
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def register() -> Library:
    """For as long as the result lives; once per process."""
    defined = hasattr(torch.ops.npu, "npu_rms_norm")
    library = Library("npu", "IMPL" if defined else "DEF")  # type: ignore[no-untyped-call]
    twins = twins_of_all()
    for name, line in read_schemas().items():
        if not defined:
            library.define(line)  # type: ignore[no-untyped-call]
        library.impl(name, twins[name], "CPU")  # type: ignore[no-untyped-call]
    return library


def twins_of_all() -> dict[str, Callable[..., Any]]:
    """By operator; those between ranks share a place where threads meet."""
    between = DistributeTwin()
    return {
        **TWINS,
        "npu_moe_distribute_dispatch_v2": between.dispatch,
        "npu_moe_distribute_combine_v2": between.combine,
    }


def rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    demand(input.dtype in FLOATS and gamma.dtype is input.dtype, "npu_rms_norm", "dtypes differ")
    rows, weight = input.float().reshape(-1, input.shape[-1]), gamma.float()
    rates = [torch.rsqrt(row.square().mean() + epsilon) for row in rows]
    made = [row * rate * weight for row, rate in zip(rows, rates, strict=True)]
    y = torch.stack(made).view(input.shape) if made else input.float()
    rstd = torch.stack(rates) if rates else torch.empty(0)
    return y.to(input.dtype), rstd.view(*input.shape[:-1], 1)


def swiglu(input: Tensor, dim: int = -1) -> Tensor:
    demand(dim in (-1, input.dim() - 1) and input.dtype in FLOATS, "npu_swiglu", "dim or dtype")
    return by_row(input, lambda gate, up: gate * torch.sigmoid(gate) * up)


def clipped_swiglu(
    x: Tensor,
    *,
    group_index: Tensor | None = None,
    dim: int = -1,
    alpha: float = 1.702,
    limit: float = 7.0,
    bias: float = 1.0,
    interleaved: bool = True,
) -> Tensor:
    refuse("npu_clipped_swiglu", {"group_index": group_index, "interleaved": interleaved or None})

    def clipped(gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (gate * torch.sigmoid(alpha * gate)) * (up + bias)

    return by_row(x, clipped)


def by_row(x: Tensor, make: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Of both halves of every row, in fp32."""
    inner = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], inner)
    for row, into in zip(x.view(-1, 2 * inner), out.view(-1, inner), strict=True):
        into.copy_(make(row[:inner].clone().float(), row[inner:].clone().float()))
    return out


def quant_matmul(
    x1: Tensor, x2: Tensor, scale: Tensor, *, output_dtype: int | None = None, **options: Any
) -> Tensor:
    name = "npu_quant_matmul"
    refuse(name, options)
    demand(x1.dtype is x2.dtype is torch.int8, name, "the twin multiplies int8")
    demand(max(x1.shape[-1], x2.shape[-1]) <= 65535, name, "a last dimension above 65535")
    demand(len(scale) in (1, x2.shape[-1]), name, "scales are one, or of each column")
    demand(output_dtype == INT32, name, "the twin gives int32")
    return integer_product(x1, x2)


def integer_product(x_RK: Tensor, weight_KN: Tensor) -> Tensor:
    """In fp64, where sums are exact and their order free."""
    return (x_RK.double() @ weight_KN.double()).to(torch.int32)


def float_product(x_RK: Tensor, weight_KN: Tensor) -> Tensor:
    """Accumulated in fp32 (bf16: no worse), rounded to the inputs' dtype, row by row."""
    columns = weight_KN.T.contiguous().float()
    out = x_RK.new_empty(len(x_RK), weight_KN.shape[1])
    for row, into in zip(x_RK, out, strict=True):
        into.copy_(torch.mv(columns, row.clone().float()))
    return out


def grouped_matmul(
    x: list[Tensor],
    weight: list[Tensor],
    *,
    group_list: Tensor | None = None,
    split_item: int = 0,
    group_type: int | None = None,
    group_list_type: int = 0,
    act_type: int = 0,
    output_dtype: int | None = None,
    **options: Any,
) -> list[Tensor]:
    name = "npu_grouped_matmul"
    refuse(name, options)
    demand(len(x) == len(weight) == 1 and act_type == 0, name, "the twin takes one of each")
    demand(x[0].dtype is weight[0].dtype, name, "dtypes differ")
    demand(max(x[0].shape[-1], weight[0].shape[-1]) <= 65535, name, "a last dimension above 65535")
    whole = x[0].dtype is torch.int8
    demand(output_dtype == (INT32 if whole else None), name, "the twin gives int32, or floats")
    product = integer_product if whole else float_product
    if group_type == -1:
        demand(group_list is None and split_item == 0 and not whole, name, "no groups, but a list")
        return [product(x[0], weight[0])]
    demand(group_list is not None and group_list.dtype is torch.int64, name, "groups are int64")
    assert group_list is not None
    demand((group_type, group_list_type) == (0, 1), name, "the twin takes counts of rows")
    demand(split_item in (2, 3), name, "one x and one weight give one output")
    demand(len(group_list) == len(weight[0]) > 1, name, "a count for each of several matrices")
    kind = torch.int32 if whole else x[0].dtype
    out = torch.full((len(x[0]), weight[0].shape[-1]), NOISE, dtype=kind)
    start = 0
    for matrix, count in zip(weight[0], group_list.tolist(), strict=True):
        demand(count >= 0, name, "a negative count")
        out[start : start + count] = product(x[0][start : start + count], matrix)
        start += count
    demand(start <= len(x[0]), name, "more rows are counted than there are")
    return [out]


def gating_top_k(x: Tensor, k: int, **given: Any) -> tuple[Tensor, Tensor, Tensor]:
    name = "npu_moe_gating_top_k"
    modes = {"group_select_mode": 0, "renorm": 0, "norm_type": 0, "out_flag": False}
    scaled = {"routed_scaling_factor": 1.0, "eps": 1e-20}
    o = known(name, given, bias=None, k_group=1, group_count=1, **modes, **scaled)
    group_count, bias = o.group_count, o.bias
    size = x.shape[1] // group_count
    demand(x.dtype in FLOATS and o.renorm == 0, name, "dtype or renorm")
    demand(bias is None or bias.dtype is x.dtype, name, "bias and scores are of one dtype")
    demand(size * group_count == x.shape[1] <= 2048 and size > 2, name, "experts and groups")
    demand(
        1 <= k <= size * o.k_group and 1 <= o.k_group <= group_count, name, "too many are chosen"
    )
    ids = torch.empty(len(x), k, dtype=torch.int32)
    y, normed = torch.empty(len(x), k), torch.empty(x.shape)
    for t, row in enumerate(x.float()):
        score = row.clone().sigmoid() if o.norm_type else row.clone().softmax(-1)
        choice = score if bias is None else score + bias.float()
        if group_count > 1:
            grouped = choice.view(group_count, size)
            best = grouped.sort(-1, descending=True).values[:, : 1 + o.group_select_mode].sum(-1)
            kept = best.sort(descending=True, stable=True).indices[: o.k_group]
            mask = torch.full_like(grouped, -torch.inf)
            mask[kept] = 0.0
            choice = choice + mask.flatten()
        ids[t] = choice.sort(descending=True, stable=True).indices[:k]
        normed[t], chosen = score, score[ids[t].long()]
        total = chosen.sum() + o.eps if o.norm_type else torch.tensor(1.0)
        y[t] = chosen / total * o.routed_scaling_factor
    noise = torch.full(x.shape, torch.nan)
    return y.to(x.dtype), ids, normed if o.out_flag else noise


def init_routing(
    x: Tensor, expert_idx: Tensor, *, scale: Tensor | None = None, **given: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    name = "npu_moe_init_routing_v2"
    modes = {"active_num": -1, "drop_pad_mode": 0, "quant_mode": -1, "row_idx_type": 0}
    counted = {"expert_tokens_num_type": 0, "expert_tokens_num_flag": False}
    o = known(name, given, expert_num=-1, active_expert_range=None, **modes, **counted)
    expert_num = o.expert_num
    first, last = o.active_expert_range or (0, expert_num)
    fixed = [*(getattr(o, mode) for mode in modes), o.expert_tokens_num_type]
    demand(fixed == [-1, 0, -1, 0, 1] and o.expert_tokens_num_flag, name, "modes of the twin")
    demand(0 <= first < last <= expert_num, name, "the range of experts")
    chosen = expert_idx.flatten().long()
    demand(expert_idx.dtype is torch.int32, name, "experts are int32")
    demand(bool(((chosen >= 0) & (chosen < expert_num)).all()), name, "an expert is out of range")
    order = chosen.sort(stable=True).indices
    order = order[(chosen[order] >= first) & (chosen[order] < last)]
    whole = x.dtype is torch.int8
    rows = torch.full((len(chosen), x.shape[1]), -77 if whole else torch.nan, dtype=x.dtype)
    scales = torch.full((len(chosen),), torch.nan)
    source = order // expert_idx.shape[1]
    rows[: len(order)] = x[source]
    if scale is not None:
        scales[: len(order)] = scale[source]
    place = torch.full((len(chosen),), -1, dtype=torch.int32)
    place[order] = torch.arange(len(order), dtype=torch.int32)
    counts = torch.bincount(chosen, minlength=expert_num)[first:last]
    return rows, place, counts, scales


def scatter_pa_kv_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    cache_mode: str | None = "PA_NZ",
    **options: Any,
) -> None:
    name = "npu_scatter_pa_kv_cache"
    refuse(name, options)
    slots = slot_mapping.long()
    demand(cache_mode in (None, "Norm") and key.dim() == 3, name, "the twin keeps plain caches")
    demand(len(torch.unique(slots)) == len(slots), name, "a slot occurs twice")
    for rows, cache in ((key, key_cache), (value, value_cache)):
        demand(rows.dtype is cache.dtype and cache.dim() == 4, name, "dtypes or dimensions")
        demand(rows.is_contiguous() and cache.is_contiguous(), name, "strides")
        cache.view(-1, *cache.shape[2:])[slots] = rows


def fused_infer_attention(
    query: Tensor, key: Tensor, value: Tensor, **given: Any
) -> tuple[Tensor, Tensor]:
    name = "npu_fused_infer_attention_score_v2"
    tensors = dict.fromkeys(("query_rope", "key_rope", "atten_mask", "block_table"))
    lengths = dict.fromkeys(("actual_seq_qlen", "actual_seq_kvlen"))
    heads_of = {"num_query_heads": 1, "num_key_value_heads": 0, "softmax_scale": 1.0}
    laid = {"input_layout": "BSH", "sparse_mode": 0, "block_size": 0}
    o = known(name, given, **tensors, **lengths, **heads_of, **laid)
    query_rope, key_rope = o.query_rope, o.key_rope
    num_key_value_heads, block_size, sparse_mode = (
        o.num_key_value_heads,
        o.block_size,
        o.sparse_mode,
    )
    ends, contexts, tables = o.actual_seq_qlen or [], o.actual_seq_kvlen or [], o.block_table
    demand(o.input_layout == "TND" and tables is not None, name, "the twin is TND over pages")
    assert tables is not None
    demand(query.dtype is key.dtype is torch.bfloat16, name, "bfloat16")
    demand(len(ends) == len(contexts) == len(tables), name, "as many lengths as tables")
    demand(not ends or ends[-1] == len(query), name, "rows without a sequence")
    demand((sparse_mode, o.atten_mask is None) in ((0, True), (3, False)), name, "mode and mask")
    heads, group = query.shape[1], query.shape[1] // num_key_value_heads
    demand(heads == o.num_query_heads and query.is_contiguous(), name, "heads")
    latent = query_rope is not None
    wanted = ((512, 64), (16, 128)) if latent else ((128,), (128, 256, 384, 512))
    sizes = (query.shape[2], *(() if query_rope is None else (query_rope.shape[2],)))
    demand((sizes, block_size in wanted[1]) == (wanted[0], True), name, f"{sizes}, {block_size}")
    width = key.shape[-1] // num_key_value_heads
    out = torch.empty(len(query), heads, value.shape[-1] // num_key_value_heads).bfloat16()
    start = 0
    for end, context, table in zip(ends, contexts, tables, strict=True):
        rows = end - start
        demand(rows <= context and (rows == 1 or sparse_mode == 3), name, "rows and mask")
        demand(not latent or rows <= 16, name, "more than 16 rows of a latent")
        pages = table[: -(-context // block_size)].long()
        k = key[pages].reshape(-1, num_key_value_heads, width)[:context].float()
        v = value[pages].reshape(-1, num_key_value_heads, out.shape[-1])[:context].float()
        rope = None if key_rope is None else key_rope[pages].reshape(-1, 64)[:context].float()
        for t in range(start, end):
            seen = context - (end - 1 - t)
            for a in range(heads):
                score = torch.mv(k[:seen, a // group].contiguous(), query[t, a].float())
                if rope is not None and query_rope is not None:
                    score = score + torch.mv(rope[:seen], query_rope[t, a].float())
                weight = (score * o.softmax_scale).softmax(0)
                out[t, a] = torch.mv(v[:seen, a // group].T.contiguous(), weight).bfloat16()
        start = end
    return out, torch.zeros(1)


def format_cast(input: Tensor, acl_format: int, **options: Any) -> Tensor:
    """Another order of the same numbers in memory, which a tensor of the host does not have."""
    name = "npu_format_cast"
    refuse(name, options)
    demand(acl_format == 29, name, "the twin casts to FRACTAL_NZ")
    demand(input.dtype in (torch.int8, torch.float16, torch.bfloat16), name, "dtype")
    return input.clone()


TWINS: Mapping[str, Callable[..., Any]] = {
    "npu_rms_norm": rms_norm,
    "npu_swiglu": swiglu,
    "npu_clipped_swiglu": clipped_swiglu,
    "npu_quant_matmul": quant_matmul,
    "npu_grouped_matmul": grouped_matmul,
    "npu_moe_gating_top_k": gating_top_k,
    "npu_moe_init_routing_v2": init_routing,
    "npu_scatter_pa_kv_cache": scatter_pa_kv_cache,
    "npu_fused_infer_attention_score_v2": fused_infer_attention,
    "npu_format_cast": format_cast,
}
