"""The fused operations spelled out in primitive ones: their meaning, and the oracle of natives.

Between primitives there are only copies, clamps and exact elementwise adds. Letters: see ``ops``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from moeserve.kernels.guesses import Guesser, GuessModule, composed_guesser
from moeserve.kernels.ops import (
    Activation,
    AttentionBatch,
    DenseWeights,
    GatedWeights,
    GqaWeights,
    HeadWeights,
    KvCache,
    Layer,
    Linear,
    MlaWeights,
    MlpWeights,
    MoeWeights,
    Ops,
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
from moeserve.kernels.wire import Combine


class Composed:
    """The fused half of an op table whose primitives ``self`` has."""

    replays = False

    def prepare(self, weights: W) -> Part[W]:
        return Part(weights, None)

    def new_step(
        self,
        rope: Rope,
        position_T: Tensor,
        slot_T: Tensor,
        attention: AttentionBatch,
    ) -> Step:
        return Step(len(position_T), rope, position_T, slot_T, attention, None)

    def dense(self: Ops, x_TH: Tensor, part: Part[DenseWeights]) -> None:
        dense(self, x_TH, part.weights)

    def route(self: Ops, x_TH: Tensor, part: Part[RouterWeights], step: Step) -> Routed:
        return route(self, x_TH, part.weights)

    def moe(self: Ops, x_TH: Tensor, part: Part[MoeWeights], routed: Routed) -> None:
        moe(self, x_TH, part.weights, routed)

    def shared(self: Ops, part: Part[MoeWeights], routed: Routed) -> Tensor | None:
        return shared(self, part.weights, routed.normed_TH)

    def stack_layers(self, layers: Sequence[Layer]) -> Stack:
        return Stack(tuple(layers), None)

    def forward_layers(
        self: Ops,
        x_TH: Tensor,
        stack: Stack,
        step: Step,
        caches: Sequence[KvCache],
        routed: list[Tensor] | None = None,
    ) -> None:
        chosen = forward_layers(self, x_TH, stack.layers, step, caches)
        if routed is not None:
            routed += chosen

    def embed(self, table_WH: Tensor, ids_T: Tensor) -> Tensor:
        return table_WH.index_select(0, ids_T).float()

    def head(self: Ops, x_TH: Tensor, rows_R: Tensor, part: Part[HeadWeights]) -> Tensor:
        return head(self, x_TH, rows_R, part.weights)

    def new_pass(
        self: Ops,
        trunk: Trunk,
        caches: Sequence[KvCache],
        token_ids_T: Tensor,
        position_T: Tensor,
        slot_T: Tensor,
        attention: AttentionBatch,
        rows_R: Tensor,
        states_TH: Tensor | None = None,
    ) -> Callable[[], Tensor]:
        def run() -> Tensor:
            x_TH = self.embed(trunk.embedding_WH, token_ids_T)
            step = self.new_step(trunk.rope, position_T, slot_T, attention)
            self.forward_layers(x_TH, trunk.stack, step, caches)
            if states_TH is not None:
                states_TH.copy_(x_TH)
            return self.head(x_TH, rows_R, trunk.head)

        return run

    def new_guesser(self: Ops, module: GuessModule, cache: KvCache, block_size: int) -> Guesser:
        return composed_guesser(self, module, cache, block_size)


@runtime_checkable
class NormsBeforeProducts(Protocol):
    """A table that has a norm and the rounding of its result to codes in one."""

    def norm_linear(self, x_TH: Tensor, norm_H: Tensor, eps: float, weight: Linear) -> Tensor: ...


def norm_linear(ops: Ops, x_TH: Tensor, norm_H: Tensor, eps: float, weight: Linear) -> Tensor:
    """The product of a norm that nothing else reads, to the bits of one after the other."""
    if isinstance(ops, NormsBeforeProducts):
        return ops.norm_linear(x_TH, norm_H, eps, weight)
    return ops.linear(ops.rms_norm(x_TH, norm_H, eps), weight)


GATE = RouterSpec(1, 1, "sigmoid", normalise=False)


def attend(ops: Ops, x_TH: Tensor, w: GqaWeights | MlaWeights, step: Step, cache: KvCache) -> None:
    if isinstance(w, GqaWeights):
        x_TH += _gqa(ops, x_TH, w, step, cache)
    else:
        x_TH += _mla(ops, x_TH, w, step, cache)


def _gqa(ops: Ops, x_TH: Tensor, w: GqaWeights, step: Step, cache: KvCache) -> Tensor:
    rows, wide, narrow = len(x_TH), w.heads * w.head_size, w.kv_heads * w.head_size
    qkv_TX = norm_linear(ops, x_TH, w.norm_H, w.eps, w.qkv)
    q_TX, k_TX, v_TX = torch.split(qkv_TX, [wide, narrow, narrow], -1)
    q_TX = _bounded(_normed(ops, q_TX.contiguous(), w.q_norm, w.eps), w.clip)
    k_TX = _bounded(_normed(ops, k_TX.contiguous(), w.k_norm, w.eps), w.clip)
    v_TX = _bounded(v_TX.contiguous(), w.clip)
    q_TAD = _rotate(ops, q_TX.view(rows, w.heads, w.head_size), step)
    k_TGD = _rotate(ops, k_TX.view(rows, w.kv_heads, w.head_size), step)
    ops.write_kv(cache, k_TGD, v_TX.view(rows, w.kv_heads, w.head_size), step.slot_T)
    out_TAD = ops.paged_attention(
        q_TAD, cache, step.attention, scale=w.scale, window=w.window, sinks_A=w.sinks_A
    )
    return ops.linear(out_TAD.flatten(1), w.o)


def _mla(ops: Ops, x_TH: Tensor, w: MlaWeights, step: Step, cache: KvCache) -> Tensor:
    rows, keys = len(x_TH), w.latent + w.rotated
    down_TX = norm_linear(ops, x_TH, w.norm_H, w.eps, w.down)
    q_TX, latent_TL, key_TR = torch.split(
        down_TX, [down_TX.shape[1] - keys, w.latent, w.rotated], -1
    )
    q_TX = q_TX.contiguous()
    if w.q_up is not None:
        assert w.q_norm is not None
        q_TX = norm_linear(ops, q_TX, w.q_norm, w.latent_eps, w.q_up)
    q_TAD = q_TX.view(rows, w.heads, w.nope + w.rotated)
    q_TAL = ops.linear_heads(q_TAD[..., : w.nope].contiguous(), w.into_latent)
    q_TAR = _rotate(ops, q_TAD[..., w.nope :].contiguous(), step)
    latent_TL = ops.rms_norm(latent_TL.contiguous(), w.latent_norm, w.latent_eps)
    key_T1R = _rotate(ops, key_TR[:, None].contiguous(), step)
    ops.write_kv(cache, torch.cat((latent_TL[:, None], key_T1R), -1), None, step.slot_T)
    out_TAL = ops.paged_attention(
        torch.cat((q_TAL, q_TAR), -1), cache, step.attention, scale=w.scale
    )
    return ops.linear(ops.linear_heads(out_TAL, w.out_of_latent).flatten(1), w.o)


def dense(ops: Ops, x_TH: Tensor, w: DenseWeights) -> None:
    x_TH += gated(ops, norm_linear(ops, x_TH, w.norm_H, w.eps, w.mlp.gate_up), w.mlp)


def mlp(ops: Ops, x_TH: Tensor, w: MlpWeights) -> Tensor:
    return gated(ops, ops.linear(x_TH, w.gate_up), w)


def gated(ops: Ops, gate_up_T2I: Tensor, w: MlpWeights) -> Tensor:
    return ops.linear(ops.glu(gate_up_T2I, Activation.SWIGLU), w.down)


def route(ops: Ops, x_TH: Tensor, w: RouterWeights) -> Routed:
    normed_TH = ops.rms_norm(x_TH, w.norm_H, w.eps)
    return Routed(normed_TH, *ops.route_topk(ops.linear(normed_TH, w.router), w.spec, w.bias_E))


def moe(ops: Ops, x_TH: Tensor, w: MoeWeights, routed: Routed) -> None:
    normed_TH = routed.normed_TH
    units_T = ops.units(x_TH, w.experts) if w.combine is Combine.EXACT else None
    out_TH = ops.moe_ffn(normed_TH, w.experts, routed.ids_TC, routed.weights_TC, units_T)
    shared_TH = shared(ops, w, normed_TH)
    x_TH += out_TH if shared_TH is None else out_TH + shared_TH


def shared(ops: Ops, w: MoeWeights, normed_TH: Tensor) -> Tensor | None:
    if isinstance(w.shared, MlpWeights):
        return mlp(ops, normed_TH, w.shared)
    if isinstance(w.shared, GatedWeights):
        ids_T1, weights_T1 = ops.route_topk(ops.linear(normed_TH, w.shared.gate), GATE)
        return ops.moe_ffn(normed_TH, w.shared.experts, ids_T1, weights_T1)
    return None


def forward_layers(
    ops: Ops, x_TH: Tensor, layers: Sequence[Layer], step: Step, caches: Sequence[KvCache]
) -> list[Tensor]:
    chosen: list[Tensor] = []
    for layer, cache in zip(layers, caches, strict=True):
        ops.attend(x_TH, layer.attention, step, cache)
        if isinstance(layer.mlp, Part):
            ops.dense(x_TH, layer.mlp)
            continue
        router, experts = layer.mlp
        routed = ops.route(x_TH, router, step)
        ops.moe(x_TH, experts, routed)
        chosen.append(routed.ids_TC.clone())
    return chosen


def head(ops: Ops, x_TH: Tensor, rows_R: Tensor, w: HeadWeights) -> Tensor:
    return norm_linear(ops, x_TH.index_select(0, rows_R), w.norm_H, w.eps, w.head)


def _normed(ops: Ops, x_TX: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x_TX
    return ops.rms_norm(x_TX.view(len(x_TX), -1, len(weight)), weight, eps).flatten(1)


def _bounded(x_TX: Tensor, clip: float | None) -> Tensor:
    return x_TX if clip is None else x_TX.clamp(-clip, clip)


def _rotate(ops: Ops, x_TAD: Tensor, step: Step) -> Tensor:
    cos_TR = step.rope.cos_WR.index_select(0, step.position_T)
    sin_TR = step.rope.sin_WR.index_select(0, step.position_T)
    return ops.rope(x_TAD, cos_TR, sin_TR, step.rope.interleaved)
