"""The op table on a device by Triton kernels: CUDA, or the CPU in Triton's interpreter.

Weights and KV lie as the reference's do, in plain tensors on the device; so do their bytes. What is
a whole number is the reference's to the bit: quantised activations, products of codes and their
scales, routing, the exact combine, the cache. The rest is within rounding of it, and every row's
result is the same bits in any batch on one kind of device.

Activations, positions and slots live on ``device``; what a step brings from the host is copied once
(``new_step``), and only sampled tokens come back. ``fallbacks`` names what is done on the host.
Letters: see ``ops``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from moeserve.errors import ConfigError, InternalError
from moeserve.kernels.fused import Composed
from moeserve.kernels.fused import attend as composed_attend
from moeserve.kernels.fused import head as composed_head
from moeserve.kernels.fused import route as composed_route
from moeserve.kernels.matrix import Source, joined, part_of
from moeserve.kernels.ops import (
    Activation,
    AttentionBatch,
    Experts,
    GqaWeights,
    HeadWeights,
    KvCache,
    KvShape,
    Linear,
    MlaWeights,
    Part,
    RecordLayout,
    Rope,
    Routed,
    RouterSpec,
    RouterWeights,
    Step,
    Trunk,
    W,
)
from moeserve.kernels.records import MatrixForm
from moeserve.kernels.reference import kv as reference_kv
from moeserve.kernels.reference.kv import ReferenceKv
from moeserve.kernels.reference.records import ReferenceRecords
from moeserve.kernels.reference.sampling import sample_rows
from moeserve.kernels.sampling import SampledRow, SamplingRow
from moeserve.kernels.triton import attention, products
from moeserve.kernels.triton.attention import DeviceBatch
from moeserve.kernels.triton.device.lang import INTERPRETED
from moeserve.kernels.triton.experts import contributions, features_of, quantized
from moeserve.kernels.triton.graphs import (
    Capture,
    CudaCapture,
    StepData,
    StepGraphs,
    one_token_each,
)
from moeserve.kernels.triton.packing import MatrixGroup, Packed
from moeserve.kernels.triton.route import route_topk
from moeserve.kernels.triton.sampling import sample
from moeserve.kernels.triton.sums import chain, exact_rows, grid_bits
from moeserve.kernels.triton.wire import TritonWire

FALLBACKS = ("export_runs, import_runs: block by block on the host",)


class TritonOps(Composed, ReferenceKv, ReferenceRecords, TritonWire):
    """The backend of a CUDA device. ConfigError for a CPU where Triton does not interpret.

    Steps of one token a sequence are captured by ``capture`` and replayed: on a device by CUDA
    graphs, in the interpreter not unless it is given.
    """

    name = "triton"
    packing = "plain tensors, version 1"
    fallbacks = FALLBACKS

    def __init__(self, device: torch.device, capture: Capture | None = None) -> None:
        if device.type != "cuda" and not INTERPRETED:
            raise ConfigError(
                f"device={str(device)!r}: Triton's kernels run on a CUDA device; on a CPU only "
                "in its interpreter, for tests (TRITON_INTERPRET=1)"
            )
        if device.type == "cuda" and device.index is None:  # as tensors there say
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self._copies: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._capture = CudaCapture(device) if device.type == "cuda" else capture
        self.graphs: StepGraphs | None = None
        self.replays = self._capture is not None

    def here(self, tensor: Tensor) -> Tensor:
        """On the device, without gaps."""
        return tensor.to(self.device).contiguous()

    def fp32(self, tensor: Tensor) -> Tensor:
        return self.here(tensor.float())

    def resident(self, tensor: Tensor) -> Tensor:
        """A copy on the device of what does not change, made once while the original lives."""
        if tensor.device == self.device:
            return tensor
        if tensor not in self._copies:
            self._copies[tensor] = self.here(tensor)
        return cast("Tensor", self._copies[tensor])

    def pack_linear(self, weight_NK: Source, bias_N: Tensor | None = None) -> Linear:
        matrix, (out, into) = joined(weight_NK), weight_NK.shape
        if isinstance(matrix, Tensor):
            kept = matrix if matrix.dtype is torch.bfloat16 else matrix.float()
            matrix = kept.clone(memory_format=torch.contiguous_format)
        return Linear(out, into, Packed.on(self.device, matrix, bias_N))

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

    def _pack_stack(self, stack: Source, bias_EN: Tensor | None) -> MatrixGroup:
        return MatrixGroup.of(
            self.pack_linear(part_of(stack, e), None if bias_EN is None else bias_EN[e])
            for e in range(stack.shape[0])
        )

    def pack_heads(self, weight_ANK: Source) -> Linear:
        _, out, into = weight_ANK.shape
        return Linear(out, into, self._pack_stack(weight_ANK, None))

    def linear_over(self, memory: Tensor, form: MatrixForm) -> Linear:
        linear = super().linear_over(self._on_device(memory), form)
        if isinstance(linear.data, list):
            return replace(linear, data=MatrixGroup.of(self._over(part) for part in linear.data))
        return self._over(linear)

    def experts_over(
        self, memory: Tensor, layout: RecordLayout, slots: int, order: Sequence[int] | None = None
    ) -> Experts:
        experts = super().experts_over(self._on_device(memory), layout, slots, order)
        groups = tuple(MatrixGroup.of(map(self._over, part)) for part in experts.data)
        return replace(experts, data=groups)

    def _over(self, linear: Linear) -> Linear:
        return replace(linear, data=Packed.on(self.device, *linear.data))

    def _on_device(self, memory: Tensor) -> Tensor:
        if memory.device != self.device:
            raise InternalError(
                f"packed bytes in memory of {memory.device}: kernels on {self.device} read them "
                "there only"
            )
        return memory

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        assert weight_H.shape == x_TH.shape[-1:], weight_H.shape
        return products.rms_norm(self.fp32(x_TH), self.resident(weight_H).float(), eps)

    def linear(self, x_TK: Tensor, weight: Linear) -> Tensor:
        assert x_TK.shape[1] == weight.in_features, (x_TK.shape, weight.in_features)
        x_T1K = self.fp32(x_TK)[:, None]
        return products.multiply(x_T1K, weight.data.arrays, None, weight.out_features)[:, 0]

    def norm_linear(self, x_TH: Tensor, norm_H: Tensor, eps: float, weight: Linear) -> Tensor:
        """``linear`` of ``rms_norm``, to the bit; by codes the two round in one kernel."""
        arrays = weight.data.arrays
        if not arrays.of_codes:
            return self.linear(self.rms_norm(x_TH, norm_H, eps), weight)
        assert x_TH.shape[1] == weight.in_features == len(norm_H), (x_TH.shape, len(norm_H))
        norm = self.resident(norm_H).float()
        return products.norm_linear(self.fp32(x_TH), norm, eps, arrays, weight.out_features)

    def quantize_per_token(self, x_TK: Tensor) -> tuple[Tensor, Tensor]:
        return quantized(self.fp32(x_TK))

    def linear_heads(self, x_TAK: Tensor, weight: Linear) -> Tensor:
        assert x_TAK.shape[1] == len(weight.data), (x_TAK.shape, len(weight.data))
        group: MatrixGroup = weight.data
        x = self.fp32(x_TAK)
        return products.multiply(x, group.first, group.offsets, weight.out_features)

    def glu(self, gate_up_T2I: Tensor, activation: Activation) -> Tensor:
        return products.glu(self.fp32(gate_up_T2I), activation)

    def rope(self, x_TAD: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool) -> Tensor:
        assert cos_TR.shape == sin_TR.shape, (cos_TR.shape, sin_TR.shape)
        return products.rope(self.fp32(x_TAD), self.fp32(cos_TR), self.fp32(sin_TR), interleaved)

    def route_topk(
        self, logits_TE: Tensor, spec: RouterSpec, bias_E: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        bias = None if bias_E is None else self.fp32(bias_E)
        return route_topk(self.fp32(logits_TE), spec, bias)

    def moe_ffn(
        self,
        x_TH: Tensor,
        experts: Experts,
        ids_TC: Tensor,
        weights_TC: Tensor,
        units_T: Tensor | None = None,
    ) -> Tensor:
        assert x_TH.shape == (len(ids_TC), experts.hidden), x_TH.shape
        assert weights_TC.shape == ids_TC.shape, weights_TC.shape
        check_ids(ids_TC, experts)
        ids, weights = self.here(ids_TC.int()), self.fp32(weights_TC)
        y_PH = contributions(features_of(self.fp32(x_TH), experts.data[0].first), experts, ids)
        if units_T is None:
            return chain(y_PH, ids, weights)
        return exact_rows(y_PH, ids, weights, self.fp32(units_T), experts)

    def units(self, x_TH: Tensor, experts: Experts) -> Tensor:
        return products.units(self.fp32(x_TH), grid_bits(experts))

    def new_kv(self, shape: KvShape) -> KvCache:
        with self.device:
            return reference_kv.new_cache(shape)

    def write_kv(self, cache: KvCache, k_TGD: Tensor, v_TGV: Tensor | None, slot_T: Tensor) -> None:
        value = None if v_TGV is None else self.fp32(v_TGV)
        attention.write(cache, self.fp32(k_TGD), value, self.here(slot_T))

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
        if not isinstance(batch, DeviceBatch):
            batch = DeviceBatch.of(batch, self.device)
        sinks = None if sinks_A is None else self.fp32(sinks_A)
        return attention.attend(self.fp32(q_TAD), cache, batch, scale, window, sinks)

    def prepare(self, weights: W) -> Part[W]:
        return Part(self._moved(weights), None)

    def _moved(self, weights: W) -> W:
        """With its vectors on the device."""
        assert is_dataclass(weights)
        found: dict[str, Any] = {f.name: getattr(weights, f.name) for f in fields(weights)}
        moved = {n: self.fp32(t) for n, t in found.items() if isinstance(t, Tensor)}
        return cast("W", replace(cast("Any", weights), **moved))

    def new_step(
        self, rope: Rope, position_T: Tensor, slot_T: Tensor, attention: AttentionBatch
    ) -> Step:
        cos, sin = self.resident(rope.cos_WR), self.resident(rope.sin_WR)
        some = slot_T.is_cpu and len(slot_T) > 0
        least, most = (int(end) for end in slot_T.aminmax()) if some else (0, 0)
        return Step(
            len(position_T),
            Rope(cos, sin, rope.interleaved),
            self.here(position_T),
            self.here(slot_T),
            DeviceBatch.of(attention, self.device),
            StepData(least, most),
        )

    def attend(
        self, x_TH: Tensor, part: Part[GqaWeights | MlaWeights], step: Step, cache: KvCache
    ) -> None:
        slots = cache.shape.num_blocks * cache.shape.block_size
        if step.data.least_slot < 0 or step.data.most_slot >= slots:
            raise InternalError(f"attend: slots of {step.attention} do not fit {cache.shape}")
        composed_attend(self, x_TH, part.weights, step, cache)
        reference_kv.passes_of(cache).done += 1

    def route(self, x_TH: Tensor, part: Part[RouterWeights], step: Step) -> Routed:
        routed = composed_route(self, x_TH, part.weights)
        if step.data is None or step.data.live_T is None:
            return routed
        return replace(routed, ids_TC=torch.where(step.data.live_T[:, None], routed.ids_TC, -1))

    def new_pass(
        self,
        trunk: Trunk,
        caches: Sequence[KvCache],
        token_ids_T: Tensor,
        position_T: Tensor,
        slot_T: Tensor,
        attention: AttentionBatch,
        rows_R: Tensor,
        states_TH: Tensor | None = None,
    ) -> Callable[[], Tensor]:
        given = token_ids_T, position_T, slot_T, attention
        once = super().new_pass(trunk, caches, *given, rows_R, states_TH)
        if self._capture is None or states_TH is not None:
            return once
        if not one_token_each(attention, len(token_ids_T), rows_R):
            return once
        if self.graphs is None or not self.graphs.of(trunk, caches):
            self.graphs = StepGraphs(self, trunk, caches, self._capture)
        graphs = self.graphs

        def run() -> Tensor:
            logits_TN = graphs.run(*given)
            return once() if logits_TN is None else logits_TN

        return run

    def embed(self, table_WH: Tensor, ids_T: Tensor) -> Tensor:
        if (
            ids_T.is_cpu
            and len(ids_T)
            and not 0 <= int(ids_T.min()) <= int(ids_T.max()) < len(table_WH)
        ):
            raise InternalError(f"embed: a token id is not in 0..{len(table_WH) - 1}")
        return self.resident(table_WH).index_select(0, self.here(ids_T)).float()

    def head(self, x_TH: Tensor, rows_R: Tensor, part: Part[HeadWeights]) -> Tensor:
        rows = len(x_TH)
        if rows_R.is_cpu and len(rows_R) and not 0 <= int(rows_R.min()) <= int(rows_R.max()) < rows:
            raise InternalError(f"head: a row of {rows_R.tolist()} is not in 0..{rows - 1}")
        return composed_head(self, x_TH, self.here(rows_R), part.weights)

    def sample(
        self, logits_RV: Tensor, rows: Sequence[SamplingRow], eos_ids: frozenset[int]
    ) -> list[SampledRow]:
        if all(row.takes_best and row.allowed_B is None for row in rows):
            return sample_rows(logits_RV, rows, eos_ids, products.best_of_rows)
        return sample(logits_RV.contiguous(), rows, eos_ids)


def check_ids(ids_TC: Tensor, experts: Experts) -> None:
    """Of ids on the host: those on the device are the router's."""
    if ids_TC.is_cpu and ids_TC.numel():
        least, most = (int(end) for end in ids_TC.aminmax())
        if least < 0 or most >= experts.num_experts:
            raise InternalError(f"moe_ffn: an expert id is not in 0..{experts.num_experts - 1}")
