"""GLM-4-MoE (4.5, 4.6): partly rotated heads, optional norm per head, DeepSeek-V3's routing."""

from __future__ import annotations

from moeserve.kernels.ops import RouterSpec
from moeserve.models.families.family import Family, head_dim, model, num_layers
from moeserve.models.fields import Fields
from moeserve.models.rope import read_rope
from moeserve.models.spec import DenseSpec, GqaSpec, LayerSpec, ModelSpec, MoeSpec, QkNorm


def _read(c: Fields) -> ModelSpec:
    size = head_dim(c)
    attention = GqaSpec(
        heads=c.size("num_attention_heads"),
        kv_heads=c.size("num_key_value_heads"),
        head_dim=size,
        scale=size**-0.5,
        qk_norm=QkNorm.HEAD if c.flag("use_qk_norm", default=False) else QkNorm.NONE,
        qkv_bias=c.flag("attention_bias", default=False),
    )
    router = RouterSpec(
        num_experts=c.size("n_routed_experts", "num_local_experts"),
        top_k=c.size("num_experts_per_tok"),
        scoring="sigmoid",
        normalise=c.flag("norm_topk_prob", default=True),
        scale=c.number("routed_scaling_factor", default=1.0),
        num_groups=c.size("n_group", default=1),
        topk_groups=c.size("topk_group", default=1),
    )
    inner = c.size("moe_intermediate_size")
    shared = inner * c.count("n_shared_experts", default=1)
    sparse = LayerSpec(attention, MoeSpec(router, inner, shared=shared, selection_bias=True))
    dense = c.count("first_k_dense_replace", default=1)
    layers = tuple(
        LayerSpec(attention, DenseSpec(c.size("intermediate_size"))) if i < dense else sparse
        for i in range(num_layers(c))
    )
    rope = read_rope(c, size, partial=0.5)
    return model(c, FAMILY.architecture, layers, rope, norm_eps=1e-5, mtp=sparse)


FAMILY = Family("Glm4MoeForCausalLM", "glm4_moe", _read)
