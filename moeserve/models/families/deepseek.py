"""DeepSeek-V2, V2-Lite, V3 and R1: latent attention, shared experts, group-limited routing.

V2 scores experts by softmax and picks whole groups by their best expert; V3 by sigmoid and the
sum of the two best, steered by a bias, and adds a multi-token-prediction module.
"""

from __future__ import annotations

from moeserve.kernels.ops import RouterSpec
from moeserve.models.families.family import Family, model, num_layers
from moeserve.models.fields import Fields
from moeserve.models.rope import read_rope, softmax_scale
from moeserve.models.spec import DenseSpec, LayerSpec, MlaSpec, ModelSpec, MoeSpec

# The norms inside latent attention have their own epsilon, which no config sets.
_LATENT_EPS = 1e-6


def _read_v2(c: Fields) -> ModelSpec:
    c.only("topk_method", "greedy", "group_limited_greedy")
    c.only("scoring_func", "softmax")
    c.only("norm_topk_prob", False)
    c.only("mlp_bias", False)
    limited = c.text("topk_method", default="greedy") == "group_limited_greedy"
    router = RouterSpec(
        num_experts=c.size("n_routed_experts"),
        top_k=c.size("num_experts_per_tok"),
        scoring="softmax",
        normalise=False,
        scale=c.number("routed_scaling_factor", default=1.0),
        num_groups=c.size("n_group") if limited else 1,
        topk_groups=c.size("topk_group") if limited else 1,
        group_score="max",
    )
    return _read(c, V2.architecture, router, first_dense=0, interleaved=True)


def _read_v3(c: Fields) -> ModelSpec:
    c.only("topk_method", "noaux_tc")
    c.only("scoring_func", "sigmoid")
    router = RouterSpec(
        num_experts=c.size("n_routed_experts", "num_local_experts"),
        top_k=c.size("num_experts_per_tok"),
        scoring="sigmoid",
        normalise=c.flag("norm_topk_prob", default=True),
        scale=c.number("routed_scaling_factor", default=2.5),
        num_groups=c.size("n_group", default=8),
        topk_groups=c.size("topk_group", default=4),
        group_score="top2",
    )
    interleaved = c.flag("rope_interleave", default=True)
    return _read(c, V3.architecture, router, first_dense=3, interleaved=interleaved)


def _read(
    c: Fields, architecture: str, router: RouterSpec, *, first_dense: int, interleaved: bool
) -> ModelSpec:
    c.only("moe_layer_freq", 1)
    rope_dim, nope = c.size("qk_rope_head_dim"), c.size("qk_nope_head_dim")
    attention = MlaSpec(
        heads=c.size("num_attention_heads"),
        q_lora=c.optional_size("q_lora_rank"),
        kv_lora=c.size("kv_lora_rank"),
        nope=nope,
        rope=rope_dim,
        value=c.size("v_head_dim"),
        scale=softmax_scale(c, nope + rope_dim),
        latent_eps=_LATENT_EPS,
        bias=c.flag("attention_bias", default=False),
    )
    inner = c.size("moe_intermediate_size")
    sparse = LayerSpec(
        attention,
        MoeSpec(
            router,
            inner,
            shared=inner * c.count("n_shared_experts", default=0),
            selection_bias=router.scoring == "sigmoid",
        ),
    )
    dense = c.count("first_k_dense_replace", default=first_dense)
    layers = tuple(
        LayerSpec(attention, DenseSpec(c.size("intermediate_size"))) if i < dense else sparse
        for i in range(num_layers(c))
    )
    rope = read_rope(c, rope_dim, interleaved=interleaved)
    return model(c, architecture, layers, rope, mtp=sparse)


V2 = Family("DeepseekV2ForCausalLM", "deepseek_v2", _read_v2)
V3 = Family("DeepseekV3ForCausalLM", "deepseek_v3", _read_v3)
