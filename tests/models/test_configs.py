"""What a ``config.json`` says becomes a spec: published spellings are read, doubts are errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moeserve.errors import CheckpointError
from moeserve.kernels.ops import Activation
from moeserve.models.families import FAMILIES, read_config
from moeserve.models.fields import Fields
from moeserve.models.spec import (
    DenseSpec,
    GqaSpec,
    MlaSpec,
    ModelSpec,
    MoeSpec,
    QkNorm,
    RopeScaling,
)

# As published on the hub before one object held all of rope; keys that say nothing left out.
QWEN3_30B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
DEEPSEEK_V2_LITE: dict[str, Any] = {
    **DEEPSEEK_V3,
    "architectures": ["DeepseekV2ForCausalLM"],
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "q_lora_rank": None,
    "rope_scaling": {**DEEPSEEK_V3["rope_scaling"], "mscale": 0.707, "mscale_all_dim": 0.707},
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_group": 1,
    "topk_method": "greedy",
    "vocab_size": 102400,
}
GPT_OSS_20B: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "vocab_size": 201088,
}
GLM_4_5_AIR: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "eos_token_id": [151329, 151336, 151338],
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "max_position_embeddings": 131072,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
    "use_qk_norm": False,
    "vocab_size": 151552,
}
MIXTRAL_8X7B: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "vocab_size": 32000,
}
PUBLISHED = [QWEN3_30B, DEEPSEEK_V3, DEEPSEEK_V2_LITE, GPT_OSS_20B, GLM_4_5_AIR, MIXTRAL_8X7B]
EACH_PUBLISHED = pytest.mark.parametrize("config", PUBLISHED, ids=lambda c: c["architectures"][0])


def spec_of(config: dict[str, Any]) -> ModelSpec:
    return read_config(Fields(config))[0]


def test_qwen3_30b_a3b_is_read_as_published() -> None:
    spec = spec_of(QWEN3_30B)

    assert len(spec.moe_layers) == len(spec.layers) == 48
    attention, mlp = spec.layers[0].attention, spec.layers[0].mlp
    assert isinstance(attention, GqaSpec)
    assert (attention.heads, attention.kv_heads, attention.head_dim) == (32, 4, 128)
    assert attention.qk_norm is QkNorm.HEAD
    assert attention.window is None
    assert isinstance(mlp, MoeSpec)
    assert (mlp.router.num_experts, mlp.router.top_k, mlp.router.normalise) == (128, 8, True)
    assert (spec.rope.theta, spec.rope.scaling) == (1e6, RopeScaling.DEFAULT)
    assert (spec.eos_ids, spec.bos_id) == ((151645,), 151643)


def test_deepseek_v3_is_read_as_published() -> None:
    spec = spec_of(DEEPSEEK_V3)

    assert spec.moe_layers == tuple(range(3, 61))
    attention, mlp = spec.layers[3].attention, spec.layers[3].mlp
    assert isinstance(attention, MlaSpec)
    # 0.1 ln 40 + 1 is YaRN's temperature; with equal mscales it acts on the softmax only.
    assert attention.scale == pytest.approx(192**-0.5 * 1.3688879454113936**2)
    assert spec.rope.magnitude == 1.0
    assert (spec.rope.dim, spec.rope.interleaved, spec.rope.factor) == (64, True, 40.0)
    assert isinstance(mlp, MoeSpec)
    assert (mlp.shared, mlp.selection_bias) == (2048, True)
    assert (mlp.router.scoring, mlp.router.num_groups, mlp.router.topk_groups) == ("sigmoid", 8, 4)
    assert spec.mtp == spec.layers[-1]


def test_deepseek_v2_lite_is_read_as_published() -> None:
    spec = spec_of(DEEPSEEK_V2_LITE)

    attention, mlp = spec.layers[1].attention, spec.layers[1].mlp
    assert isinstance(attention, MlaSpec)
    assert attention.q_lora is None
    assert isinstance(mlp, MoeSpec)
    assert (mlp.router.scoring, mlp.router.num_groups) == ("softmax", 1)
    assert (mlp.shared, mlp.selection_bias) == (2816, False)
    assert isinstance(spec.layers[0].mlp, DenseSpec)


def test_gpt_oss_is_read_as_published() -> None:
    spec = spec_of(GPT_OSS_20B)

    windows = [layer.attention.window for layer in spec.layers]
    assert windows == [128, None] * 12
    mlp = spec.layers[0].mlp
    assert isinstance(mlp, MoeSpec)
    assert (mlp.activation, mlp.router.scoring) == (Activation.CLAMPED, "topk_softmax")
    assert spec.rope.magnitude == pytest.approx(1.3465735902799727)
    assert not spec.rope.truncate


def test_glm_4_5_air_is_read_as_published() -> None:
    spec = spec_of(GLM_4_5_AIR)

    assert (spec.rope.dim, spec.rope.theta) == (64, 1e6)
    attention = spec.layers[0].attention
    assert isinstance(attention, GqaSpec)
    assert (attention.qk_norm, attention.qkv_bias, attention.out_bias) == (
        QkNorm.NONE,
        True,
        False,
    )
    assert spec.eos_ids == (151329, 151336, 151338)


@pytest.mark.parametrize(
    "family", ["deepseek_v3", "gpt_oss", "glm4_moe", "mixtral_llama3", "olmoe_linear", "qwen2_moe"]
)
@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_the_older_spelling_of_rope_means_the_same(
    family: str, kind: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    new = json.loads((tiny_checkpoint(family) / "config.json").read_text())
    old = dict(new)
    scaling = dict(old.pop("rope_parameters"))
    old["rope_theta"] = scaling.pop("rope_theta")
    old["partial_rotary_factor"] = scaling.pop("partial_rotary_factor", None)
    scaling[kind] = scaling.pop("rope_type")
    old["rope_scaling"] = scaling

    assert spec_of(old) == spec_of(new)


def test_dynamic_scaling_is_none_within_the_positions_we_serve() -> None:
    stretched = {**MIXTRAL_8X7B, "rope_scaling": {"type": "dynamic", "factor": 4.0}}

    assert spec_of(stretched) == spec_of(MIXTRAL_8X7B)


def test_a_model_type_stands_in_for_missing_architectures() -> None:
    anonymous = {**MIXTRAL_8X7B, "architectures": None, "model_type": "mixtral"}

    assert spec_of(anonymous) == spec_of(MIXTRAL_8X7B)
    with pytest.raises(CheckpointError, match="model_type 'gemma' is not supported"):
        spec_of({"model_type": "gemma"})


def test_every_architecture_and_model_type_is_claimed_once() -> None:
    assert len({f.architecture for f in FAMILIES}) == len(FAMILIES)
    assert len({f.model_type for f in FAMILIES}) == len(FAMILIES)


@EACH_PUBLISHED
@pytest.mark.parametrize(
    "key", ["hidden_size", "vocab_size", "num_hidden_layers", "max_position_embeddings"]
)
def test_a_missing_key_is_named(config: dict[str, Any], key: str) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: key {key} is missing"):
        spec_of({k: v for k, v in config.items() if k != key})


@EACH_PUBLISHED
@pytest.mark.parametrize("value", [0, -3, 1.5, "4096", True, [4096], 1 << 40])
def test_a_size_that_is_none_is_named(config: dict[str, Any], value: object) -> None:
    with pytest.raises(CheckpointError, match=r"hidden_size=.*expected an integer"):
        spec_of({**config, "hidden_size": value})


def yarn(**changes: float) -> dict[str, object]:
    return {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 64, **changes}


@pytest.mark.parametrize(
    ("config", "changes", "said"),
    [
        (MIXTRAL_8X7B, {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        (QWEN3_30B, {"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        (DEEPSEEK_V3, {"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported"),
        (DEEPSEEK_V3, {"scoring_func": "softmax"}, "scoring_func='softmax' is not supported"),
        (DEEPSEEK_V2_LITE, {"topk_method": "noaux_tc"}, "topk_method='noaux_tc' is not"),
        (DEEPSEEK_V2_LITE, {"norm_topk_prob": True}, "norm_topk_prob=True is not supported"),
        (GPT_OSS_20B, {"swiglu_limit": 9.0}, "swiglu_limit=9.0 is not supported"),
        (GPT_OSS_20B, {"rope_scaling": None}, "rope_parameters or rope_scaling is missing"),
        (GPT_OSS_20B, {"layer_types": ["full_attention"]}, "layer_types=.*expected 24 of"),
        (GPT_OSS_20B, {"layer_types": ["chunked"] * 24}, "layer_types=.*expected 24 of"),
        (MIXTRAL_8X7B, {"rope_scaling": {"type": "longrope"}}, "rope_type='longrope' is not"),
        (MIXTRAL_8X7B, {"rope_scaling": {"type": "linear"}}, "rope_scaling: key factor is missing"),
        (MIXTRAL_8X7B, {"rope_scaling": "yarn"}, "rope_scaling='yarn': expected an object"),
        (MIXTRAL_8X7B, {"rope_parameters": {"full": {}}}, "a rope per layer type"),
        (MIXTRAL_8X7B, {"rope_theta": float("nan")}, "rope_theta=nan: expected a finite number"),
        (MIXTRAL_8X7B, {"rope_theta": "big"}, "rope_theta='big': expected a number"),
        (MIXTRAL_8X7B, {"rms_norm_eps": -1.0}, "rms_norm_eps=-1.0 must be positive"),
        (MIXTRAL_8X7B, {"num_key_value_heads": 5}, "num_attention_heads=32 does not divide"),
        (MIXTRAL_8X7B, {"num_experts_per_tok": 9}, r"num_experts_per_tok=9 is not within 1\.\.8"),
        (MIXTRAL_8X7B, {"head_dim": 7}, "rotary size 7 is not even"),
        (MIXTRAL_8X7B, {"eos_token_id": "</s>"}, "eos_token_id='</s>': expected non-negative"),
        (MIXTRAL_8X7B, {"architectures": "Mixtral"}, "architectures=.*expected a list of strings"),
        (MIXTRAL_8X7B, {"tie_word_embeddings": "no"}, "tie_word_embeddings=.*true or false"),
        (MIXTRAL_8X7B, {"hidden_act": 3}, "hidden_act=3 is not supported"),
        (DEEPSEEK_V3, {"n_group": 7}, "256 experts do not divide over n_group=7"),
        (DEEPSEEK_V3, {"topk_group": 9}, r"topk_group=9 is not within 1\.\.n_group=8"),
        (DEEPSEEK_V3, {"num_experts_per_tok": 129}, r"is not within 1\.\.128"),
        (GLM_4_5_AIR, {"partial_rotary_factor": 2.0}, "rotary size 256 is larger than"),
        (DEEPSEEK_V3, {"num_hidden_layers": 1 << 20}, "num_hidden_layers=.*expected an integer"),
        (DEEPSEEK_V3, {"q_lora_rank": "none"}, "q_lora_rank='none': expected an integer"),
        (MIXTRAL_8X7B, {"rope_theta": 10**400}, r"rope_theta=10+\.{3}: expected a finite number"),
        (MIXTRAL_8X7B, {"hidden_size": 3}, "num_attention_heads=32: .*divisor of hidden_size=3"),
        (GLM_4_5_AIR, {"partial_rotary_factor": 1e308}, "partial_rotary_factor=1e.308: expected"),
        (GPT_OSS_20B, {"rope_scaling": yarn(beta_fast=0)}, "beta_fast=0.0 and beta_slow=1.0"),
        (GPT_OSS_20B, {"rope_scaling": yarn(beta_slow=-1)}, "beta_fast=32.0 and beta_slow=-1.0"),
        (GPT_OSS_20B, {"rope_scaling": yarn(factor=1e-320)}, "rope factor=1e-320 is not at least"),
        (
            DEEPSEEK_V3,
            {"rope_scaling": yarn(mscale=1, mscale_all_dim=-10)},
            "mscale_all_dim=-10.0: expected",
        ),
    ],
    ids=str,
)
def test_what_we_cannot_do_is_refused_by_name(
    config: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        spec_of({**config, **changes})


@pytest.mark.parametrize(
    ("low", "high", "original"), [(4.0, 4.0, 8192), (4.0, 1.0, 8192), (1.0, 4.0, 0)]
)
def test_contradictory_llama3_bands_are_refused(low: float, high: float, original: int) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    with pytest.raises(CheckpointError, match=r"freq_factor|original_max_position"):
        spec_of({**MIXTRAL_8X7B, "rope_scaling": scaling})
