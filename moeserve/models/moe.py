"""The feed-forward half of a block: dense SwiGLU, or routed experts with a shared one beside them.

Routing and mixing are two calls: between them ids are seen, and later sent to other devices.
Letters as in ``kernels.ops``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moeserve.errors import CheckpointError
from moeserve.kernels.ops import (
    DenseWeights,
    Experts,
    GatedWeights,
    MlpWeights,
    MoeWeights,
    Ops,
    Part,
    RouterWeights,
    Step,
)
from moeserve.models.names import TensorNames
from moeserve.models.spec import DenseSpec, MoeSpec
from moeserve.models.weights import Weights


class RoutingObserver(Protocol):
    """Hears every routing decision; must copy what it keeps."""

    def record(self, layer: int, ids_TC: Tensor) -> None: ...


@dataclass(frozen=True, slots=True)
class MoeMlp:
    """Experts chosen by a router, and what every token passes through; ids go to an observer."""

    router: Part[RouterWeights]
    experts: Part[MoeWeights]

    def run(
        self, x_TH: Tensor, step: Step, ops: Ops, layer: int, observer: RoutingObserver | None
    ) -> None:
        routed = ops.route(x_TH, self.router, step)
        if observer is not None:
            observer.record(layer, routed.ids_TC)
        ops.mix(x_TH, self.experts, routed)


@dataclass(frozen=True, slots=True)
class DenseMlp:
    """One SwiGLU for every token."""

    part: Part[DenseWeights]

    def run(
        self, x_TH: Tensor, step: Step, ops: Ops, layer: int, observer: RoutingObserver | None
    ) -> None:
        ops.dense(x_TH, self.part)


def load_mlp(
    w: Weights,
    prefix: str,
    spec: DenseSpec | MoeSpec,
    names: TensorNames,
    norm_H: Tensor,
    eps: float,
) -> DenseMlp | MoeMlp:
    """``norm_H`` is the norm before it."""
    hidden = len(norm_H)
    if isinstance(spec, DenseSpec):
        mlp = _load_dense(w, f"{prefix}.mlp", spec.intermediate, hidden)
        return DenseMlp(w.ops.prepare(DenseWeights(norm_H, eps, mlp)))
    block = _moe_prefix(w, prefix, names)
    router = _load_router(w, f"{block}.{names.router}", spec, names, norm_H, eps)
    experts = _load_experts(w, f"{block}.experts", spec, names, hidden)
    shared: MlpWeights | GatedWeights | None = None
    if spec.shared and spec.shared_gate:
        gate = f"{block}.{names.shared_gate}.weight"
        shared = _load_gated(w, f"{block}.{names.shared}", gate, spec.shared, hidden)
    elif spec.shared:
        shared = _load_dense(w, f"{block}.{names.shared}", spec.shared, hidden)
    return MoeMlp(w.ops.prepare(router), w.ops.prepare(MoeWeights(experts, shared)))


def _moe_prefix(w: Weights, prefix: str, names: TensorNames) -> str:
    tried = [f"{prefix}.{block}" for block in names.blocks]
    for block in tried:
        if w.has(f"{block}.{names.router}.weight"):
            return block
    listed = " or ".join(f"{block}.{names.router}.weight" for block in tried)
    raise CheckpointError(f"{w.checkpoint.path}: tensor {listed} is missing")


def _load_dense(w: Weights, prefix: str, inner: int, hidden: int) -> MlpWeights:
    w.require(f"{prefix}.gate_proj.weight", inner, hidden)
    gate_up_2IH = torch.empty(2 * inner, hidden, dtype=w.dtype)
    w.copy_into(gate_up_2IH[:inner], f"{prefix}.gate_proj.weight")
    w.copy_into(gate_up_2IH[inner:], f"{prefix}.up_proj.weight")
    down = w.linear(f"{prefix}.down_proj", hidden, inner)
    return MlpWeights(w.ops.pack_linear(gate_up_2IH), down)


def _load_gated(w: Weights, prefix: str, gate: str, inner: int, hidden: int) -> GatedWeights:
    w.require(f"{prefix}.gate_proj.weight", inner, hidden)
    gate_up_12IH = torch.empty(1, 2 * inner, hidden, dtype=w.dtype)
    w.copy_into(gate_up_12IH[0, :inner], f"{prefix}.gate_proj.weight")
    w.copy_into(gate_up_12IH[0, inner:], f"{prefix}.up_proj.weight")
    down_1HI = w.matrix(f"{prefix}.down_proj.weight", hidden, inner)[None]
    return GatedWeights(
        gate=w.ops.pack_linear(w.exact(gate, 1, hidden)),
        experts=w.ops.pack_experts(gate_up_12IH, down_1HI),
    )


def _load_router(
    w: Weights, prefix: str, spec: MoeSpec, names: TensorNames, norm_H: Tensor, eps: float
) -> RouterWeights:
    num = spec.router.num_experts
    return RouterWeights(
        norm_H=norm_H,
        eps=eps,
        router=w.ops.pack_linear(
            w.exact(f"{prefix}.weight", num, len(norm_H)),
            w.vector(f"{prefix}.bias", num) if spec.router_bias else None,
        ),
        spec=spec.router,
        bias_E=w.vector(f"{prefix}.{names.selection_bias}", num) if spec.selection_bias else None,
    )


def _load_experts(
    w: Weights, prefix: str, spec: MoeSpec, names: TensorNames, hidden: int
) -> Experts:
    num, inner = spec.router.num_experts, spec.intermediate
    if not w.has(f"{prefix}.gate_up_proj"):
        gate_up_E2IH, down_EHI = _stack_experts(w, prefix, names, num, inner, hidden)
    elif names.transposed:
        gate_up_E2IH = _apart(w.matrix(f"{prefix}.gate_up_proj", num, hidden, 2 * inner).mT)
        down_EHI = w.matrix(f"{prefix}.down_proj", num, inner, hidden).mT.contiguous()
    else:
        gate_up_E2IH = w.matrix(f"{prefix}.gate_up_proj", num, 2 * inner, hidden)
        down_EHI = w.matrix(f"{prefix}.down_proj", num, hidden, inner)
    gate_up_bias = down_bias = None
    if spec.expert_bias:
        gate_up_bias = w.exact(f"{prefix}.gate_up_proj_bias", num, 2 * inner)
        gate_up_bias = _apart(gate_up_bias) if names.transposed else gate_up_bias
        down_bias = w.exact(f"{prefix}.down_proj_bias", num, hidden)
    return w.ops.pack_experts(gate_up_E2IH, down_EHI, gate_up_bias, down_bias, spec.activation)


def _stack_experts(
    w: Weights, prefix: str, names: TensorNames, num: int, inner: int, hidden: int
) -> tuple[Tensor, Tensor]:
    gate, up, down = names.expert_parts
    w.require(f"{prefix}.0.{gate}.weight", inner, hidden)
    gate_up_E2IH = torch.empty(num, 2 * inner, hidden, dtype=w.dtype)
    down_EHI = torch.empty(num, hidden, inner, dtype=w.dtype)
    for e in range(num):
        w.copy_into(gate_up_E2IH[e, :inner], f"{prefix}.{e}.{gate}.weight")
        w.copy_into(gate_up_E2IH[e, inner:], f"{prefix}.{e}.{up}.weight")
        w.copy_into(down_EHI[e], f"{prefix}.{e}.{down}.weight")
    return gate_up_E2IH, down_EHI


def _apart(x: Tensor) -> Tensor:
    """GPT-OSS alternates gate and up rows (dimension 1); we want all gates first."""
    return torch.cat((x[:, 0::2], x[:, 1::2]), 1)
