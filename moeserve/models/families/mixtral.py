"""Mixtral: grouped queries, optionally in a sliding window, and the two best of eight experts."""

from __future__ import annotations

from moeserve.kernels.ops import RouterSpec
from moeserve.models.families.family import Family, head_dim, model, num_layers
from moeserve.models.fields import Fields
from moeserve.models.names import TensorNames
from moeserve.models.rope import read_rope
from moeserve.models.spec import GqaSpec, LayerSpec, ModelSpec, MoeSpec


def _read(c: Fields) -> ModelSpec:
    size = head_dim(c)
    heads = c.size("num_attention_heads")
    attention = GqaSpec(
        heads=heads,
        kv_heads=c.size("num_key_value_heads", default=heads),
        head_dim=size,
        scale=size**-0.5,
        window=c.optional_size("sliding_window"),
    )
    router = RouterSpec(
        num_experts=c.size("num_local_experts", "num_experts", default=8),
        top_k=c.size("num_experts_per_tok", default=2),
    )
    layer = LayerSpec(attention, MoeSpec(router, c.size("intermediate_size")))
    rope = read_rope(c, size, theta=1_000_000.0)
    return model(c, FAMILY.architecture, (layer,) * num_layers(c), rope, norm_eps=1e-5)


FAMILY = Family(
    "MixtralForCausalLM",
    "mixtral",
    _read,
    TensorNames(blocks=("block_sparse_moe", "mlp"), expert_parts=("w1", "w3", "w2")),
)
