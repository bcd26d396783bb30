"""A checkpoint of random weights for ranks that replay routing: its experts, layers and choices are
those of the recorded model, its sizes what the machine carries.

Qwen3-MoE in form, experts of a layer in one tensor: a rank reads its own and nothing else. Every
expert's weights are its own. Attention is small: it is no part of what plans change.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from expert_parallel.recorded import Recording
from models.make import COMMON, Config, Weight, gqa, matrix, norm, write_weights

VOCAB, HEADS, KV_HEADS, HEAD_DIM = 1024, 4, 1, 32


def write_model(recording: Recording, folder: Path) -> Path:
    """The folder, with config.json and model.safetensors."""
    config = _config(recording)
    write_weights(folder / "model.safetensors", list(_weights(config)))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _config(recording: Recording) -> Config:
    source = recording.source
    return {
        **COMMON,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": VOCAB,
        "hidden_size": source.hidden,
        "num_hidden_layers": recording.fitted.num_layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": source.intermediate,
        "num_experts": recording.num_experts,
        "num_experts_per_tok": recording.top_k,
        "moe_intermediate_size": source.intermediate,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
        "attention_bias": False,
        "rope_theta": 1e6,
    }


def _weights(c: Config) -> Iterator[Weight]:
    hidden, inner, experts = c["hidden_size"], c["moe_intermediate_size"], c["num_experts"]
    yield Weight("model.embed_tokens.weight", (c["vocab_size"], hidden), 1.0)
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        yield norm(f"{layer}.input_layernorm", hidden)
        yield norm(f"{layer}.post_attention_layernorm", hidden)
        yield from gqa(c, f"{layer}.self_attn")
        yield matrix(f"{layer}.mlp.gate", experts, hidden)
        block = f"{layer}.mlp.experts"
        yield Weight(f"{block}.gate_up_proj", (experts, 2 * inner, hidden), 1.2 * hidden**-0.5)
        yield Weight(f"{block}.down_proj", (experts, hidden, inner), 1.2 * inner**-0.5)
    yield norm("model.norm", hidden)
    yield matrix("lm_head", c["vocab_size"], hidden)
