"""The op table on one NPU: operators of torch_npu where they hold what ``ops`` says, torch's own
elementwise ones between them, and the host's table for the rest.

What an operator does not take falls back to the host's kernels by name (``fallbacks``: what, and
why), once in the log: int4 products, attention over KV that is not bf16 or has other sizes (its
cache then lies in host memory), routers outside of the gating operator. int8 products, quantised
rows, routing by given scores, units and the exact combine are the reference's bits, whatever else
is in the batch. Norms, activations, float products and fused attention are the operators': within
bounds, and batch-invariant only as far as a device was measured to be (docs/ascend.md).

Embeddings stay in host memory: their rows are gathered there. Letters: see ``ops``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moeserve.kernels.ascend import calls, grid, kv, matrices
from moeserve.kernels.ascend.dispatch import AscendDispatch
from moeserve.kernels.ascend.limits import (
    ATTENTION,
    GATED_LOGITS,
    INT4,
    KV_COPIES,
    MASK,
    ROUTING,
    WINDOWS,
    attention_lacks,
    heads_lack,
    routing_lacks,
)
from moeserve.kernels.ascend.matrices import DeviceExperts, Matrices
from moeserve.kernels.ascend.records import WithoutRecords
from moeserve.kernels.fused import Composed, attend, head
from moeserve.kernels.host_kv import attend_on_host, host_cache, write_on_host
from moeserve.kernels.host_kv import hosted as hosted_by
from moeserve.kernels.kv_runs import export_by_blocks, import_by_blocks
from moeserve.kernels.matrix import Source
from moeserve.kernels.ops import (
    Activation,
    AttentionBatch,
    Experts,
    GqaWeights,
    HeadWeights,
    KvCache,
    KvRuns,
    KvShape,
    Linear,
    MlaWeights,
    MoeWeights,
    Ops,
    Part,
    Rope,
    RouterSpec,
    Step,
    W,
)
from moeserve.kernels.sampling import SampledRow, SamplingRow
from moeserve.kernels.select import cpu_ops

# Fields of parts' weights that are plain vectors.
VECTORS = ("norm_H", "q_norm", "k_norm", "latent_norm", "sinks_A", "bias_E")


class AscendOps(Composed, AscendDispatch, WithoutRecords):
    """``host`` is the table of this host's CPU, which has what falls back."""

    name = "ascend"
    packing = "ascend, version 1"

    def __init__(
        self, device: torch.device, host: Ops | None = None, *, nz: bool | None = None
    ) -> None:
        self.device = device
        self._nz = calls.allow_nz(device) if nz is None else nz
        self.host: Ops = host or cpu_ops(None)
        self.fallbacks: dict[str, str] = {}
        self._ones_1 = torch.ones(1, device=device)
        unseen_MM = torch.ones(MASK, MASK, dtype=torch.bool, device=device)
        self._mask_MM = unseen_MM.triu(1)

    def fall_back(self, what: str, why: str) -> None:
        if what not in self.fallbacks:
            self.fallbacks[what] = why
            log = logging.getLogger("moeserve.kernels")
            log.warning("%s: the host's CPU takes its place, for %s", what, why)

    def _to_device(self, source: Source, bias: Tensor | None, *, stacked: bool) -> Matrices | None:
        return matrices.to_device(source, bias, self.device, stacked=stacked, nz=self._nz)

    def pack_linear(self, weight_NK: Source, bias_N: Tensor | None = None) -> Linear:
        out, into = weight_NK.shape
        found: Any = self._to_device(weight_NK, bias_N, stacked=False)
        if found is None:
            self.fall_back(*INT4)
            found = self.host.pack_linear(weight_NK, bias_N)
        return Linear(out, into, found)

    def pack_heads(self, weight_ANK: Source) -> Linear:
        _, out, into = weight_ANK.shape
        found: Any = self._to_device(weight_ANK, None, stacked=True)
        if found is None:
            self.fall_back(*INT4)
            found = self.host.pack_heads(weight_ANK)
        return Linear(out, into, found)

    def pack_experts(
        self,
        gate_up_E2IH: Source,
        down_EHI: Source,
        gate_up_bias_E2I: Tensor | None = None,
        down_bias_EH: Tensor | None = None,
        activation: Activation = Activation.SWIGLU,
    ) -> Experts:
        num, hidden, inner = down_EHI.shape
        ups = self._to_device(gate_up_E2IH, gate_up_bias_E2I, stacked=True)
        downs = self._to_device(down_EHI, down_bias_EH, stacked=True)
        if ups is None or downs is None:
            self.fall_back(*INT4)
            biases = gate_up_bias_E2I, down_bias_EH
            data: Any = self.host.pack_experts(gate_up_E2IH, down_EHI, *biases, activation)
        else:
            data = DeviceExperts(ups, downs)
        return Experts(num, hidden, inner, activation, data)

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        x = x_TH.float()
        if not x.numel():
            return x
        rows = x.contiguous() if x.dim() > 1 else x[None]
        return calls.rms_norm(rows, weight_H.float().to(self.device), eps).view(x.shape)

    def linear(self, x_TK: Tensor, weight: Linear) -> Tensor:
        if not len(x_TK):
            return x_TK.new_empty(0, weight.out_features)
        if not isinstance(weight.data, Matrices):
            return self.host.linear(x_TK.cpu(), weight.data).to(self.device)
        rows_TK, scale_T = matrices.rounded(x_TK, weight.data)
        return matrices.product(rows_TK.contiguous(), scale_T, weight.data, self._ones_1)

    def quantize_per_token(self, x_TK: Tensor) -> tuple[Tensor, Tensor]:
        return matrices.quantize(x_TK)

    def linear_heads(self, x_TAK: Tensor, weight: Linear) -> Tensor:
        tokens, heads, _ = x_TAK.shape
        if not tokens:
            return x_TAK.new_empty(0, heads, weight.out_features)
        if not isinstance(weight.data, Matrices):
            return self.host.linear_heads(x_TAK.cpu(), weight.data).to(self.device)
        x_RK = x_TAK.transpose(0, 1).reshape(heads * tokens, -1)
        rows_RK, scale_R = matrices.rounded(x_RK, weight.data)
        counts_A = torch.full((heads,), tokens, dtype=torch.int64, device=self.device)
        out_RN = matrices.grouped_product(rows_RK, scale_R, weight.data, counts_A, self._ones_1)
        return out_RN.view(heads, tokens, -1).transpose(0, 1).contiguous()

    def glu(self, gate_up_T2I: Tensor, activation: Activation) -> Tensor:
        if not len(gate_up_T2I):
            return gate_up_T2I.new_empty(0, gate_up_T2I.shape[-1] // 2)
        if activation is Activation.SWIGLU:
            return calls.swiglu(gate_up_T2I.contiguous())
        if calls.has("npu_clipped_swiglu"):
            return calls.clipped_swiglu(gate_up_T2I.contiguous())
        self.fall_back("clamped activation", "this torch_npu has no npu_clipped_swiglu")
        return self.host.glu(gate_up_T2I.cpu(), activation).to(self.device)

    def rope(self, x_TAD: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool) -> Tensor:
        pairs = cos_TR.shape[-1]
        turned, kept = x_TAD[..., : 2 * pairs], x_TAD[..., 2 * pairs :]
        cos, sin = cos_TR.to(self.device)[:, None], sin_TR.to(self.device)[:, None]
        if interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
            both = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        else:
            a, b = turned[..., :pairs], turned[..., pairs:]
            both = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        return torch.cat((both, kept), -1)

    def route_topk(
        self, logits_TE: Tensor, spec: RouterSpec, bias_E: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if (why := self._routing_lacks(spec, bias_E)) or not len(logits_TE):
            if why:
                self.fall_back(ROUTING, why)
            bias = None if bias_E is None else bias_E.cpu()
            ids_TC, weights_TC = self.host.route_topk(logits_TE.cpu(), spec, bias)
            return ids_TC.to(self.device), weights_TC.to(self.device)
        ids_TC, normed_TE = calls.gating_top_k(
            logits_TE.float().contiguous(),
            spec.top_k,
            bias_E=None if bias_E is None else bias_E.float().to(self.device),
            groups=spec.num_groups,
            topk_groups=spec.topk_groups,
            top2=spec.group_score == "top2",
            sigmoid=spec.scoring == "sigmoid",
        )
        weights_TC = normed_TE.gather(1, ids_TC.long())
        if spec.normalise or spec.scoring == "topk_softmax":
            total_T = weights_TC[:, 0]
            for c in range(1, spec.top_k):
                total_T = total_T + weights_TC[:, c]
            weights_TC = weights_TC / (total_T + 1e-20)[:, None]
        return ids_TC, weights_TC * spec.scale

    def _routing_lacks(self, spec: RouterSpec, bias_E: Tensor | None) -> str:
        if not calls.has("npu_moe_gating_top_k"):
            return "this torch_npu has no npu_moe_gating_top_k"
        if spec.scoring == "topk_softmax" and bias_E is not None:
            return GATED_LOGITS
        return routing_lacks(spec)

    def moe_ffn(
        self,
        x_TH: Tensor,
        experts: Experts,
        ids_TC: Tensor,
        weights_TC: Tensor,
        units_T: Tensor | None = None,
    ) -> Tensor:
        if not isinstance(experts.data, DeviceExperts):
            units = None if units_T is None else units_T.cpu()
            there = x_TH.cpu(), experts.data, ids_TC.cpu(), weights_TC.cpu(), units
            return self.host.moe_ffn(*there).to(self.device)
        if not len(x_TH):
            return x_TH.clone()
        rows_TH, scale_T = matrices.rounded(x_TH, experts.data.ups)
        weights_TC = weights_TC.to(self.device)
        y_TCH = self.contributions(rows_TH, scale_T, ids_TC.to(self.device), experts)
        if units_T is not None:
            units_T = units_T.to(self.device)
            total_TLH = grid.exact_sums(y_TCH, weights_TC, units_T, experts.data.limbs)
            return grid.sums_to_float(total_TLH, units_T)
        out_TH = torch.zeros_like(y_TCH[:, 0])
        for c in range(y_TCH.shape[1]):
            out_TH = out_TH + weights_TC[:, c, None] * y_TCH[:, c]
        return out_TH

    def contributions(
        self, rows_TH: Tensor, scale_T: Tensor | None, ids_TC: Tensor, experts: Experts
    ) -> Tensor:
        """fp32 [T, C, H] of rows as products take them; 0 where an id is the number of experts."""
        x_RH, place_R, counts_E, scale_R = calls.init_routing(
            rows_TH.contiguous(), scale_T, ids_TC.contiguous(), experts.num_experts
        )
        y_RH = self.in_order(x_RH, scale_R, counts_E, experts)
        here_R = place_R >= 0
        y_RH = y_RH[place_R.clamp(min=0).long()]
        y_RH = torch.where(here_R[:, None], y_RH, torch.zeros_like(y_RH))
        return y_RH.view(*ids_TC.shape, experts.hidden)

    def in_order(
        self, x_RH: Tensor, scale_R: Tensor | None, counts_E: Tensor, experts: Experts
    ) -> Tensor:
        """[R, H], what each row's expert makes of it; the first counts[0] rows are the first
        expert's, and so on. Rows as ``matrices.rounded`` gives them, or bf16; what is past the sum
        of the counts is garbage."""
        data: DeviceExperts = experts.data
        up_R2I = matrices.grouped_product(x_RH, scale_R, data.ups, counts_E, self._ones_1)
        inner_RI, inner_R = matrices.rounded(self.glu(up_R2I, experts.activation), data.downs)
        return matrices.grouped_product(inner_RI, inner_R, data.downs, counts_E, self._ones_1)

    def new_kv(self, shape: KvShape) -> KvCache:
        if why := self._attention_lacks(shape):
            self.fall_back(ATTENTION, why)
            return host_cache(self.host, shape)
        return kv.new_cache(shape, self.device)

    def _attention_lacks(self, shape: KvShape) -> str:
        for name in ("npu_fused_infer_attention_score_v2", "npu_scatter_pa_kv_cache"):
            if not calls.has(name):
                return f"this torch_npu has no {name}"
        return attention_lacks(shape)

    def kv_in_host(self, shape: KvShape) -> bool:
        return bool(self._attention_lacks(shape))

    def kv_bytes_per_block(self, shape: KvShape) -> int:
        if self._attention_lacks(shape):
            return self.host.kv_bytes_per_block(shape)
        place = shape.block_size * shape.kv_heads * shape.dtype.itemsize
        return place * sum(kv.widths(shape))

    def write_kv(self, cache: KvCache, k_TGD: Tensor, v_TGV: Tensor | None, slot_T: Tensor) -> None:
        if (hosted := hosted_by(cache)) is not None:
            write_on_host(self.host, hosted, k_TGD, v_TGV, slot_T)
        elif len(k_TGD):
            kv.write(cache, k_TGD, v_TGV, slot_T.to(self.device))

    def export_kv(self, cache: KvCache, blocks_N: Tensor, out_NX: Tensor | None = None) -> Tensor:
        if (hosted := hosted_by(cache)) is not None:
            return self.host.export_kv(hosted, blocks_N, out_NX)
        return kv.export_blocks(cache, blocks_N, out_NX)

    def import_kv(self, cache: KvCache, blocks_N: Tensor, data_NX: Tensor) -> None:
        if (hosted := hosted_by(cache)) is not None:
            self.host.import_kv(hosted, blocks_N, data_NX)
        else:
            kv.import_blocks(cache, blocks_N, data_NX)

    def export_runs(
        self, caches: Sequence[KvCache], blocks_B: Tensor, runs: KvRuns, out_X: Tensor
    ) -> Tensor:
        own, blocks = kv.checked_runs(self, caches, blocks_B, runs, out_X)
        return export_by_blocks(own, blocks, runs, out_X)

    def import_runs(
        self,
        caches: Sequence[KvCache],
        blocks_B: Tensor,
        runs: KvRuns,
        digests_RD: Tensor,
        data_X: Tensor,
    ) -> Tensor:
        own, blocks = kv.checked_runs(self, caches, blocks_B, runs, data_X)
        return import_by_blocks(own, blocks, runs, digests_RD, data_X)

    def kv_passes(self, cache: KvCache) -> int:
        return kv.data_of(cache).passes

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
        shape = cache.shape
        if not len(q_TAD):
            return q_TAD.new_empty(0, q_TAD.shape[1], shape.value_size)
        hosted = hosted_by(cache)
        if hosted is None:
            plain = window is None and sinks_A is None
            why = heads_lack(shape, q_TAD.shape[1]) if plain else WINDOWS
            if not why:
                return kv.attend(q_TAD, cache, batch, scale, self._mask_MM)
            self.fall_back(KV_COPIES, why)
            hosted, batch = kv.copy_to_host(cache, batch, self.host)
        return attend_on_host(
            self.host, q_TAD, hosted, batch, scale=scale, window=window, sinks_A=sinks_A
        )

    def attend(
        self, x_TH: Tensor, part: Part[GqaWeights | MlaWeights], step: Step, cache: KvCache
    ) -> None:
        attend(self, x_TH, part.weights, step, cache)
        kv.data_of(cache).passes += 1

    def prepare(self, weights: W) -> Part[W]:
        """Vectors go to the device."""
        moved: dict[str, Any] = {
            name: value.to(self.device)
            for name in VECTORS
            if isinstance(value := getattr(weights, name, None), Tensor)
        }
        own = replace(weights, **moved)
        host = self.host_part(own) if isinstance(own, MoeWeights) else None
        return Part(own, host)

    def new_step(
        self, rope: Rope, position_T: Tensor, slot_T: Tensor, attention: AttentionBatch
    ) -> Step:
        """Its ``rope`` has the step's own rows, on the device, of which each is taken in turn."""
        own = Rope(
            rope.cos_WR.index_select(0, position_T).to(self.device),
            rope.sin_WR.index_select(0, position_T).to(self.device),
            rope.interleaved,
        )
        rows = len(position_T)
        at_T = torch.arange(rows, device=self.device)
        return Step(rows, own, at_T, slot_T.to(self.device), attention, None)

    def embed(self, table_WH: Tensor, ids_T: Tensor) -> Tensor:
        return table_WH.index_select(0, ids_T).float().to(self.device)

    def head(self, x_TH: Tensor, rows_R: Tensor, part: Part[HeadWeights]) -> Tensor:
        return head(self, x_TH, rows_R.to(self.device), part.weights)

    def sample(
        self, logits_RV: Tensor, rows: Sequence[SamplingRow], eos_ids: frozenset[int]
    ) -> list[SampledRow]:
        return self.host.sample(logits_RV.cpu(), rows, eos_ids)
