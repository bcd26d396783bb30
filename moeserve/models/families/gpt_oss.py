"""GPT-OSS: attention sinks, every other layer in a sliding window, biased clamped experts.

Loads as it is published, experts in MXFP4 (``formats.layouts``), and in bf16 conversions.
"""

from __future__ import annotations

from moeserve.kernels.ops import Activation, RouterSpec
from moeserve.models.families.family import Family, head_dim, model, num_layers
from moeserve.models.fields import Fields
from moeserve.models.names import TensorNames
from moeserve.models.rope import read_rope
from moeserve.models.spec import GqaSpec, LayerSpec, ModelSpec, MoeSpec

_SLIDING, _FULL = "sliding_attention", "full_attention"


def _read(c: Fields) -> ModelSpec:
    c.only("swiglu_alpha", 1.702)
    c.only("swiglu_limit", 7.0)
    router = RouterSpec(
        num_experts=c.size("num_local_experts", "num_experts"),
        top_k=c.size("num_experts_per_tok", "experts_per_token"),
        scoring="topk_softmax",
    )
    moe = MoeSpec(
        router,
        c.size("intermediate_size"),
        router_bias=True,
        expert_bias=True,
        activation=Activation.CLAMPED,
    )
    count = num_layers(c)
    kinds = c.texts("layer_types") or tuple((_SLIDING, _FULL)[i % 2] for i in range(count))
    if len(kinds) != count or not set(kinds) <= {_SLIDING, _FULL}:
        raise c.wrong("layer_types", kinds, f"{count} of {_SLIDING!r} or {_FULL!r}")
    window = c.size("sliding_window", default=128)
    layers = tuple(
        LayerSpec(_attention(c, window if kind == _SLIDING else None), moe) for kind in kinds
    )
    if c.table("rope_parameters") is None and c.table("rope_scaling") is None:
        raise c.missing(("rope_parameters", "rope_scaling"))
    rope = read_rope(c, head_dim(c), theta=150_000.0)
    return model(c, FAMILY.architecture, layers, rope, norm_eps=1e-5)


def _attention(c: Fields, window: int | None) -> GqaSpec:
    bias = c.flag("attention_bias", default=True)
    size = head_dim(c)
    return GqaSpec(
        heads=c.size("num_attention_heads"),
        kv_heads=c.size("num_key_value_heads"),
        head_dim=size,
        scale=size**-0.5,
        qkv_bias=bias,
        out_bias=bias,
        sinks=True,
        window=window,
    )


FAMILY = Family(
    "GptOssForCausalLM", "gpt_oss", _read, TensorNames(router="router", transposed=True)
)
