"""Attention over a paged cache: grouped queries (GQA) and multi-head latent attention (MLA).

MLA is always absorbed: the cache holds one latent and one rotated key per token, shared by all
heads; queries are carried into the latent space and results out of it by small per-head matrices.
Prefill and decode take the same path, so that chunking cannot change a bit. Between ops there are
only copies. Letters as in ``kernels.ops``, L latent size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeserve.kernels.ops import Linear, Ops
from moeserve.models.batch import StepBatch
from moeserve.models.rope import RopeRows
from moeserve.models.spec import AttentionSpec, GqaSpec, MlaSpec, QkNorm
from moeserve.models.weights import Weights


@dataclass(frozen=True, slots=True)
class LayerCache:
    """The KV of one layer. MLA's ``v`` is a view of ``k``: its latent columns."""

    k_BPGD: Tensor
    v_BPGV: Tensor


def new_layer_cache(
    spec: AttentionSpec, num_blocks: int, block_size: int, dtype: torch.dtype
) -> LayerCache:
    if isinstance(spec, MlaSpec):
        width = spec.kv_lora + spec.rope
        latent = torch.zeros(num_blocks, block_size, 1, width, dtype=dtype)
        return LayerCache(latent, latent[..., : spec.kv_lora])
    shape = (num_blocks, block_size, spec.kv_heads, spec.head_dim)
    return LayerCache(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))


def kv_values_per_token(spec: AttentionSpec) -> int:
    if isinstance(spec, MlaSpec):
        return spec.kv_lora + spec.rope
    return 2 * spec.kv_heads * spec.head_dim


@dataclass(frozen=True, slots=True)
class Gqa:
    """Grouped-query attention of one layer; norms and sinks are there where the spec says so."""

    spec: GqaSpec
    eps: float
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    sinks_A: Tensor | None

    def run(
        self, x_TH: Tensor, step: StepBatch, rope: RopeRows, cache: LayerCache, ops: Ops
    ) -> Tensor:
        s, tokens = self.spec, len(x_TH)
        q_TX = self._bounded(self._normed(ops.linear(x_TH, self.q), self.q_norm, ops))
        k_TX = self._bounded(self._normed(ops.linear(x_TH, self.k), self.k_norm, ops))
        v_TX = self._bounded(ops.linear(x_TH, self.v))
        q_TAD = _rotate(q_TX.view(tokens, s.heads, s.head_dim), rope, ops)
        k_TGD = _rotate(k_TX.view(tokens, s.kv_heads, s.head_dim), rope, ops)
        ops.write_kv(cache.k_BPGD, k_TGD, step.slot_T)
        ops.write_kv(cache.v_BPGV, v_TX.view(tokens, s.kv_heads, s.head_dim), step.slot_T)
        out_TAD = ops.paged_attention(
            q_TAD,
            cache.k_BPGD,
            cache.v_BPGV,
            step.attention,
            scale=s.scale,
            window=s.window,
            sinks_A=self.sinks_A,
        )
        return ops.linear(out_TAD.flatten(1), self.o)

    def _normed(self, x_TX: Tensor, weight: Tensor | None, ops: Ops) -> Tensor:
        if weight is None:
            return x_TX
        if self.spec.qk_norm is QkNorm.ROW:
            return ops.rms_norm(x_TX, weight, self.eps)
        heads = x_TX.view(len(x_TX), -1, self.spec.head_dim)
        return ops.rms_norm(heads, weight, self.eps).flatten(1)

    def _bounded(self, x_TX: Tensor) -> Tensor:
        clip = self.spec.clip
        return x_TX if clip is None else x_TX.clamp(-clip, clip)


