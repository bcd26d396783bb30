"""Qwen3-MoE: grouped queries with a norm per head, softmax routing, no shared expert."""

from __future__ import annotations

from moeserve.kernels.ops import RouterSpec
from moeserve.models.families.family import Family, head_dim, model, num_layers
from moeserve.models.fields import Fields
from moeserve.models.rope import read_rope
from moeserve.models.spec import DenseSpec, GqaSpec, LayerSpec, ModelSpec, MoeSpec, QkNorm


def _read(c: Fields) -> ModelSpec:
    c.only("use_sliding_window", False)
    bias = c.flag("attention_bias", default=False)
    size = head_dim(c)
    attention = GqaSpec(
        heads=c.size("num_attention_heads"),
        kv_heads=c.size("num_key_value_heads"),
        head_dim=size,
        scale=size**-0.5,
        qk_norm=QkNorm.HEAD,
        qkv_bias=bias,
        out_bias=bias,
    )
    router = RouterSpec(
        num_experts=c.size("num_experts", "num_local_experts"),
        top_k=c.size("num_experts_per_tok"),
        normalise=c.flag("norm_topk_prob", default=False),
    )
    moe = MoeSpec(router, c.size("moe_intermediate_size"))
    layers = tuple(
        LayerSpec(attention, moe if sparse else DenseSpec(c.size("intermediate_size")))
        for sparse in sparse_layers(c)
    )
    return model(c, FAMILY.architecture, layers, read_rope(c, size))


def sparse_layers(c: Fields) -> list[bool]:
    """Qwen's rule: every ``decoder_sparse_step``-th layer routes, but for ``mlp_only_layers``."""
    step = c.size("decoder_sparse_step", default=1)
    dense = c.ids("mlp_only_layers")
    return [i not in dense and (i + 1) % step == 0 for i in range(num_layers(c))]


FAMILY = Family("Qwen3MoeForCausalLM", "qwen3_moe", _read)
