"""Make a checkpoint to measure with: random weights, real shapes, written straight to disk.

    python bench/models/make.py qwen3-moe-1.2b [--dir FOLDER] [--set hidden_size=64 ...]

``FOLDER/NAME`` gets config.json, model.safetensors (bf16) and a byte-level tokenizer whose every
id stands for a text, so that any runtime can serve it. The same name and settings give the same
bytes. A folder that is complete is left as it is.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HOME = Path.home() / ".cache" / "moeserve-bench" / "models"
END = "<|endoftext|>"
SEED = 11

Config = dict[str, Any]

MODELS: dict[str, Config] = {
    # 1.15 B parameters, of which a token meets 0.21 B.
    "qwen3-moe-1.2b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 1024,
        "num_hidden_layers": 20,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "intermediate_size": 2048,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 512,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "attention_bias": False,
    },
    # 30.5 B, of which a token meets 3.3 B: the shape of Qwen3-30B-A3B.
    "qwen3-30b-a3b": {
        "vocab_size": 151936,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "attention_bias": False,
    },
    # 0.69 B: latent attention, a shared expert, group-limited sigmoid routing.
    "deepseek-v3-0.7b": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": 384,
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "intermediate_size": 2048,
        "first_k_dense_replace": 1,
        "n_routed_experts": 32,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "moe_intermediate_size": 384,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "rope_theta": 10000.0,
        "rope_interleave": True,
        "attention_bias": False,
    },
}
COMMON: Config = {
    "vocab_size": 32000,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
    "torch_dtype": "bfloat16",
}


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor to draw: normal with this ``spread`` around ``mean``."""

    name: str
    shape: tuple[int, ...]
    spread: float
    mean: float = 0.0
    dtype: torch.dtype = torch.bfloat16

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def matrix(name: str, out: int, into: int) -> Weight:
    """Keeps the size of what passes through it."""
    return Weight(f"{name}.weight", (out, into), 1.2 * into**-0.5)


def norm(name: str, size: int) -> Weight:
    return Weight(f"{name}.weight", (size,), 0.1, 1.0)


def swiglu(prefix: str, inner: int, hidden: int) -> Iterator[Weight]:
    yield matrix(f"{prefix}.gate_proj", inner, hidden)
    yield matrix(f"{prefix}.up_proj", inner, hidden)
    yield matrix(f"{prefix}.down_proj", hidden, inner)


def gqa(c: Config, prefix: str) -> Iterator[Weight]:
    hidden, size = c["hidden_size"], c["head_dim"]
    wide, narrow = c["num_attention_heads"] * size, c["num_key_value_heads"] * size
    yield matrix(f"{prefix}.q_proj", wide, hidden)
    yield matrix(f"{prefix}.k_proj", narrow, hidden)
    yield matrix(f"{prefix}.v_proj", narrow, hidden)
    yield matrix(f"{prefix}.o_proj", hidden, wide)
    yield norm(f"{prefix}.q_norm", size)
    yield norm(f"{prefix}.k_norm", size)


def mla(c: Config, prefix: str) -> Iterator[Weight]:
    hidden, heads, latent = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
    nope, rope, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    yield matrix(f"{prefix}.q_a_proj", c["q_lora_rank"], hidden)
    yield norm(f"{prefix}.q_a_layernorm", c["q_lora_rank"])
    yield matrix(f"{prefix}.q_b_proj", heads * (nope + rope), c["q_lora_rank"])
    yield matrix(f"{prefix}.kv_a_proj_with_mqa", latent + rope, hidden)
    yield norm(f"{prefix}.kv_a_layernorm", latent)
    yield matrix(f"{prefix}.kv_b_proj", heads * (nope + value), latent)
    yield matrix(f"{prefix}.o_proj", hidden, heads * value)


