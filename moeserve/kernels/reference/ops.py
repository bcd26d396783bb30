"""The op table in plain torch: the oracle of every other backend (law 7).

Slow and obvious. Every row is computed by itself, so that the result cannot depend on the batch:
a torch matmul of many rows may add in another order than that of one row, and a vectorised
``exp`` may round differently in the tail of a tensor. Letters: see ``ops``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from moeserve.kernels.fused import Composed, attend
from moeserve.kernels.matrix import Matrix, Source, joined, part_of, quantize_rows
from moeserve.kernels.ops import (
    Activation,
    AttentionBatch,
    Experts,
    GqaWeights,
    KvCache,
    KvShape,
    Linear,
    MlaWeights,
    Part,
    RouterSpec,
    Step,
)
from moeserve.kernels.reference import kv as reference_kv
from moeserve.kernels.reference.combine import exact_sum, limbs_of, sum_to_float
from moeserve.kernels.reference.kv import ReferenceKv
from moeserve.kernels.reference.products import product
from moeserve.kernels.reference.records import ReferenceRecords
from moeserve.kernels.reference.sampling import sample_rows
from moeserve.kernels.reference.wire import ReferenceWire
from moeserve.kernels.sampling import SampledRow, SamplingRow


class ReferenceOps(Composed, ReferenceKv, ReferenceRecords, ReferenceWire):
    """Plain torch, one row at a time."""

    name = "reference"
    device = torch.device("cpu")
    packing = "plain tensors, version 1"

    def pack_linear(self, weight_NK: Source, bias_N: Tensor | None = None) -> Linear:
        matrix, (out, into) = joined(weight_NK), weight_NK.shape
        if isinstance(matrix, Tensor):
            # Copies are aligned: off a boundary, torch may add in another order.
            kept = matrix if matrix.dtype is torch.bfloat16 else matrix.float()
            matrix = kept.clone(memory_format=torch.contiguous_format)
        return Linear(out, into, (matrix, None if bias_N is None else bias_N.float()))

    def pack_experts(
        self,
        gate_up_E2IH: Source,
        down_EHI: Source,
        gate_up_bias_E2I: Tensor | None = None,
        down_bias_EH: Tensor | None = None,
        activation: Activation = Activation.SWIGLU,
    ) -> Experts:
        num, hidden, inner = down_EHI.shape
        ups = self._pack_stack(gate_up_E2IH, gate_up_bias_E2I)
        downs = self._pack_stack(down_EHI, down_bias_EH)
        return Experts(num, hidden, inner, activation, (ups, downs))

    def _pack_stack(self, stack: Source, bias_EN: Tensor | None) -> list[Linear]:
        return [
            self.pack_linear(part_of(stack, e), None if bias_EN is None else bias_EN[e])
            for e in range(stack.shape[0])
        ]

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        rows = x_TH.float().reshape(-1, x_TH.shape[-1])
        if not len(rows):
            return x_TH.float()
        weight = weight_H.float()
        out = [row * torch.rsqrt(row.square().mean() + eps) * weight for row in rows]
        return torch.stack(out).view(x_TH.shape)

    def linear(self, x_TK: Tensor, weight: Linear) -> Tensor:
        matrix, bias = cast("tuple[Matrix, Tensor | None]", weight.data)
        return product(x_TK, matrix, bias)

    def quantize_per_token(self, x_TK: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_rows(x_TK)

    def pack_heads(self, weight_ANK: Source) -> Linear:
        _, out, into = weight_ANK.shape
        return Linear(out, into, self._pack_stack(weight_ANK, None))

    def linear_heads(self, x_TAK: Tensor, weight: Linear) -> Tensor:
        heads = cast("list[Linear]", weight.data)
        columns = [self.linear(x_TAK[:, a].contiguous(), w) for a, w in enumerate(heads)]
        return torch.stack(columns, 1)

    def glu(self, gate_up_T2I: Tensor, activation: Activation) -> Tensor:
        inner = gate_up_T2I.shape[-1] // 2
        out = gate_up_T2I.new_empty(len(gate_up_T2I), inner)
        for t, row in enumerate(gate_up_T2I):
            gate, up = row[:inner].clone(), row[inner:].clone()
            if activation is Activation.CLAMPED:
                gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
                out[t] = (up + 1) * (gate * torch.sigmoid(gate * 1.702))
            else:
                out[t] = gate * torch.sigmoid(gate) * up
        return out

    def rope(self, x_TAD: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool) -> Tensor:
        pairs = cos_TR.shape[-1]
        out = x_TAD.clone()
        turned = x_TAD[..., : 2 * pairs]
        cos, sin = cos_TR[:, None], sin_TR[:, None]
        if interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
            both = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        else:
            a, b = turned[..., :pairs], turned[..., pairs:]
            both = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        out[..., : 2 * pairs] = both
        return out

    def route_topk(
        self, logits_TE: Tensor, spec: RouterSpec, bias_E: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        ids = torch.empty(len(logits_TE), spec.top_k, dtype=torch.int32)
        weights = torch.empty(len(logits_TE), spec.top_k)
        for t, row in enumerate(logits_TE):
            ids[t], weights[t] = route_row(row.clone(), spec, bias_E)
        return ids, weights

    def moe_ffn(
        self,
        x_TH: Tensor,
        experts: Experts,
        ids_TC: Tensor,
        weights_TC: Tensor,
        units_T: Tensor | None = None,
    ) -> Tensor:
        ups, downs = cast("tuple[list[Linear], list[Linear]]", experts.data)
        out = torch.zeros(len(x_TH), experts.hidden)
        for t, (ids, weights) in enumerate(zip(ids_TC.tolist(), weights_TC, strict=True)):
            shares = []
            for e, weight in zip(ids, weights, strict=True):
                inner = self.glu(self.linear(x_TH[t : t + 1], ups[e]), experts.activation)
                shares.append(weight * self.linear(inner, downs[e])[0])
            if units_T is None:
                out[t] = sum(shares, torch.zeros(experts.hidden))
            else:
                unit, limbs = float(units_T[t]), limbs_of(experts)
                total = exact_sum(shares, unit, limbs, len(ids), experts.hidden)
                out[t] = sum_to_float(total, unit)
        return out

    def new_kv(self, shape: KvShape) -> KvCache:
        return reference_kv.new_cache(shape)

    def write_kv(self, cache: KvCache, k_TGD: Tensor, v_TGV: Tensor | None, slot_T: Tensor) -> None:
        reference_kv.write(cache, k_TGD, v_TGV, slot_T)

    def attend(
        self, x_TH: Tensor, part: Part[GqaWeights | MlaWeights], step: Step, cache: KvCache
    ) -> None:
        attend(self, x_TH, part.weights, step, cache)
        reference_kv.passes_of(cache).done += 1

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
        return reference_kv.attend(q_TAD, cache, batch, scale, window, sinks_A)

    def sample(
        self, logits_RV: Tensor, rows: Sequence[SamplingRow], eos_ids: frozenset[int]
    ) -> list[SampledRow]:
        return sample_rows(logits_RV, rows, eos_ids)


def route_row(logits_E: Tensor, spec: RouterSpec, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
    """ids [C] and weights [C] of one token."""
    # In fp64: in fp32 equal logits may get unequal scores, where one lies in the row's vector tail.
    if spec.scoring == "softmax":
        score = logits_E.double().softmax(-1).float()
    elif spec.scoring == "sigmoid":
        score = logits_E.double().sigmoid().float()
    else:
        score = logits_E
    choice = score if bias_E is None else score + bias_E
    if spec.num_groups > 1:
        grouped = choice.view(spec.num_groups, -1)
        best_of_group = grouped.sort(-1, descending=True).values
        width = 2 if spec.group_score == "top2" else 1
        groups = best_of_group[:, :width].sum(-1)
        keep = groups.sort(descending=True, stable=True).indices[: spec.topk_groups]
        mask = torch.full_like(grouped, -torch.inf)
        mask[keep] = 0.0
        choice = choice + mask.flatten()
    ids = choice.sort(descending=True, stable=True).indices[: spec.top_k]
    weights = score[ids]
    if spec.scoring == "topk_softmax":
        weights = weights.softmax(-1)
    elif spec.normalise:
        weights = weights / (weights.sum() + 1e-20)
    return ids.int(), weights * spec.scale
