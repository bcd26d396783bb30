"""The op table by native kernels: shapes are checked here, pointers go to ``_cpu``.

Every row's result is the same bits in any batch, with any number of threads, and on any
instruction set that has a fused multiply-add. Weights are repacked once, in the dtype they come
in (fp32 or bf16; others become fp32). Activations are fp32; a strided one is copied first.
Letters: see ``ops``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from moeserve.errors import InternalError
from moeserve.kernels.cpu import _cpu, forward, kv
from moeserve.kernels.cpu.guesser import NativeGuesser
from moeserve.kernels.cpu.handles import (
    SCORING,
    NativePart,
    check_spec,
    embed_args,
    native_part,
    new_step,
    route_buffers,
    rows_at,
    stack_layers,
)
from moeserve.kernels.cpu.kv import fp32, int32
from moeserve.kernels.cpu.memory import SharedPages, empty_bytes
from moeserve.kernels.cpu.packing import PackedExperts, Panels, pack
from moeserve.kernels.cpu.records import NativeRecords
from moeserve.kernels.cpu.wire import NativeWire
from moeserve.kernels.guesses import Guesser, GuessModule, composed_guesser
from moeserve.kernels.matrix import Source
from moeserve.kernels.ops import (
    Activation,
    AttentionBatch,
    DenseWeights,
    Experts,
    GqaWeights,
    HeadWeights,
    KvCache,
    KvRuns,
    KvShape,
    Layer,
    Linear,
    MlaWeights,
    MoeWeights,
    Part,
    Rope,
    Routed,
    RouterSpec,
    RouterWeights,
    Stack,
    Step,
    Trunk,
    W,
)
from moeserve.kernels.reference.sampling import sample_rows
from moeserve.kernels.sampling import SampledRow, SamplingRow


class CpuOps(NativeRecords, NativeWire):
    """The native backend. It owns the memory that small matrices share, and takes that of KV from
    ``kv_room``; instruction set and threads belong to ``_cpu``."""

    name = "cpu"
    device = torch.device("cpu")
    packing = "panels of 32 rows, version 1"
    replays = False  # its passes are kept, but are made anew where requests change

    def __init__(self, kv_room: kv.Room = empty_bytes) -> None:
        self._kv_room, self._pages = kv_room, SharedPages()

    def pack_linear(self, weight_NK: Source, bias_N: Tensor | None = None) -> Linear:
        out, into = weight_NK.shape
        return Linear(out, into, pack(weight_NK, bias_N, pages=self._pages))

    def pack_experts(
        self,
        gate_up_E2IH: Source,
        down_EHI: Source,
        gate_up_bias_E2I: Tensor | None = None,
        down_bias_EH: Tensor | None = None,
        activation: Activation = Activation.SWIGLU,
    ) -> Experts:
        num, hidden, inner = down_EHI.shape
        assert gate_up_E2IH.shape == (num, 2 * inner, hidden), gate_up_E2IH.shape
        up = pack(gate_up_E2IH, gate_up_bias_E2I, paired=True, pages=self._pages)
        down = pack(down_EHI, down_bias_EH, pages=self._pages)
        handle = _cpu.Experts(up.handle, down.handle, num, activation is Activation.CLAMPED, 0, 0)
        return Experts(num, hidden, inner, activation, PackedExperts(handle, up, down))

    def pack_heads(self, weight_ANK: Source) -> Linear:
        _, out, into = weight_ANK.shape
        return Linear(out, into, pack(weight_ANK, pages=self._pages))

    def linear(self, x_TK: Tensor, weight: Linear) -> Tensor:
        return multiply(x_TK, weight, heads=1).view(len(x_TK), weight.out_features)

    def linear_heads(self, x_TAK: Tensor, weight: Linear) -> Tensor:
        return multiply(x_TAK, weight, heads=x_TAK.shape[1])

    def moe_ffn(
        self,
        x_TH: Tensor,
        experts: Experts,
        ids_TC: Tensor,
        weights_TC: Tensor,
        units_T: Tensor | None = None,
    ) -> Tensor:
        packed = cast("PackedExperts", experts.data)
        rows, chosen = ids_TC.shape
        assert x_TH.shape == (rows, experts.hidden), x_TH.shape
        assert weights_TC.shape == ids_TC.shape, weights_TC.shape
        assert units_T is None or units_T.shape == (rows,), units_T
        x, ids, weights = fp32(x_TH), int32(ids_TC), fp32(weights_TC)
        units = None if units_T is None else fp32(units_T)
        out = torch.empty(rows, experts.hidden)
        if not _cpu.moe_ffn(
            x.data_ptr(),
            rows,
            packed.handle,
            ids.data_ptr(),
            weights.data_ptr(),
            chosen,
            0 if units is None else units.data_ptr(),
            out.data_ptr(),
        ):
            raise InternalError(f"moe_ffn: an expert id is not in 0..{experts.num_experts - 1}")
        return out

    def units(self, x_TH: Tensor, experts: Experts) -> Tensor:
        rows = x_TH.shape[0]
        assert x_TH.shape == (rows, experts.hidden), x_TH.shape
        x, out = fp32(x_TH), torch.empty(rows)
        _cpu.units(x.data_ptr(), rows, experts.data.handle, out.data_ptr())
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
        check_spec(spec)
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
        return kv.new_cache(shape, self._kv_room)

    def kv_bytes_per_block(self, shape: KvShape) -> int:
        return kv.bytes_per_block(shape)

    def write_kv(self, cache: KvCache, k_TGD: Tensor, v_TGV: Tensor | None, slot_T: Tensor) -> None:
        kv.write(cache, k_TGD, v_TGV, slot_T)

    def export_kv(self, cache: KvCache, blocks_N: Tensor, out_NX: Tensor | None = None) -> Tensor:
        return kv.export_blocks(cache, blocks_N, out_NX)

    def import_kv(self, cache: KvCache, blocks_N: Tensor, data_NX: Tensor) -> None:
        kv.import_blocks(cache, blocks_N, data_NX)

    def export_runs(
        self, caches: Sequence[KvCache], blocks_B: Tensor, runs: KvRuns, out_X: Tensor
    ) -> Tensor:
        return kv.export_runs(caches, blocks_B, runs, out_X)

    def import_runs(
        self,
        caches: Sequence[KvCache],
        blocks_B: Tensor,
        runs: KvRuns,
        digests_RD: Tensor,
        data_X: Tensor,
    ) -> Tensor:
        return kv.import_runs(caches, blocks_B, runs, digests_RD, data_X)

    def kv_passes(self, cache: KvCache) -> int:
        return _cpu.passes(cache.data.handle)

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

    def prepare(self, weights: W) -> Part[W]:
        return Part(weights, native_part(weights))

    def new_step(
        self,
        rope: Rope,
        position_T: Tensor,
        slot_T: Tensor,
        attention: AttentionBatch,
    ) -> Step:
        return new_step(rope, position_T, slot_T, attention)

    def attend(
        self, x_TH: Tensor, part: Part[GqaWeights | MlaWeights], step: Step, cache: KvCache
    ) -> None:
        native: NativePart = part.data
        assert native.run is not None, part
        x_at = rows_at(x_TH, step.rows, native.hidden)
        if not native.run(x_at, native.handle, step.data.handle, cache.data.handle):
            raise InternalError(
                f"attend: slots, contexts or blocks of {step.attention} do not fit {cache.shape}"
            )

    def dense(self, x_TH: Tensor, part: Part[DenseWeights]) -> None:
        native: NativePart = part.data
        rows = x_TH.shape[0]
        _cpu.dense(rows_at(x_TH, rows, native.hidden), rows, native.handle)

    def route(self, x_TH: Tensor, part: Part[RouterWeights], step: Step) -> Routed:
        native: NativePart = part.data
        buffers = route_buffers(step, native.hidden, part.weights.spec.top_k)
        x_at = rows_at(x_TH, step.rows, native.hidden)
        _cpu.route(x_at, step.rows, native.handle, *buffers.at)
        return buffers.routed

    def moe(self, x_TH: Tensor, part: Part[MoeWeights], routed: Routed) -> None:
        native: NativePart = part.data
        normed, ids, weights = routed.normed_TH, routed.ids_TC, routed.weights_TC
        rows, chosen = ids.shape
        assert ids.dtype is torch.int32, ids.dtype
        assert ids.is_contiguous(), ids.stride()
        if not _cpu.moe(
            rows_at(x_TH, rows, native.hidden),
            rows,
            native.handle,
            rows_at(normed, rows, native.hidden),
            ids.data_ptr(),
            chosen,
            rows_at(weights, rows, chosen),
        ):
            raise InternalError(f"moe: an expert id is not one of {part.weights.experts}")

    def stack_layers(self, layers: Sequence[Layer]) -> Stack:
        return stack_layers(layers)

    def forward_layers(
        self,
        x_TH: Tensor,
        stack: Stack,
        step: Step,
        caches: Sequence[KvCache],
        routed: list[Tensor] | None = None,
    ) -> None:
        native: NativePart = stack.data
        ids = torch.empty(step.rows * sum(native.top_ks), dtype=torch.int32)
        handles = [cache.data.handle for cache in caches]
        x_at = rows_at(x_TH, step.rows, native.hidden)
        if not _cpu.forward_layers(x_at, native.handle, step.data.handle, handles, ids.data_ptr()):
            raise InternalError(
                f"forward_layers: slots, contexts or blocks of {step.attention} do not fit the "
                f"{len(caches)} caches of {len(stack.layers)} layers"
            )
        if routed is not None:
            parts = torch.split(ids, [step.rows * k for k in native.top_ks])
            routed += [part.view(step.rows, -1) for part in parts]

    def embed(self, table_WH: Tensor, ids_T: Tensor) -> Tensor:
        assert ids_T.dtype is torch.int64, ids_T.dtype
        ids, out = ids_T.contiguous(), torch.empty(len(ids_T), table_WH.shape[1])
        if not _cpu.embed(*embed_args(table_WH), ids.data_ptr(), len(ids), out.data_ptr()):
            raise InternalError(f"embed: a token id is not in 0..{len(table_WH) - 1}")
        return out

    def head(self, x_TH: Tensor, rows_R: Tensor, part: Part[HeadWeights]) -> Tensor:
        native: NativePart = part.data
        assert rows_R.dtype is torch.int64, rows_R.dtype
        rows, wanted = x_TH.shape[0], rows_R.contiguous()
        out = torch.empty(len(wanted), part.weights.head.out_features)
        if not _cpu.head(
            rows_at(x_TH, rows, native.hidden),
            rows,
            wanted.data_ptr(),
            len(wanted),
            native.handle,
            out.data_ptr(),
        ):
            raise InternalError(f"head: a row of {rows_R.tolist()} is not in 0..{rows - 1}")
        return out

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
        inputs = token_ids_T, position_T, slot_T, attention
        return forward.new_pass(trunk, caches, *inputs, rows_R, states_TH)

    def new_guesser(self, module: GuessModule, cache: KvCache, block_size: int) -> Guesser:
        assert block_size == cache.shape.block_size, (block_size, cache.shape)
        if module.run is not None:
            return composed_guesser(self, module, cache, block_size)
        return NativeGuesser(module, cache)

    def sample(
        self, logits_RV: Tensor, rows: Sequence[SamplingRow], eos_ids: frozenset[int]
    ) -> list[SampledRow]:
        return sample_rows(logits_RV, rows, eos_ids, best_of_rows)


def best_of_rows(logits_RV: Tensor) -> list[int]:
    """As ``reference.sampling.best_of_rows``, by all threads."""
    assert logits_RV.dtype is torch.float32, logits_RV.dtype
    assert logits_RV.is_contiguous(), logits_RV.stride()
    return _cpu.best_of_rows(logits_RV.data_ptr(), *logits_RV.shape)


def multiply(x: Tensor, weight: Linear, heads: int) -> Tensor:
    """[T, heads, N]; ``x`` is [T, K] or [T, heads, K]."""
    panels = cast("Panels", weight.data)
    assert x.shape[-1] == weight.in_features, (x.shape, weight.in_features)
    assert heads == panels.count, (heads, panels.count)
    x, rows = fp32(x), len(x)
    out = torch.empty(rows, heads, weight.out_features)
    _cpu.linear(x.data_ptr(), rows, heads, panels.handle, out.data_ptr())
    return out
