"""Qwen2-MoE (and Qwen1.5-MoE): biased q, k and v, softmax routing, a gated shared expert."""

from __future__ import annotations

from moeserve.kernels.ops import RouterSpec
from moeserve.models.families.family import Family, head_dim, model
from moeserve.models.families.qwen3_moe import sparse_layers
from moeserve.models.fields import Fields
from moeserve.models.names import TensorNames
from moeserve.models.rope import read_rope
from moeserve.models.spec import DenseSpec, GqaSpec, LayerSpec, ModelSpec, MoeSpec


def _read(c: Fields) -> ModelSpec:
    c.only("use_sliding_window", False)
    size = head_dim(c)
    heads = c.size("num_attention_heads")
    attention = GqaSpec(
        heads=heads,
        kv_heads=c.size("num_key_value_heads", default=heads),
        head_dim=size,
        scale=size**-0.5,
        qkv_bias=c.flag("qkv_bias", default=True),
    )
    router = RouterSpec(
        num_experts=c.size("num_experts", "num_local_experts"),
        top_k=c.size("num_experts_per_tok"),
        normalise=c.flag("norm_topk_prob", default=False),
    )
    moe = MoeSpec(
        router,
        c.size("moe_intermediate_size"),
        shared=c.size("shared_expert_intermediate_size"),
        shared_gate=True,
    )
    layers = tuple(
        LayerSpec(attention, moe if sparse else DenseSpec(c.size("intermediate_size")))
        for sparse in sparse_layers(c)
    )
    return model(c, FAMILY.architecture, layers, read_rope(c, size))


FAMILY = Family("Qwen2MoeForCausalLM", "qwen2_moe", _read, TensorNames(shared="shared_expert"))