def weights(c: Config) -> Iterator[Weight]:
    hidden, vocab = c["hidden_size"], c["vocab_size"]
    latent = "kv_lora_rank" in c
    experts = c["n_routed_experts"] if latent else c["num_experts"]
    yield Weight("model.embed_tokens.weight", (vocab, hidden), 1.0)
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        yield norm(f"{layer}.input_layernorm", hidden)
        yield norm(f"{layer}.post_attention_layernorm", hidden)
        yield from (mla if latent else gqa)(c, f"{layer}.self_attn")
        if i < c.get("first_k_dense_replace", 0):
            yield from swiglu(f"{layer}.mlp", c["intermediate_size"], hidden)
            continue
        yield matrix(f"{layer}.mlp.gate", experts, hidden)
        for e in range(experts):
            yield from swiglu(f"{layer}.mlp.experts.{e}", c["moe_intermediate_size"], hidden)
        if latent:
            bias = f"{layer}.mlp.gate.e_score_correction_bias"
            yield Weight(bias, (experts,), 0.01, dtype=torch.float32)
            inner = c["moe_intermediate_size"] * c["n_shared_experts"]
            yield from swiglu(f"{layer}.mlp.shared_experts", inner, hidden)
    yield norm("model.norm", hidden)
    yield matrix("lm_head", vocab, hidden)


def write_weights(file: Path, listed: list[Weight]) -> None:
    """One tensor at a time: never more than one of them in memory."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for w in listed:
        kind = {torch.bfloat16: "BF16", torch.float32: "F32"}[w.dtype]
        ends = [offset, offset + w.nbytes]
        header[w.name] = {"dtype": kind, "shape": list(w.shape), "data_offsets": ends}
        offset += w.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    draw = torch.Generator().manual_seed(SEED)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for w in listed:
            drawn = torch.randn(w.shape, generator=draw).mul_(w.spread).add_(w.mean)
            out.write(drawn.to(w.dtype).view(torch.uint8).numpy().data)


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Byte-level BPE: the end of text, 256 bytes, then pairs and triples of letters as merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([END, *letters])}
    merges: list[tuple[str, str]] = []
    common = "Ġetaoinshrdlcumwfgypbvkjxqz"
    pairs = [(a, b) for a in common for b in common[1:]]
    for left, right in (
        pairs
        + [(a + b, c) for a, b in pairs for c in common[1:]]
        + [(a + b + c, d) for a, b in pairs for c in common[1:] for d in common[1:]]
    ):
        if len(vocab) >= vocab_size:
            break
        vocab[left + right] = len(vocab)
        merges.append((left, right))
    if len(vocab) != vocab_size:
        sys.exit(f"vocab_size={vocab_size}: expected {len(letters) + 1} to 486999")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def settings_of(name: str, changes: Config) -> Config:
    """The config.json of a model, with these changes."""
    unknown = changes.keys() - COMMON.keys() - MODELS[name].keys()
    if unknown:
        sys.exit(f"--set {min(unknown)}: no such key in {name}'s config.json")
    return {**COMMON, **MODELS[name], **changes}


def make(name: str, home: Path, changes: Config) -> Path:
    """The folder of the checkpoint, made if it is not there or was made otherwise."""
    config, folder = settings_of(name, changes), home / name
    written = folder / "config.json"  # last of all files
    if written.exists() and json.loads(written.read_text()) == config:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_weights(folder / "model.safetensors", list(weights(config)))
    write_tokenizer(folder, config["vocab_size"])
    written.write_text(json.dumps(config, indent=1))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python bench/models/make.py qwen3-moe-1.2b",
    )
    parser.add_argument("name", choices=sorted(MODELS))
    parser.add_argument("--dir", type=Path, default=HOME, help=f"default: {HOME}")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=INTEGER")
    args = parser.parse_args()
    changes = {key: int(value) for key, _, value in (pair.partition("=") for pair in args.set)}
    print(make(args.name, args.dir, changes))


if __name__ == "__main__":
    main()
