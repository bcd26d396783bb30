"""Metadata of a GGUF file to what the model's ``config.json`` would say, family by family.

A file has only what differs between models of one architecture; the rest llama.cpp has in its code,
and so it stands here. fp32 numbers were decimal ones before (``header``). Sources: gguf's list of
keys, llama.cpp's converter and its models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moeserve.errors import CheckpointError
from moeserve.models.families import deepseek, glm4_moe, gpt_oss, mixtral, olmoe, qwen2_moe
from moeserve.models.families.family import Family
from moeserve.models.families.qwen3_moe import FAMILY as QWEN3_MOE
from moeserve.models.gguf.metadata import Metadata

Config = dict[str, Any]

_SOFTMAX, _SIGMOID = 1, 2
# What other models of an architecture may do, and those we serve do not; 0 is not set.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "router_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "attention.temperature_scale": (0.0,),
    "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
    "use_parallel_residual": (False,),
    "interleave_moe_layer_step": (0, 1),
    "moe_every_n_layers": (0, 1),
}
_NO_WINDOW: Mapping[str, tuple[object, ...]] = {"attention.sliding_window": (0,)}
_UNSCALED: Mapping[str, tuple[object, ...]] = {"expert_weights_scale": (0.0, 1.0)}


@dataclass(frozen=True, slots=True)
class Architecture:
    """``read`` gives the keys that are not common to all; ``turned`` says that the converter turned
    rows of queries and keys, for a rotary embedding of neighbours."""

    family: Callable[[Metadata], Family]
    read: Callable[[Metadata], Config]
    turned: bool = False


def architecture_of(m: Metadata) -> Architecture:
    """CheckpointError where no family of ours is meant."""
    found = ARCHITECTURES.get(m.architecture)
    if found is None or not m.has("expert_count"):
        dense = "without experts " if found is not None else ""
        raise CheckpointError(
            f"{m.file}: architecture {m.architecture!r} {dense}is not supported; supported, with "
            f"experts: {', '.join(ARCHITECTURES)}"
        )
    return found


def read_gguf_config(m: Metadata) -> Config:
    """As the family's ``config.json`` has it."""
    architecture = architecture_of(m)
    m.only(_NEUTRAL)
    family = architecture.family(m)
    config: Config = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": m.tensor("token_embd.weight").shape[0],
        "hidden_size": m.size("embedding_length"),
        "num_hidden_layers": m.layers() - m.count("nextn_predict_layers", 0),
        "num_attention_heads": m.size("attention.head_count"),
        "num_experts_per_tok": m.size("expert_used_count"),
        "rms_norm_eps": m.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": m.size("context_length"),
        "tie_word_embeddings": "output.weight" not in m.tensors,
        "rope_theta": m.number("rope.freq_base", default=10_000.0),
        "bos_token_id": m.fields.config.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(end_tokens(m)),
    }
    scaling = _rope_scaling(m)
    if scaling is not None:
        config["rope_scaling"] = scaling
    if any(not tensor.type.plain for tensor in m.tensors.values()):
        config["quantization_config"] = {"quant_method": "gguf"}
    return config | architecture.read(m)


def end_tokens(m: Metadata) -> tuple[int, ...]:
    """Those that end an answer: of a text, of a turn, of a message."""
    names = ("eos", "eot", "eom")
    ids = (i for name in names for i in m.fields.ids(f"tokenizer.ggml.{name}_token_id"))
    return tuple(dict.fromkeys(ids))


def _rope_scaling(m: Metadata) -> Config | None:
    default = "linear" if m.has("rope.scaling.factor") else "none"
    kind = m.text("rope.scaling.type", default)
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise CheckpointError(
            f"{m.file}: {m.key('rope.scaling.type')}={kind!r} is not supported (only none, linear, "
            f"yarn): use the model's safetensors"
        )
    found: Config = {"rope_type": kind, "factor": m.number("rope.scaling.factor")}
    if kind == "linear":
        return found
    found["original_max_position_embeddings"] = m.size("rope.scaling.original_context_length")
    others = {
        "rope.scaling.yarn_beta_fast": "beta_fast",
        "rope.scaling.yarn_beta_slow": "beta_slow",
        "rope.scaling.yarn_attn_factor": "attention_factor",
        "rope.scaling.attn_factor": "attention_factor",
    }
    return found | {theirs: m.number(ours) for ours, theirs in others.items() if m.has(ours)}


def _heads(m: Metadata) -> Config:
    """Of attention with grouped queries."""
    heads = m.size("attention.head_count")
    found = {"num_key_value_heads": m.count("attention.head_count_kv", heads)}
    if m.has("attention.key_length"):
        found["head_dim"] = m.size("attention.key_length")
        m.only({"attention.value_length": (found["head_dim"],)})
    return found


def _mixtral(m: Metadata) -> Config:
    m.only({**_NO_WINDOW, **_UNSCALED})
    return _heads(m) | {
        "num_local_experts": m.size("expert_count"),
        "intermediate_size": m.size("feed_forward_length"),
    }


def _qwen(m: Metadata) -> Config:
    """Layers without a router are dense."""
    m.only({**_NO_WINDOW, **_UNSCALED})
    dense = [i for i in range(m.layers()) if f"blk.{i}.ffn_gate_inp.weight" not in m.tensors]
    found = _heads(m) | {
        "num_experts": m.size("expert_count"),
        "moe_intermediate_size": m.size("expert_feed_forward_length"),
        "mlp_only_layers": dense,
        "use_sliding_window": False,
    }
    if dense:
        found["intermediate_size"] = m.size("feed_forward_length")
    return found


