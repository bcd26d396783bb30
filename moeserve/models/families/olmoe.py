"""OLMoE: queries and keys normed over the whole row and clipped, softmax routing."""

from __future__ import annotations

from moeserve.kernels.ops import RouterSpec
from moeserve.models.families.family import Family, head_dim, model, num_layers
from moeserve.models.fields import Fields
from moeserve.models.rope import read_rope
from moeserve.models.spec import GqaSpec, LayerSpec, ModelSpec, MoeSpec, QkNorm


def _read(c: Fields) -> ModelSpec:
    size = head_dim(c)
    heads = c.size("num_attention_heads")
    bias = c.flag("attention_bias", default=False)
    attention = GqaSpec(
        heads=heads,
        kv_heads=c.size("num_key_value_heads", default=heads),
        head_dim=size,
        scale=size**-0.5,
        qk_norm=QkNorm.ROW,
        qkv_bias=bias,
        out_bias=bias,
        clip=c.optional_number("clip_qkv"),
    )
    router = RouterSpec(
        num_experts=c.size("num_experts", "num_local_experts", default=64),
        top_k=c.size("num_experts_per_tok", default=8),
        normalise=c.flag("norm_topk_prob", default=False),
    )
    layer = LayerSpec(attention, MoeSpec(router, c.size("intermediate_size")))
    layers = (layer,) * num_layers(c)
    return model(c, FAMILY.architecture, layers, read_rope(c, size), norm_eps=1e-5)


FAMILY = Family("OlmoeForCausalLM", "olmoe", _read)
