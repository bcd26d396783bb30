"""The op table by native kernels: shapes are checked here, pointers go to ``_cpu``.

Every row's result is the same bits in any batch, with any number of threads, and on any
instruction set that has a fused multiply-add. Weights are repacked once, in the dtype they come
in (fp32 or bf16; others become fp32). Activations are fp32; a strided one is copied first.
Letters: see ``ops``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from moeserve.errors import InternalError
from moeserve.kernels import _cpu
from moeserve.kernels.matrix import Matrix
from moeserve.kernels.ops import Activation, AttentionBatch, Experts, Linear, RouterSpec
from moeserve.kernels.packing import Panels, pack

SCORING = {"softmax": 0, "sigmoid": 1, "topk_softmax": 2}


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """The native handle, and the memory it points to."""

    handle: _cpu.Experts
    gate_up: Panels
    down: Panels


class CpuOps:
    """The native backend. Stateless: instruction set and threads belong to ``_cpu``."""

    name = "cpu"

    def pack_linear(self, weight_NK: Matrix, bias_N: Tensor | None = None) -> Linear:
        out, into = weight_NK.shape
        return Linear(out, into, pack(weight_NK, bias_N))

    def pack_experts(
        self,
        gate_up_E2IH: Matrix,
        down_EHI: Matrix,
        gate_up_bias_E2I: Tensor | None = None,
        down_bias_EH: Tensor | None = None,
        activation: Activation = Activation.SWIGLU,
    ) -> Experts:
        num, hidden, inner = down_EHI.shape
        assert gate_up_E2IH.shape == (num, 2 * inner, hidden), gate_up_E2IH.shape
        up = pack(gate_up_E2IH, gate_up_bias_E2I, paired=True)
        down = pack(down_EHI, down_bias_EH)
        handle = _cpu.Experts(up.handle, down.handle, num, activation is Activation.CLAMPED)
        return Experts(num, hidden, inner, activation, PackedExperts(handle, up, down))

    def pack_heads(self, weight_ANK: Matrix) -> Linear:
        _, out, into = weight_ANK.shape
        return Linear(out, into, pack(weight_ANK))

    def linear(self, x_TK: Tensor, weight: Linear) -> Tensor:
        return multiply(x_TK, weight, heads=1).view(len(x_TK), weight.out_features)

    def linear_heads(self, x_TAK: Tensor, weight: Linear) -> Tensor:
        return multiply(x_TAK, weight, heads=x_TAK.shape[1])

    def moe_ffn(self, x_TH: Tensor, experts: Experts, ids_TC: Tensor, weights_TC: Tensor) -> Tensor:
        packed = cast("PackedExperts", experts.data)
        rows, chosen = ids_TC.shape
        assert x_TH.shape == (rows, experts.hidden), x_TH.shape
        assert weights_TC.shape == ids_TC.shape, weights_TC.shape
        x, ids, weights = fp32(x_TH), int32(ids_TC), fp32(weights_TC)
        out = torch.empty(rows, experts.hidden)
        if not _cpu.moe_ffn(
            x.data_ptr(),
            rows,
            packed.handle,
            ids.data_ptr(),
            weights.data_ptr(),
            chosen,
            out.data_ptr(),
        ):
            raise InternalError(f"moe_ffn: an expert id is not in 0..{experts.num_experts - 1}")
        return out

    def quantize_per_token(self, x_TK: Tensor) -> tuple[Tensor, Tensor]:
        rows, size = x_TK.shape
        x = fp32(x_TK)
        codes, scale = torch.empty(rows, size, dtype=torch.int8), torch.empty(rows)
        _cpu.quantize_per_token(x.data_ptr(), rows, size, codes.data_ptr(), scale.data_ptr())
        return codes, scale

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        size = x_TH.shape[-1]
        assert weight_H.shape == (size,), weight_H.shape
        x, weight = fp32(x_TH), weight_H.float().contiguous()
        out = torch.empty(x.shape)
        rows = x.numel() // size
        _cpu.rms_norm(x.data_ptr(), rows, size, weight.data_ptr(), eps, out.data_ptr())
        return out

    def glu(self, gate_up_T2I: Tensor, activation: Activation) -> Tensor:
        rows, inner = len(gate_up_T2I), gate_up_T2I.shape[1] // 2
        x, out = fp32(gate_up_T2I), torch.empty(rows, inner)
        clamped = activation is Activation.CLAMPED
        _cpu.glu(x.data_ptr(), rows, inner, clamped, out.data_ptr())
        return out

    def rope(self, x_TAD: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool) -> Tensor:
        rows, heads, size = x_TAD.shape
        pairs = cos_TR.shape[1]
        assert 2 * pairs <= size, (pairs, size)
        assert cos_TR.shape == sin_TR.shape == (rows, pairs), (cos_TR.shape, sin_TR.shape)
        x, cos, sin = fp32(x_TAD), fp32(cos_TR), fp32(sin_TR)
        out = torch.empty(x.shape)
        _cpu.rope(
            x.data_ptr(),
            rows,
            heads,
            size,
            cos.data_ptr(),
            sin.data_ptr(),
            pairs,
            interleaved,
            out.data_ptr(),
        )
        return out

    def route_topk(
        self, logits_TE: Tensor, spec: RouterSpec, bias_E: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        rows, num = logits_TE.shape
        assert num == spec.num_experts, (num, spec)
        assert 0 < spec.top_k <= num, spec
        assert num % spec.num_groups == 0, spec
        assert 0 < spec.topk_groups <= spec.num_groups, spec
        assert spec.group_score in ("top2", "max"), spec
        assert bias_E is None or bias_E.shape == (num,), bias_E
        logits = fp32(logits_TE)
        bias = None if bias_E is None else bias_E.float().contiguous()
        ids = torch.empty(rows, spec.top_k, dtype=torch.int32)
        weights = torch.empty(rows, spec.top_k)
        _cpu.route_topk(
            logits.data_ptr(),
            rows,
            num,
            spec.top_k,
            SCORING[spec.scoring],
            spec.normalise,
            spec.scale,
            spec.num_groups,
            spec.topk_groups,
            spec.group_score == "top2",
            0 if bias is None else bias.data_ptr(),
            ids.data_ptr(),
            weights.data_ptr(),
        )
        return ids, weights

    def write_kv(self, kv_BPGD: Tensor, x_TGD: Tensor, slot_T: Tensor) -> None:
        blocks, size, heads, width = kv_BPGD.shape
        rows = len(slot_T)
        assert x_TGD.shape == (rows, heads, width), (x_TGD.shape, kv_BPGD.shape)
        x, slots = fp32(x_TGD), slot_T.to(torch.int64).contiguous()
        block_stride, position_stride, head_stride, _ = kv_BPGD.stride()
        if not _cpu.write_kv(
            kv_BPGD.data_ptr(),
            is_bf16_cache(kv_BPGD),
            blocks,
            size,
            block_stride,
            position_stride,
            head_stride,
            x.data_ptr(),
            rows,
            heads,
            width,
            slots.data_ptr(),
        ):
            raise InternalError(f"write_kv: a slot is not in 0..{blocks * size - 1}")

    def paged_attention(
        self,
        q_TAD: Tensor,
        k_BPGD: Tensor,
        v_BPGV: Tensor,
        batch: AttentionBatch,
        *,
        scale: float,
        window: int | None = None,
        sinks_A: Tensor | None = None,
    ) -> Tensor:
        rows, heads, size = q_TAD.shape
        blocks, block_size, kv_heads, _ = k_BPGD.shape
        sequences, width = batch.blocks_SM.shape
        assert k_BPGD.shape[3] == size, (q_TAD.shape, k_BPGD.shape)
        assert heads % kv_heads == 0, (heads, kv_heads)
        assert v_BPGV.shape[:3] == k_BPGD.shape[:3], (v_BPGV.shape, k_BPGD.shape)
        assert v_BPGV.dtype == k_BPGD.dtype, (v_BPGV.dtype, k_BPGD.dtype)
        assert batch.query_start_S1.shape == (sequences + 1,), batch
        assert batch.context_S.shape == (sequences,), batch
        assert int(batch.query_start_S1[-1]) == rows, (batch.query_start_S1, rows)
        assert window is None or window > 0, window
        assert sinks_A is None or sinks_A.shape == (heads,), sinks_A
        q, starts, context, table = (
            fp32(q_TAD),
            int32(batch.query_start_S1),
            int32(batch.context_S),
            int32(batch.blocks_SM),
        )
        sinks = None if sinks_A is None else sinks_A.float().contiguous()
        out = torch.empty(rows, heads, v_BPGV.shape[3])
        if not _cpu.paged_attention(
            q.data_ptr(),
            k_BPGD.data_ptr(),
            k_BPGD.stride(0),
            k_BPGD.stride(1),
            k_BPGD.stride(2),
            v_BPGV.data_ptr(),
            v_BPGV.stride(0),
            v_BPGV.stride(1),
            v_BPGV.stride(2),
            is_bf16_cache(k_BPGD) and is_bf16_cache(v_BPGV),
            starts.data_ptr(),
            context.data_ptr(),
            table.data_ptr(),
            sequences,
            width,
            blocks,
            block_size,
            heads,
            kv_heads,
            size,
            v_BPGV.shape[3],
            scale,
            window or 0,
            0 if sinks is None else sinks.data_ptr(),
            out.data_ptr(),
        ):
            raise InternalError(f"paged_attention: rows, contexts or blocks do not fit: {batch}")
        return out


def multiply(x: Tensor, weight: Linear, heads: int) -> Tensor:
    """[T, heads, N]; ``x`` is [T, K] or [T, heads, K]."""
    panels = cast("Panels", weight.data)
    assert x.shape[-1] == weight.in_features, (x.shape, weight.in_features)
    assert heads == panels.count, (heads, panels.count)
    x, rows = fp32(x), len(x)
    out = torch.empty(rows, heads, weight.out_features)
    _cpu.linear(x.data_ptr(), rows, heads, panels.handle, out.data_ptr())
    return out


def fp32(x: Tensor) -> Tensor:
    assert x.dtype is torch.float32, x.dtype
    return x.contiguous()


def int32(x: Tensor) -> Tensor:
    assert x.dtype is torch.int32, x.dtype
    return x.contiguous()


def is_bf16_cache(cache: Tensor) -> bool:
    assert cache.stride(3) == 1 or cache.shape[3] == 1, cache.stride()
    assert cache.dtype in (torch.float32, torch.bfloat16), cache.dtype
    return cache.dtype is torch.bfloat16