def _qwen2(m: Metadata) -> Config:
    return _qwen(m) | {
        "shared_expert_intermediate_size": m.size("expert_shared_feed_forward_length"),
        "qkv_bias": m.some_layer_has(".attn_q.bias"),
        "norm_topk_prob": False,
    }


def _qwen3(m: Metadata) -> Config:
    bias = m.some_layer_has(".attn_q.bias")
    return _qwen(m) | {"attention_bias": bias, "norm_topk_prob": True}


def _olmoe(m: Metadata) -> Config:
    m.only({**_NO_WINDOW, **_UNSCALED})
    found = _heads(m) | {
        "num_experts": m.size("expert_count"),
        "intermediate_size": m.size("feed_forward_length"),
        "norm_topk_prob": False,
        "attention_bias": m.some_layer_has(".attn_q.bias"),
    }
    if m.has("attention.clamp_kqv"):
        found["clip_qkv"] = m.number("attention.clamp_kqv")
    return found


def _gpt_oss(m: Metadata) -> Config:
    """llama.cpp rounds where YaRN's ramp begins and ends; the model does not."""
    m.only({**_UNSCALED, "attention.sliding_window_pattern": (2,)})
    scaling = _rope_scaling(m) or {"rope_type": "default"}
    return _heads(m) | {
        "num_local_experts": m.size("expert_count"),
        "intermediate_size": m.size("expert_feed_forward_length"),
        "sliding_window": m.size("attention.sliding_window"),
        "attention_bias": m.some_layer_has(".attn_q.bias"),
        "rope_scaling": scaling | {"truncate": False},
    }


def _experts_beside_dense(m: Metadata) -> Config:
    """Of DeepSeek and GLM."""
    found: Config = {
        "n_routed_experts": m.size("expert_count"),
        "n_shared_experts": m.count("expert_shared_count", 0),
        "moe_intermediate_size": m.size("expert_feed_forward_length"),
        "first_k_dense_replace": m.count("leading_dense_block_count", 0),
        "routed_scaling_factor": m.number("expert_weights_scale", default=1.0) or 1.0,
        "norm_topk_prob": m.flag("expert_weights_norm"),
        "n_group": m.count("expert_group_count", 1) or 1,
        "topk_group": m.count("expert_group_used_count", 1) or 1,
    }
    if found["first_k_dense_replace"]:
        found["intermediate_size"] = m.size("feed_forward_length")
    return found


def _glm4(m: Metadata) -> Config:
    m.only({**_NO_WINDOW, "expert_gating_func": (0, _SIGMOID)})
    found = _heads(m) | _experts_beside_dense(m)
    size = found.get("head_dim", m.size("embedding_length") // m.size("attention.head_count"))
    return found | {
        "partial_rotary_factor": m.size("rope.dimension_count") / size,
        "use_qk_norm": m.some_layer_has(".attn_q_norm.weight"),
        "attention_bias": m.some_layer_has(".attn_q.bias"),
    }


def _deepseek(m: Metadata) -> Config:
    """``key_length`` is that of the latent where the sizes of a head are given beside it."""
    m.only(_NO_WINDOW)
    m.only({"expert_gating_func": (0, _SOFTMAX, _SIGMOID)})
    of_head = "_mla" if m.has("attention.key_length_mla") else ""
    rope = m.size("rope.dimension_count")
    found = _experts_beside_dense(m) | {
        "q_lora_rank": m.size("attention.q_lora_rank") if m.has("attention.q_lora_rank") else None,
        "kv_lora_rank": m.size("attention.kv_lora_rank"),
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": m.size(f"attention.key_length{of_head}") - rope,
        "v_head_dim": m.size(f"attention.value_length{of_head}"),
        "rope_interleave": True,
    }
    scaling = _rope_scaling(m)
    if scaling is not None and m.has("rope.scaling.yarn_log_multiplier"):
        mscale = float(f"{10 * m.number('rope.scaling.yarn_log_multiplier'):.6g}")
        found["rope_scaling"] = scaling | {"mscale": mscale, "mscale_all_dim": mscale}
    if _deepseek_family(m) is deepseek.V2:
        limited = found["n_group"] > 1
        found["topk_method"] = "group_limited_greedy" if limited else "greedy"
    return found


def _deepseek_family(m: Metadata) -> Family:
    sigmoid = m.count("expert_gating_func", _SOFTMAX) == _SIGMOID
    return deepseek.V3 if sigmoid else deepseek.V2


ARCHITECTURES: Mapping[str, Architecture] = {
    "deepseek2": Architecture(_deepseek_family, _deepseek),
    "glm4moe": Architecture(lambda m: glm4_moe.FAMILY, _glm4),
    "gpt-oss": Architecture(lambda m: gpt_oss.FAMILY, _gpt_oss),
    "llama": Architecture(lambda m: mixtral.FAMILY, _mixtral, turned=True),
    "olmoe": Architecture(lambda m: olmoe.FAMILY, _olmoe),
    "qwen2moe": Architecture(lambda m: qwen2_moe.FAMILY, _qwen2),
    "qwen3moe": Architecture(lambda m: QWEN3_MOE, _qwen3),
}
