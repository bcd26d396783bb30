"""The feed-forward half of a block: dense SwiGLU, or routed experts with a shared one beside them.

A gated shared expert (Qwen2) is a group of one expert under a sigmoid router of one: the same two
ops compute it. Letters as in ``kernels.ops``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moeserve.errors import CheckpointError
from moeserve.kernels.ops import Activation, Experts, Linear, Ops, RouterSpec
from moeserve.models.names import TensorNames
from moeserve.models.spec import DenseSpec, MoeSpec
from moeserve.models.weights import Weights


class RoutingObserver(Protocol):
    """Hears every routing decision; must copy what it keeps."""

    def record(self, layer: int, ids_TC: Tensor) -> None: ...


@dataclass(frozen=True, slots=True)
class DenseMlp:
    """down(silu(gate x) * up x)."""

    gate_up: Linear
    down: Linear

    def run(self, x_TH: Tensor, ops: Ops) -> Tensor:
        return ops.linear(ops.glu(ops.linear(x_TH, self.gate_up), Activation.SWIGLU), self.down)


@dataclass(frozen=True, slots=True)
class RoutedMlp:
    """Experts chosen by a router; ``bias`` steers the choice only."""

    router: Linear
    spec: RouterSpec
    bias_E: Tensor | None
    experts: Experts

    def run(
        self, x_TH: Tensor, ops: Ops, layer: int = 0, observer: RoutingObserver | None = None
    ) -> Tensor:
        logits_TE = ops.linear(x_TH, self.router)
        ids_TC, weights_TC = ops.route_topk(logits_TE, self.spec, self.bias_E)
        if observer is not None:
            observer.record(layer, ids_TC)
        return ops.moe_ffn(x_TH, self.experts, ids_TC, weights_TC)


@dataclass(frozen=True, slots=True)
class MoeMlp:
    """Routed experts plus what every token passes through."""

    routed: RoutedMlp
    shared: DenseMlp | RoutedMlp | None

    def run(self, x_TH: Tensor, ops: Ops, layer: int, observer: RoutingObserver | None) -> Tensor:
        out_TH = self.routed.run(x_TH, ops, layer, observer)
        return out_TH if self.shared is None else out_TH + self.shared.run(x_TH, ops)


def load_mlp(
    w: Weights, prefix: str, spec: DenseSpec | MoeSpec, names: TensorNames, hidden: int
) -> DenseMlp | MoeMlp:
    if isinstance(spec, DenseSpec):
        return _load_dense(w, f"{prefix}.mlp", spec.intermediate, hidden)
    mlp = _moe_prefix(w, prefix, names)
    routed = _load_routed(w, mlp, spec, names, hidden)
    if not spec.shared:
        return MoeMlp(routed, None)
    shared = f"{mlp}.{names.shared}"
    if spec.shared_gate:
        gate = f"{mlp}.{names.shared_gate}.weight"
        return MoeMlp(routed, _load_gated(w, shared, gate, spec.shared, hidden))
    return MoeMlp(routed, _load_dense(w, shared, spec.shared, hidden))


def _moe_prefix(w: Weights, prefix: str, names: TensorNames) -> str:
    tried = [f"{prefix}.{block}" for block in names.blocks]
    for block in tried:
        if w.has(f"{block}.{names.router}.weight"):
            return block
    listed = " or ".join(f"{block}.{names.router}.weight" for block in tried)
    raise CheckpointError(f"{w.checkpoint.path}: tensor {listed} is missing")


def _load_dense(w: Weights, prefix: str, inner: int, hidden: int) -> DenseMlp:
    w.require(f"{prefix}.gate_proj.weight", inner, hidden)
    gate_up_2IH = torch.empty(2 * inner, hidden, dtype=w.dtype)
    w.copy_into(gate_up_2IH[:inner], f"{prefix}.gate_proj.weight")
    w.copy_into(gate_up_2IH[inner:], f"{prefix}.up_proj.weight")
    return DenseMlp(w.ops.pack_linear(gate_up_2IH), w.linear(f"{prefix}.down_proj", hidden, inner))


def _load_gated(w: Weights, prefix: str, gate: str, inner: int, hidden: int) -> RoutedMlp:
    w.require(f"{prefix}.gate_proj.weight", inner, hidden)
    gate_up_12IH = torch.empty(1, 2 * inner, hidden, dtype=w.dtype)
    w.copy_into(gate_up_12IH[0, :inner], f"{prefix}.gate_proj.weight")
    w.copy_into(gate_up_12IH[0, inner:], f"{prefix}.up_proj.weight")
    down_1HI = w.matrix(f"{prefix}.down_proj.weight", hidden, inner)[None]
    return RoutedMlp(
        router=w.ops.pack_linear(w.exact(gate, 1, hidden)),
        spec=RouterSpec(1, 1, "sigmoid", normalise=False),
        bias_E=None,
        experts=w.ops.pack_experts(gate_up_12IH, down_1HI),
    )


def _load_routed(w: Weights, mlp: str, spec: MoeSpec, names: TensorNames, hidden: int) -> RoutedMlp:
    router = f"{mlp}.{names.router}"
    num = spec.router.num_experts
    selection = f"{router}.{names.selection_bias}"
    return RoutedMlp(
        router=w.ops.pack_linear(
            w.exact(f"{router}.weight", num, hidden),
            w.vector(f"{router}.bias", num) if spec.router_bias else None,
        ),
        spec=spec.router,
        bias_E=w.vector(selection, num) if spec.selection_bias else None,
        experts=_load_experts(w, f"{mlp}.experts", spec, names, hidden),
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
