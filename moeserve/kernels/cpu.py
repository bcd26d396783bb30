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
from moeserve.kernels import _cpu, kv
from moeserve.kernels.kv import fp32, int32
from moeserve.kernels.ops import (
    Activation,
    AttentionBatch,
    Experts,
    KvCache,
    KvShape,
    Linear,
    RouterSpec,
)

PANEL = 32
SCORING = {"softmax": 0, "sigmoid": 1, "topk_softmax": 2}


@dataclass(frozen=True, slots=True)
class Panels:
    """``count`` matrices in the kernels' layout, and one bias per lane. Addresses are of these."""

    count: int
    data: Tensor
    bias: Tensor | None
    data_at: int
    bias_at: int
    is_bf16: bool


class CpuOps:
    """The native backend. Stateless: instruction set and threads belong to ``_cpu``."""

    name = "cpu"

    def pack_linear(self, weight_NK: Tensor, bias_N: Tensor | None = None) -> Linear:
        out, into = weight_NK.shape
        bias = None if bias_N is None else bias_N[None]
        return Linear(out, into, pack(weight_NK[None], bias, paired=False))

    def pack_experts(
        self,
        gate_up_E2IH: Tensor,
        down_EHI: Tensor,
        gate_up_bias_E2I: Tensor | None = None,
        down_bias_EH: Tensor | None = None,
        activation: Activation = Activation.SWIGLU,
    ) -> Experts:
        num, hidden, inner = down_EHI.shape
        assert gate_up_E2IH.shape == (num, 2 * inner, hidden), gate_up_E2IH.shape
        if gate_up_E2IH.dtype != down_EHI.dtype:
            gate_up_E2IH, down_EHI = gate_up_E2IH.float(), down_EHI.float()
        ups = pack(gate_up_E2IH, gate_up_bias_E2I, paired=True)
        downs = pack(down_EHI, down_bias_EH, paired=False)
        return Experts(num, hidden, inner, activation, (ups, downs))

    def pack_heads(self, weight_ANK: Tensor) -> Linear:
        _, out, into = weight_ANK.shape
        return Linear(out, into, pack(weight_ANK, None, paired=False))

    def linear(self, x_TK: Tensor, weight: Linear) -> Tensor:
        return multiply(x_TK, weight, heads=1).view(len(x_TK), weight.out_features)

    def linear_heads(self, x_TAK: Tensor, weight: Linear) -> Tensor:
        return multiply(x_TAK, weight, heads=x_TAK.shape[1])

    def moe_ffn(self, x_TH: Tensor, experts: Experts, ids_TC: Tensor, weights_TC: Tensor) -> Tensor:
        ups, downs = cast("tuple[Panels, Panels]", experts.data)
        rows, chosen = ids_TC.shape
        assert x_TH.shape == (rows, experts.hidden), x_TH.shape
        assert weights_TC.shape == ids_TC.shape, weights_TC.shape
        x, ids, weights = fp32(x_TH), int32(ids_TC), fp32(weights_TC)
        out = torch.empty(rows, experts.hidden)
        if not _cpu.moe_ffn(
            x.data_ptr(),
            rows,
            ups.data_at,
            ups.bias_at,
            downs.data_at,
            downs.bias_at,
            experts.num_experts,
            experts.hidden,
            experts.intermediate,
            ups.is_bf16,
            experts.activation is Activation.CLAMPED,
            ids.data_ptr(),
            weights.data_ptr(),
            chosen,
            out.data_ptr(),
        ):
            raise InternalError(f"moe_ffn: an expert id is not in 0..{experts.num_experts - 1}")
        return out

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

    def new_kv(self, shape: KvShape) -> KvCache:
        return kv.new_cache(shape)

    def kv_bytes_per_block(self, shape: KvShape) -> int:
        return kv.bytes_per_block(shape)

    def write_kv(self, cache: KvCache, k_TGD: Tensor, v_TGV: Tensor | None, slot_T: Tensor) -> None:
        kv.write(cache, k_TGD, v_TGV, slot_T)

    def paged_attention(
        self,
        q_TAD: Tensor,
        cache: KvCache,
        batch: AttentionBatch,
        *,
        scale: float,
        window: int | None = None,
        sinks_A: Tensor | None = None,
    ) -> Tensor:
        return kv.attend(q_TAD, cache, batch, scale, window, sinks_A)


def pack(weight_ENK: Tensor, bias_EN: Tensor | None, *, paired: bool) -> Panels:
    """``paired`` puts row i and row N/2 + i into the same panel: gate and up of one feature."""
    count, out, into = weight_ENK.shape
    is_bf16 = weight_ENK.dtype is torch.bfloat16
    source = (weight_ENK if is_bf16 else weight_ENK.float()).contiguous()
    data = torch.empty(count, lanes(out, paired), into, dtype=source.dtype)
    _cpu.pack(source.data_ptr(), count, out, into, paired, is_bf16, data.data_ptr())
    if bias_EN is None:
        return Panels(count, data, None, data.data_ptr(), 0, is_bf16)
    assert bias_EN.shape == (count, out), bias_EN.shape
    bias = torch.empty(count, lanes(out, paired))
    flat = bias_EN.float().contiguous()
    _cpu.pack(flat.data_ptr(), count, out, 1, paired, False, bias.data_ptr())
    return Panels(count, data, bias, data.data_ptr(), bias.data_ptr(), is_bf16)


def lanes(out: int, paired: bool) -> int:
    """Rows with padding: whole panels of 32, or of 16 pairs."""
    rows, panel = (out // 2, PANEL // 2) if paired else (out, PANEL)
    return -(-rows // panel) * PANEL


def multiply(x: Tensor, weight: Linear, heads: int) -> Tensor:
    """[T, heads, N]; ``x`` is [T, K] or [T, heads, K]."""
    panels = cast("Panels", weight.data)
    assert x.shape[-1] == weight.in_features, (x.shape, weight.in_features)
    assert heads == panels.count, (heads, panels.count)
    x, rows = fp32(x), len(x)
    out = torch.empty(rows, heads, weight.out_features)
    _cpu.linear(
        x.data_ptr(),
        rows,
        heads,
        panels.data_at,
        panels.bias_at,
        weight.out_features,
        weight.in_features,
        panels.is_bf16,
        out.data_ptr(),
    )
    return out