@dataclass(frozen=True, slots=True)
class Mla:
    """Absorbed latent attention of one layer; ``q_a`` and its norm only with low-rank queries."""

    spec: MlaSpec
    q_a: Linear | None
    q_a_norm: Tensor | None
    q_b: Linear
    kv_a: Linear
    kv_a_norm: Tensor
    into_latent: Linear
    out_of_latent: Linear
    o: Linear

    def run(
        self, x_TH: Tensor, step: StepBatch, rope: RopeRows, cache: LayerCache, ops: Ops
    ) -> Tensor:
        s = self.spec
        q_TAD = self._queries(x_TH, ops).view(len(x_TH), s.heads, s.nope + s.rope)
        q_TAL = ops.linear_heads(q_TAD[..., : s.nope].contiguous(), self.into_latent)
        q_TAR = _rotate(q_TAD[..., s.nope :].contiguous(), rope, ops)
        down_TX = ops.linear(x_TH, self.kv_a)
        latent_TL = down_TX[:, : s.kv_lora].contiguous()
        latent_TL = ops.rms_norm(latent_TL, self.kv_a_norm, s.latent_eps)
        key_T1R = _rotate(down_TX[:, None, s.kv_lora :].contiguous(), rope, ops)
        ops.write_kv(cache.k_BPGD, torch.cat((latent_TL[:, None], key_T1R), -1), step.slot_T)
        out_TAL = ops.paged_attention(
            torch.cat((q_TAL, q_TAR), -1),
            cache.k_BPGD,
            cache.v_BPGV,
            step.attention,
            scale=s.scale,
        )
        out_TAV = ops.linear_heads(out_TAL, self.out_of_latent)
        return ops.linear(out_TAV.flatten(1), self.o)

    def _queries(self, x_TH: Tensor, ops: Ops) -> Tensor:
        if self.q_a is None or self.q_a_norm is None:
            return ops.linear(x_TH, self.q_b)
        low = ops.rms_norm(ops.linear(x_TH, self.q_a), self.q_a_norm, self.spec.latent_eps)
        return ops.linear(low, self.q_b)


Attention = Gqa | Mla


def load_attention(
    w: Weights, prefix: str, spec: AttentionSpec, hidden: int, eps: float
) -> Attention:
    if isinstance(spec, MlaSpec):
        return _load_mla(w, prefix, spec, hidden)
    return _load_gqa(w, prefix, spec, hidden, eps)


def _load_gqa(w: Weights, prefix: str, s: GqaSpec, hidden: int, eps: float) -> Gqa:
    wide, narrow = s.heads * s.head_dim, s.kv_heads * s.head_dim
    q_norm = k_norm = None
    if s.qk_norm is not QkNorm.NONE:
        by_head = s.qk_norm is QkNorm.HEAD
        q_norm = w.vector(f"{prefix}.q_norm.weight", s.head_dim if by_head else wide)
        k_norm = w.vector(f"{prefix}.k_norm.weight", s.head_dim if by_head else narrow)
    return Gqa(
        spec=s,
        eps=eps,
        q=w.linear(f"{prefix}.q_proj", wide, hidden, bias=s.qkv_bias),
        k=w.linear(f"{prefix}.k_proj", narrow, hidden, bias=s.qkv_bias),
        v=w.linear(f"{prefix}.v_proj", narrow, hidden, bias=s.qkv_bias),
        o=w.linear(f"{prefix}.o_proj", hidden, wide, bias=s.out_bias),
        q_norm=q_norm,
        k_norm=k_norm,
        sinks_A=w.vector(f"{prefix}.sinks", s.heads) if s.sinks else None,
    )


def _load_mla(w: Weights, prefix: str, s: MlaSpec, hidden: int) -> Mla:
    queries = s.heads * (s.nope + s.rope)
    q_a = q_a_norm = None
    if s.q_lora is None:
        q_b = w.linear(f"{prefix}.q_proj", queries, hidden)
    else:
        q_a = w.linear(f"{prefix}.q_a_proj", s.q_lora, hidden, bias=s.bias)
        q_a_norm = w.vector(f"{prefix}.q_a_layernorm.weight", s.q_lora)
        q_b = w.linear(f"{prefix}.q_b_proj", queries, s.q_lora)
    rows = s.heads * (s.nope + s.value)
    # Read as floats: one of its halves is needed transposed, where scales per row cannot follow.
    kv_b = f"{prefix}.kv_b_proj"
    up_AXL = w.floats(kv_b, rows, s.kv_lora).view(s.heads, -1, s.kv_lora)
    into_latent_ALN = up_AXL[:, : s.nope].transpose(1, 2).contiguous()
    return Mla(
        spec=s,
        q_a=q_a,
        q_a_norm=q_a_norm,
        q_b=q_b,
        kv_a=w.linear(f"{prefix}.kv_a_proj_with_mqa", s.kv_lora + s.rope, hidden, bias=s.bias),
        kv_a_norm=w.vector(f"{prefix}.kv_a_layernorm.weight", s.kv_lora),
        into_latent=w.ops.pack_heads(w.held(kv_b, into_latent_ALN)),
        out_of_latent=w.ops.pack_heads(w.held(kv_b, up_AXL[:, s.nope :].contiguous())),
        o=w.linear(f"{prefix}.o_proj", hidden, s.heads * s.value, bias=s.bias),
    )


def _rotate(x_TAD: Tensor, rope: RopeRows, ops: Ops) -> Tensor:
    return ops.rope(x_TAD, rope.cos_TR, rope.sin_TR, rope.interleaved)
