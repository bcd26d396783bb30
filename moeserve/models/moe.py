"""The feed-forward half of a block: dense SwiGLU, or routed experts with a shared one beside them.

What is computed stands in ``kernels.fused``: routing and mixing are two parts, for between them
tokens may be sent to other devices. Letters as in ``kernels.ops``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from moeserve.errors import CheckpointError, PlacementError
from moeserve.kernels.matrix import Pieces
from moeserve.kernels.ops import (
    DenseWeights,
    Experts,
    GatedWeights,
    MlpWeights,
    MoeWeights,
    Part,
    RouterWeights,
)
from moeserve.models.names import TensorNames
from moeserve.models.spec import DenseSpec, MoeSpec
from moeserve.models.weights import Weights, stacked


class RoutingObserver(Protocol):
    """Sees every routing decision; must copy what it keeps."""

    def record(self, layer: int, ids_TC: NDArray[Any]) -> None:
        """The experts of a step's tokens (int32, on the host) in one MoE layer."""
        ...


Mlp = Part[DenseWeights] | tuple[Part[RouterWeights], Part[MoeWeights]]


def load_mlp(
    w: Weights,
    layer: int,
    spec: DenseSpec | MoeSpec,
    names: TensorNames,
    norm_H: Tensor,
    eps: float,
) -> Mlp:
    """``norm_H`` is the norm before it; of routed experts, those that ``w.own`` names."""
    prefix, hidden = f"model.layers.{layer}", len(norm_H)
    if isinstance(spec, DenseSpec):
        mlp = _load_dense(w, f"{prefix}.mlp", spec.intermediate, hidden)
        return w.ops.prepare(DenseWeights(norm_H, eps, mlp))
    block = _moe_prefix(w, prefix, names)
    router = _load_router(w, f"{block}.{names.router}", spec, names, norm_H, eps)
    own = w.own.get(layer, range(spec.router.num_experts))
    experts = load_experts(w, prefix, spec, names, hidden, own)
    shared: MlpWeights | GatedWeights | None = None
    if spec.shared and spec.shared_gate:
        gate = f"{block}.{names.shared_gate}"
        shared = _load_gated(w, f"{block}.{names.shared}", gate, spec.shared, hidden)
    elif spec.shared:
        shared = _load_dense(w, f"{block}.{names.shared}", spec.shared, hidden)
    return w.ops.prepare(router), w.ops.prepare(MoeWeights(experts, shared, w.combine))


def _moe_prefix(w: Weights, prefix: str, names: TensorNames) -> str:
    tried = [f"{prefix}.{block}" for block in names.blocks]
    for block in tried:
        if w.has(f"{block}.{names.router}.weight"):
            return block
    listed = " or ".join(f"{block}.{names.router}.weight" for block in tried)
    raise CheckpointError(f"{w.checkpoint.path}: tensor {listed} is missing")


def _load_dense(w: Weights, prefix: str, inner: int, hidden: int) -> MlpWeights:
    gate_up_2IH = w.rows([f"{prefix}.gate_proj", f"{prefix}.up_proj"], [inner, inner], hidden)
    down = w.linear(f"{prefix}.down_proj", hidden, inner)
    return MlpWeights(w.ops.pack_linear(gate_up_2IH), down)


def _load_gated(w: Weights, prefix: str, gate: str, inner: int, hidden: int) -> GatedWeights:
    gate_up_2IH = w.rows([f"{prefix}.gate_proj", f"{prefix}.up_proj"], [inner, inner], hidden)
    down_HI = w.matrix(f"{prefix}.down_proj", hidden, inner)
    return GatedWeights(
        gate=w.ops.pack_linear(w.floats(gate, 1, hidden)),
        experts=w.ops.pack_experts(stacked(gate_up_2IH.blocks), stacked([[down_HI]])),
    )


def _load_router(
    w: Weights, prefix: str, spec: MoeSpec, names: TensorNames, norm_H: Tensor, eps: float
) -> RouterWeights:
    num = spec.router.num_experts
    return RouterWeights(
        norm_H=norm_H,
        eps=eps,
        router=w.ops.pack_linear(
            w.floats(prefix, num, len(norm_H)),
            w.vector(f"{prefix}.bias", num) if spec.router_bias else None,
        ),
        spec=spec.router,
        bias_E=w.vector(f"{prefix}.{names.selection_bias}", num) if spec.selection_bias else None,
    )


def load_experts(
    w: Weights, prefix: str, spec: MoeSpec, names: TensorNames, hidden: int, own: Sequence[int]
) -> Experts:
    """Routed experts ``own`` of a layer, in this order; the headers of all are checked."""
    num, inner, turned = spec.router.num_experts, spec.intermediate, names.transposed
    unknown = sorted({e for e in own if not 0 <= e < num})
    if unknown or not own:
        raise PlacementError(f"{prefix}: experts {unknown or 'none'} wanted of 0..{num - 1}")
    if (packed := w.routed(prefix, spec, hidden, own)) is not None:
        return packed
    block = f"{_moe_prefix(w, prefix, names)}.experts"
    up, down = f"{block}.gate_up_proj", f"{block}.down_proj"
    if w.has_experts(up):
        gate_up_E2IH = w.experts(up, num, 2 * inner, hidden, own, transposed=turned, paired=turned)
        down_EHI = w.experts(down, num, hidden, inner, own, transposed=turned)
    else:
        gate_up_E2IH, down_EHI = _stack_experts(w, block, names, spec, hidden, own)
    gate_up_bias = down_bias = None
    if spec.expert_bias:
        gate_up_bias = w.exact_rows(f"{up}_bias", own, num, 2 * inner)
        if turned:
            gate_up_bias = torch.cat((gate_up_bias[:, 0::2], gate_up_bias[:, 1::2]), 1)
        down_bias = w.exact_rows(f"{down}_bias", own, num, hidden)
    return w.ops.pack_experts(gate_up_E2IH, down_EHI, gate_up_bias, down_bias, spec.activation)


def _stack_experts(
    w: Weights, prefix: str, names: TensorNames, spec: MoeSpec, hidden: int, own: Sequence[int]
) -> tuple[Pieces, Pieces]:
    """The form of a layer's experts is that of all of them, so that which ones lie together decides
    nothing; others than ``own`` are looked at in the headers only."""
    (gate, up, down), inner, headers = names.expert_parts, spec.intermediate, w.headers()
    rows, downs = [], []
    for e in range(spec.router.num_experts):
        mine = e in own
        with nullcontext() if mine else torch.device("meta"):
            read = (w if mine else headers).matrix
            rows.append([read(f"{prefix}.{e}.{part}", inner, hidden) for part in (gate, up)])
            downs.append([read(f"{prefix}.{e}.{down}", hidden, inner)])
    return stacked(rows, own), stacked(downs, own)
