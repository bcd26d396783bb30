"""Convert a checkpoint of ``make.py`` to GGUF: bf16, Q8_0, Q4_K_M. Runs in llama.cpp's venv.

    PEERS/llamacpp/bin/python bench/models/to_gguf.py FOLDER

writes FOLDER/gguf/{bf16,q8_0,q4_k_m}.gguf; a file that is there is left as it is.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

BF16 = gguf.GGMLQuantizationType.BF16
KINDS = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M}
PLAIN = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
KEPT = ("norm", "ffn_gate_inp")  # in fp32, as llama.cpp wants them


class Weights:
    """bf16 tensors as uint16, fp32 ones as they are; a map of the file."""

    def __init__(self, file: Path) -> None:
        raw = np.memmap(file, np.uint8, "r")
        length = int(raw[:8].view(np.uint64)[0])
        self._listed = json.loads(bytes(raw[8 : 8 + length]))
        self._listed.pop("__metadata__", None)
        self._data = raw[8 + length :]

    def has(self, name: str) -> bool:
        return name in self._listed

    def get(self, name: str) -> np.ndarray:
        entry = self._listed[name]
        begin, end = entry["data_offsets"]
        kind = {"BF16": np.uint16, "F32": np.float32}[entry["dtype"]]
        return self._data[begin:end].view(kind).reshape(entry["shape"])


def add(writer: gguf.GGUFWriter, name: str, tensor: np.ndarray) -> None:
    if tensor.dtype == np.uint16 and any(word in name for word in KEPT):
        tensor = (tensor.astype(np.uint32) << 16).view(np.float32)
    if tensor.dtype == np.uint16:
        writer.add_tensor(name, np.ascontiguousarray(tensor).view(np.uint8), raw_dtype=BF16)
    else:
        writer.add_tensor(name, np.ascontiguousarray(tensor))


def add_layer(writer: gguf.GGUFWriter, w: Weights, c: dict[str, Any], i: int) -> None:
    prefix, block = f"model.layers.{i}", f"blk.{i}"
    for ours, theirs in PLAIN.items():
        if w.has(f"{prefix}.{ours}.weight"):
            add(writer, f"{block}.{theirs}.weight", w.get(f"{prefix}.{ours}.weight"))
    if w.has(f"{prefix}.self_attn.kv_b_proj.weight"):
        up = w.get(f"{prefix}.self_attn.kv_b_proj.weight")
        up = up.reshape(c["num_attention_heads"], -1, c["kv_lora_rank"])
        nope = c["qk_nope_head_dim"]
        add(writer, f"{block}.attn_k_b.weight", up[:, :nope].transpose(0, 2, 1))
        add(writer, f"{block}.attn_v_b.weight", up[:, nope:])
    bias = f"{prefix}.mlp.gate.e_score_correction_bias"
    if w.has(bias):
        add(writer, f"{block}.exp_probs_b.bias", w.get(bias))
    experts = c.get("num_experts") or c["n_routed_experts"]
    if w.has(f"{prefix}.mlp.experts.0.gate_proj.weight"):
        for part in ("gate", "up", "down"):
            each = [w.get(f"{prefix}.mlp.experts.{e}.{part}_proj.weight") for e in range(experts)]
            add(writer, f"{block}.ffn_{part}_exps.weight", np.stack(each))


def add_config(writer: gguf.GGUFWriter, c: dict[str, Any]) -> None:
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_rope_freq_base(c["rope_theta"])
    writer.add_vocab_size(c["vocab_size"])
    writer.add_expert_count(c.get("num_experts") or c["n_routed_experts"])
    writer.add_expert_used_count(c["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(c["moe_intermediate_size"])
    if "kv_lora_rank" not in c:
        writer.add_head_count_kv(c["num_key_value_heads"])
        writer.add_key_length(c["head_dim"])
        writer.add_value_length(c["head_dim"])
        return
    latent, rope = c["kv_lora_rank"], c["qk_rope_head_dim"]
    writer.add_head_count_kv(1)
    writer.add_key_length(latent + rope)
    writer.add_value_length(latent)
    writer.add_key_length_mla(c["qk_nope_head_dim"] + rope)
    writer.add_value_length_mla(c["v_head_dim"])
    writer.add_rope_dimension_count(rope)
    writer.add_q_lora_rank(c["q_lora_rank"])
    writer.add_kv_lora_rank(latent)
    writer.add_leading_dense_block_count(c["first_k_dense_replace"])
    writer.add_expert_shared_count(c["n_shared_experts"])
    writer.add_expert_weights_scale(c["routed_scaling_factor"])
    writer.add_expert_weights_norm(c["norm_topk_prob"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_group_count(c["n_group"])
    writer.add_expert_group_used_count(c["topk_group"])


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, c: dict[str, Any]) -> None:
    bpe = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    kinds = [gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(tokens) - 1)
    merges = [m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(c["eos_token_id"])
    writer.add_add_bos_token(False)


def write_bf16(folder: Path, target: Path) -> None:
    c = json.loads((folder / "config.json").read_text())
    w = Weights(folder / "model.safetensors")
    arch = {"qwen3_moe": "qwen3moe", "deepseek_v3": "deepseek2"}[c["model_type"]]
    writer = gguf.GGUFWriter(target, arch)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    add_config(writer, c)
    add_tokenizer(writer, folder, c)
    add(writer, "token_embd.weight", w.get("model.embed_tokens.weight"))
    add(writer, "output.weight", w.get("lm_head.weight"))
    add(writer, "output_norm.weight", w.get("model.norm.weight"))
    for i in range(c["num_hidden_layers"]):
        add_layer(writer, w, c, i)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantise(source: Path, target: Path, kind: int) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = kind, 2
    asked = str(source).encode(), str(target).encode(), ctypes.byref(params)
    if llama_cpp.llama_model_quantize(*asked) != 0:
        sys.exit(f"{source}: llama.cpp did not quantise it to {target.name}")


def main() -> None:
    folder = Path(sys.argv[1])
    made = folder / "gguf"
    made.mkdir(exist_ok=True)
    for kind in ("bf16", *KINDS):
        target, partial = made / f"{kind}.gguf", made / f"{kind}.part"
        if target.exists() and target.stat().st_mtime > (folder / "config.json").stat().st_mtime:
            continue
        if kind == "bf16":
            write_bf16(folder, partial)
        else:
            quantise(made / "bf16.gguf", partial, KINDS[kind])
        partial.replace(target)
        print(target)


if __name__ == "__main__":
    main()
