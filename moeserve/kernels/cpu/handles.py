"""Handles of a decoder's parts, made once; what a step then passes is a handle and numbers.

Shapes are checked here, when a model is loaded. A ``Part``'s data is a ``NativePart``, a ``Step``'s
a ``NativeStep``. Letters: see ``ops``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from moeserve.kernels.cpu import _cpu
from moeserve.kernels.ops import (
    AttentionBatch,
    DenseWeights,
    Experts,
    GatedWeights,
    GqaWeights,
    HeadWeights,
    Layer,
    Linear,
    MlaWeights,
    MlpWeights,
    MoeWeights,
    Part,
    PartWeights,
    Rope,
    Routed,
    RouterSpec,
    RouterWeights,
    Stack,
    Step,
)
from moeserve.kernels.wire import Combine

SCORING = {"softmax": 0, "sigmoid": 1, "topk_softmax": 2}
COMBINES = tuple(Combine)


@dataclass(frozen=True, slots=True)
class NativePart:
    """``run`` with ``handle``; ``memory`` is what the handle points to beside packed weights.

    ``top_ks`` are of the layers of a stack that route.
    """

    hidden: int
    handle: Any
    run: Callable[..., bool] | None
    top_ks: tuple[int, ...]
    memory: tuple[Tensor | None, ...]


@dataclass(frozen=True, slots=True)
class RouteBuffers:
    """What a route is written to, and the addresses of its three tensors."""

    routed: Routed
    at: tuple[int, int, int]


@dataclass(slots=True)
class NativeStep:
    """A forward pass. ``buffers`` serve one layer after the other, by hidden size and top-k."""

    handle: _cpu.Step
    buffers: dict[tuple[int, int], RouteBuffers] = field(default_factory=dict)


def native_part(weights: PartWeights) -> NativePart:
    if isinstance(weights, GqaWeights):
        return _gqa(weights)
    if isinstance(weights, MlaWeights):
        return _mla(weights)
    if isinstance(weights, MoeWeights):
        return NativePart(weights.experts.hidden, _moe(weights), None, (), ())
    norm = _vector(weights.norm_H)
    hidden, handle = len(norm), _norm(norm, weights.eps)
    if isinstance(weights, DenseWeights):
        _check_mlp(weights.mlp, hidden)
        return NativePart(hidden, _cpu.Dense(handle, _mlp(weights.mlp)), None, (), (norm,))
    if isinstance(weights, HeadWeights):
        assert weights.head.in_features == hidden, (weights.head, hidden)
        return NativePart(hidden, _cpu.Head(handle, matrix(weights.head)), None, (), (norm,))
    return _router(weights, norm, handle)


def new_step(rope: Rope, position_T: Tensor, slot_T: Tensor, attention: AttentionBatch) -> Step:
    rows, (table, pairs) = position_T.shape[0], rope.cos_WR.shape
    sequences, width = attention.blocks_SM.shape
    starts = attention.query_start_S1
    assert rope.sin_WR.shape == (table, pairs), (rope.sin_WR.shape, table, pairs)
    assert slot_T.shape == (rows,), (slot_T.shape, rows)
    assert starts.shape == (sequences + 1,), attention
    assert attention.context_S.shape == (sequences,), attention
    assert int(starts[-1]) == rows, (starts, rows)
    handle = _cpu.Step(
        address(position_T, torch.int64),
        rows,
        address(rope.cos_WR, torch.float32),
        address(rope.sin_WR, torch.float32),
        table,
        pairs,
        rope.interleaved,
        address(slot_T, torch.int64),
        address(starts, torch.int32),
        address(attention.context_S, torch.int32),
        address(attention.blocks_SM, torch.int32),
        sequences,
        width,
    )
    return Step(rows, rope, position_T, slot_T, attention, NativeStep(handle))


def embed_args(table_WH: Tensor) -> tuple[int, bool, int, int]:
    """A table as native calls take it: where it lies, whether it is bf16, its size, its width."""
    size, hidden = table_WH.shape
    assert table_WH.dtype in (torch.float32, torch.bfloat16), table_WH.dtype
    assert table_WH.is_contiguous(), table_WH.stride()
    return table_WH.data_ptr(), table_WH.dtype is torch.bfloat16, size, hidden


def stack_layers(layers: Sequence[Layer]) -> Stack:
    natives, sizes = [], set()
    for layer in layers:
        attention, mlp = layer.attention.data, layer.mlp
        if isinstance(mlp, Part):
            natives.append(_cpu.Layer(attention.handle, mlp.data.handle))
            sizes |= {attention.hidden, mlp.data.hidden}
        else:
            router, experts = (part.data for part in mlp)
            natives.append(_cpu.Layer(attention.handle, router.handle, experts.handle))
            sizes |= {attention.hidden, router.hidden, experts.hidden}
    assert len(sizes) == 1, f"layers of several widths: {sizes}"
    top_ks = tuple(x.mlp[0].weights.spec.top_k for x in layers if isinstance(x.mlp, tuple))
    return Stack(tuple(layers), NativePart(sizes.pop(), _cpu.Stack(natives), None, top_ks, ()))


def route_buffers(step: Step, hidden: int, top_k: int) -> RouteBuffers:
    buffers = cast("NativeStep", step.data).buffers
    found = buffers.get((hidden, top_k))
    if found is None:
        normed = torch.empty(step.rows, hidden)
        ids = torch.empty(step.rows, top_k, dtype=torch.int32)
        weights = torch.empty(step.rows, top_k)
        at = (normed.data_ptr(), ids.data_ptr(), weights.data_ptr())
        found = RouteBuffers(Routed(normed, ids, weights), at)
        buffers[hidden, top_k] = found
    return found


def rows_at(x: Tensor, rows: int, size: int) -> int:
    """Where an activation of this shape lies; for calls that are made in every layer."""
    assert x.dtype is torch.float32, x.dtype
    assert x.shape == (rows, size), (x.shape, rows, size)
    assert x.is_contiguous(), x.stride()
    return x.data_ptr()


def check_spec(spec: RouterSpec) -> None:
    assert 0 < spec.top_k <= spec.num_experts, spec
    assert spec.num_experts % spec.num_groups == 0, spec
    assert 0 < spec.topk_groups <= spec.num_groups, spec
    assert spec.group_score in ("top2", "max"), spec


def matrix(linear: Linear) -> _cpu.Matrix:
    return cast("_cpu.Matrix", linear.data.handle)


def _experts(experts: Experts) -> _cpu.Experts:
    return cast("_cpu.Experts", experts.data.handle)


def _gqa(w: GqaWeights) -> NativePart:
    hidden, wide, narrow = w.qkv.in_features, w.heads * w.head_size, w.kv_heads * w.head_size
    assert w.heads % w.kv_heads == 0, (w.heads, w.kv_heads)
    assert w.qkv.out_features == wide + 2 * narrow, (w.qkv.out_features, wide, narrow)
    assert (w.o.in_features, w.o.out_features) == (wide, hidden), w.o
    assert w.norm_H.shape == (hidden,), w.norm_H.shape
    assert w.q_norm is None or w.q_norm.shape in ((w.head_size,), (wide,)), w.q_norm
    assert w.k_norm is None or w.k_norm.shape in ((w.head_size,), (narrow,)), w.k_norm
    assert w.window is None or w.window > 0, w.window
    assert w.sinks_A is None or w.sinks_A.shape == (w.heads,), w.sinks_A
    norm = _vector(w.norm_H)
    q_norm, k_norm, sinks = (
        None if v is None else _vector(v) for v in (w.q_norm, w.k_norm, w.sinks_A)
    )
    handle = _cpu.Gqa(
        _norm(norm, w.eps),
        matrix(w.qkv),
        matrix(w.o),
        w.heads,
        w.kv_heads,
        w.head_size,
        w.scale,
        _norm(q_norm, w.eps),
        0 if q_norm is None else len(q_norm),
        _norm(k_norm, w.eps),
        0 if k_norm is None else len(k_norm),
        float("inf") if w.clip is None else w.clip,
        w.window or 0,
        0 if sinks is None else sinks.data_ptr(),
    )
    return NativePart(hidden, handle, _cpu.attend_gqa, (), (norm, q_norm, k_norm, sinks))


def _mla(w: MlaWeights) -> NativePart:
    hidden, head, value = w.down.in_features, w.nope + w.rotated, w.out_of_latent.out_features
    low = w.down.out_features - w.latent - w.rotated
    assert w.norm_H.shape == (hidden,), w.norm_H.shape
    assert w.latent_norm.shape == (w.latent,), w.latent_norm.shape
    assert (w.o.in_features, w.o.out_features) == (w.heads * value, hidden), w.o
    assert (w.into_latent.in_features, w.into_latent.out_features) == (w.nope, w.latent), w.latent
    assert w.out_of_latent.in_features == w.latent, (w.out_of_latent.in_features, w.latent)
    for heads in (w.into_latent, w.out_of_latent):
        assert heads.data.count == w.heads, (heads.data.count, w.heads)
    if w.q_up is None:
        assert low == w.heads * head, (low, w.heads, head)
    else:
        assert w.q_norm is not None, "low-rank queries have a norm"
        assert w.q_norm.shape == (low,), (w.q_norm.shape, low)
        assert (w.q_up.in_features, w.q_up.out_features) == (low, w.heads * head), w.q_up
    norm, latent_norm = _vector(w.norm_H), _vector(w.latent_norm)
    q_norm = None if w.q_norm is None else _vector(w.q_norm)
    handle = _cpu.Mla(
        _norm(norm, w.eps),
        matrix(w.down),
        _norm(q_norm, w.latent_eps),
        None if w.q_up is None else matrix(w.q_up),
        _norm(latent_norm, w.latent_eps),
        matrix(w.into_latent),
        matrix(w.out_of_latent),
        matrix(w.o),
        w.heads,
        w.nope,
        w.rotated,
        w.latent,
        w.scale,
    )
    return NativePart(hidden, handle, _cpu.attend_mla, (), (norm, q_norm, latent_norm))


def _router(w: RouterWeights, norm: Tensor, handle: _cpu.Norm) -> NativePart:
    spec, num = w.spec, w.router.out_features
    check_spec(spec)
    assert (w.router.in_features, num) == (len(norm), spec.num_experts), (w.router, spec)
    assert w.bias_E is None or w.bias_E.shape == (num,), w.bias_E
    bias = None if w.bias_E is None else _vector(w.bias_E)
    router = _cpu.Router(
        handle,
        matrix(w.router),
        spec.top_k,
        SCORING[spec.scoring],
        spec.normalise,
        spec.scale,
        spec.num_groups,
        spec.topk_groups,
        spec.group_score == "top2",
        0 if bias is None else bias.data_ptr(),
    )
    return NativePart(len(norm), router, None, (), (norm, bias))


def _moe(w: MoeWeights) -> _cpu.Mixture:
    combine = COMBINES.index(w.combine)
    if isinstance(w.shared, MlpWeights):
        _check_mlp(w.shared, w.experts.hidden)
        return _cpu.Mixture(combine, _experts(w.experts), _mlp(w.shared))
    if isinstance(w.shared, GatedWeights):
        gate, experts = w.shared.gate, w.shared.experts
        assert (gate.in_features, gate.out_features) == (w.experts.hidden, 1), gate
        assert (experts.num_experts, experts.hidden) == (1, w.experts.hidden), experts
        return _cpu.Mixture(combine, _experts(w.experts), matrix(gate), _experts(experts))
    return _cpu.Mixture(combine, _experts(w.experts))


def _check_mlp(w: MlpWeights, hidden: int) -> None:
    assert w.gate_up.in_features == w.down.out_features == hidden, (w, hidden)
    assert w.gate_up.out_features == 2 * w.down.in_features, w


def _mlp(w: MlpWeights) -> _cpu.Mlp:
    return _cpu.Mlp(matrix(w.gate_up), matrix(w.down))


def _norm(weight: Tensor | None, eps: float) -> _cpu.Norm:
    return _cpu.Norm(0 if weight is None else weight.data_ptr(), eps)


def _vector(x: Tensor) -> Tensor:
    return x.float().contiguous()


def address(x: Tensor, dtype: torch.dtype) -> int:
    """Where a contiguous tensor of this dtype lies."""
    assert x.dtype is dtype, (x.dtype, dtype)
    assert x.is_contiguous(), x.stride()
    return x.data_ptr()
