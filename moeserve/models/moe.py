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
from moeserve.kernels.matrix import Matrix
from moeserve.kernels.ops import Activation, Experts, Linear, Ops, RouterSpec
from moeserve.models.names import TensorNames
from moeserve.models.spec import DenseSpec, MoeSpec
from moeserve.models.weights import Weights, pick, stack


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
        gate = f"{mlp}.{names.shared_gate}"
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
    gate_up_2IH = w.rows([f"{prefix}.gate_proj", f"{prefix}.up_proj"], [inner, inner], hidden)
    return DenseMlp(w.ops.pack_linear(gate_up_2IH), w.linear(f"{prefix}.down_proj", hidden, inner))


def _load_gated(w: Weights, prefix: str, gate: str, inner: int, hidden: int) -> RoutedMlp:
    gate_up_2IH = w.rows([f"{prefix}.gate_proj", f"{prefix}.up_proj"], [inner, inner], hidden)
    down_HI = w.matrix(f"{prefix}.down_proj", hidden, inner)
    return RoutedMlp(
        router=w.ops.pack_linear(w.floats(gate, 1, hidden)),
        spec=RouterSpec(1, 1, "sigmoid", normalise=False),
        bias_E=None,
        experts=w.ops.pack_experts(pick(gate_up_2IH, None), pick(down_HI, None)),
    )


def _load_routed(w: Weights, mlp: str, spec: MoeSpec, names: TensorNames, hidden: int) -> RoutedMlp:
    router = f"{mlp}.{names.router}"
    num = spec.router.num_experts
    selection = f"{router}.{names.selection_bias}"
    return RoutedMlp(
        router=w.ops.pack_linear(
            w.floats(router, num, hidden),
            w.vector(f"{router}.bias", num) if spec.router_bias else None,
        ),
        spec=spec.router,
        bias_E=w.vector(selection, num) if spec.selection_bias else None,
        experts=_load_experts(w, f"{mlp}.experts", spec, names, hidden),
    )


def _load_experts(
    w: Weights, prefix: str, spec: MoeSpec, names: TensorNames, hidden: int
) -> Experts:
    num, inner, turned = spec.router.num_experts, spec.intermediate, names.transposed
    up, down = f"{prefix}.gate_up_proj", f"{prefix}.down_proj"
    if w.has_experts(up):
        gate_up_E2IH = w.experts(up, num, 2 * inner, hidden, transposed=turned, paired=turned)
        down_EHI = w.experts(down, num, hidden, inner, transposed=turned)
    else:
        gate_up_E2IH, down_EHI = _stack_experts(w, prefix, names, num, inner, hidden)
    gate_up_bias = down_bias = None
    if spec.expert_bias:
        gate_up_bias = w.exact(f"{up}_bias", num, 2 * inner)
        if turned:
            gate_up_bias = torch.cat((gate_up_bias[:, 0::2], gate_up_bias[:, 1::2]), 1)
        down_bias = w.exact(f"{down}_bias", num, hidden)
    return w.ops.pack_experts(gate_up_E2IH, down_EHI, gate_up_bias, down_bias, spec.activation)


def _stack_experts(
    w: Weights, prefix: str, names: TensorNames, num: int, inner: int, hidden: int
) -> tuple[Matrix, Matrix]:
    gate, up, down = names.expert_parts

    def gate_up(e: int) -> Matrix:
        return w.rows([f"{prefix}.{e}.{gate}", f"{prefix}.{e}.{up}"], [inner, inner], hidden)

    return (
        stack(num, gate_up),
        stack(num, lambda e: w.matrix(f"{prefix}.{e}.{down}", hidden, inner)),
    )
