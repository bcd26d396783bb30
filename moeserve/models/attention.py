"""Attention of one layer: which tensors of a checkpoint make it, and the cache it needs.

MLA is always absorbed: the cache holds one latent and one rotated key per token, shared by all
heads; queries are carried into the latent space and results out of it by small per-head matrices.
Prefill and decode take the same path, so that chunking cannot change a bit. What is computed
stands in ``kernels.fused``. Letters as in ``kernels.ops``, L latent size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeserve.kernels.ops import GqaWeights, KvShape, MlaWeights
from moeserve.models.spec import AttentionSpec, GqaSpec, MlaSpec, QkNorm
from moeserve.models.weights import Weights

AttentionWeights = GqaWeights | MlaWeights


def kv_shape(spec: AttentionSpec, num_blocks: int, block_size: int, dtype: torch.dtype) -> KvShape:
    """MLA's value is the first part of its key: the latent."""
    if isinstance(spec, MlaSpec):
        width = spec.kv_lora + spec.rope
        return KvShape(num_blocks, block_size, 1, width, spec.kv_lora, dtype, latent=True)
    size = spec.head_dim
    return KvShape(num_blocks, block_size, spec.kv_heads, size, size, dtype)


def load_attention(
    w: Weights, prefix: str, spec: AttentionSpec, norm_H: Tensor, eps: float
) -> AttentionWeights:
    """``norm_H`` is the norm before it."""
    if isinstance(spec, MlaSpec):
        return _load_mla(w, prefix, spec, norm_H, eps)
    return _load_gqa(w, prefix, spec, norm_H, eps)


def _load_gqa(w: Weights, prefix: str, s: GqaSpec, norm_H: Tensor, eps: float) -> GqaWeights:
    hidden, wide, narrow = len(norm_H), s.heads * s.head_dim, s.kv_heads * s.head_dim
    q_norm = k_norm = None
    if s.qk_norm is not QkNorm.NONE:
        by_head = s.qk_norm is QkNorm.HEAD
        q_norm = w.vector(f"{prefix}.q_norm.weight", s.head_dim if by_head else wide)
        k_norm = w.vector(f"{prefix}.k_norm.weight", s.head_dim if by_head else narrow)
    sizes = {"q_proj": wide, "k_proj": narrow, "v_proj": narrow}
    qkv = w.rows([f"{prefix}.{n}" for n in sizes], list(sizes.values()), hidden)
    bias = None
    if s.qkv_bias:
        bias = w.vectors([f"{prefix}.{n}.bias" for n in sizes], list(sizes.values()))
    return GqaWeights(
        norm_H=norm_H,
        eps=eps,
        heads=s.heads,
        kv_heads=s.kv_heads,
        head_size=s.head_dim,
        scale=s.scale,
        qkv=w.ops.pack_linear(qkv, bias),
        o=w.linear(f"{prefix}.o_proj", hidden, wide, bias=s.out_bias),
        q_norm=q_norm,
        k_norm=k_norm,
        clip=s.clip,
        window=s.window,
        sinks_A=w.vector(f"{prefix}.sinks", s.heads) if s.sinks else None,
    )


def _load_mla(w: Weights, prefix: str, s: MlaSpec, norm_H: Tensor, eps: float) -> MlaWeights:
    hidden, queries, keys = len(norm_H), s.heads * (s.nope + s.rope), s.kv_lora + s.rope
    kv_a, q_up, q_norm, q_bias = f"{prefix}.kv_a_proj_with_mqa", None, None, None
    if s.q_lora is None:
        first, low = f"{prefix}.q_proj", queries
    else:
        first, low = f"{prefix}.q_a_proj", s.q_lora
        q_bias = f"{first}.bias"
        q_norm = w.vector(f"{prefix}.q_a_layernorm.weight", low)
        q_up = w.linear(f"{prefix}.q_b_proj", queries, low)
    down = w.rows([first, kv_a], [low, keys], hidden)
    bias = w.vectors([q_bias, f"{kv_a}.bias"], [low, keys]) if s.bias else None
    rows = s.heads * (s.nope + s.value)
    # Read as floats: one of its halves is needed transposed, where scales per row cannot follow.
    kv_b = f"{prefix}.kv_b_proj"
    up_AXL = w.floats(kv_b, rows, s.kv_lora).view(s.heads, -1, s.kv_lora)
    into_latent_ALN = up_AXL[:, : s.nope].transpose(1, 2).contiguous()
    return MlaWeights(
        norm_H=norm_H,
        eps=eps,
        heads=s.heads,
        nope=s.nope,
        rotated=s.rope,
        latent=s.kv_lora,
        scale=s.scale,
        latent_eps=s.latent_eps,
        down=w.ops.pack_linear(down, bias),
        latent_norm=w.vector(f"{prefix}.kv_a_layernorm.weight", s.kv_lora),
        into_latent=w.ops.pack_heads(w.held(kv_b, into_latent_ALN)),
        out_of_latent=w.ops.pack_heads(w.held(kv_b, up_AXL[:, s.nope :].contiguous())),
        o=w.linear(f"{prefix}.o_proj", hidden, s.heads * s.value, bias=s.bias),
        q_norm=q_norm,
        q_up=q_up,
    )
