"""GGUF files, written here from the format's description, and the families' names in them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

ALIGNMENT = 32
TYPE_IDS = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q4_K": 12,
    "Q5_K": 13, "Q6_K": 14, "BF16": 30, "MXFP4": 39,
}  # fmt: skip
# Features and bytes of a block.
SIZES = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210), "MXFP4": (32, 17),
}  # fmt: skip
FLOAT_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Where a block has numbers in fp16; MXFP4 has a byte of a power of two.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2),
    "Q5_K": (0, 2), "Q6_K": (208,), "MXFP4": (),
}  # fmt: skip


@dataclass
class Written:
    """A tensor as the file has it; ``shape`` ends with the features of a row."""

    kind: str
    shape: tuple[int, ...]
    data: bytes


@dataclass
class GgufFile:
    """What is to be written."""

    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Written] = field(default_factory=dict)
    version: int = 3

    def header(self) -> tuple[bytes, bytes]:
        """Up to the data, and the data."""
        listed, data = b"", b""
        for name, tensor in self.tensors.items():
            sizes = struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
            listed += text(name) + struct.pack("<I", len(tensor.shape)) + sizes
            listed += struct.pack("<IQ", TYPE_IDS[tensor.kind], len(data))
            data += tensor.data + b"\0" * (-len(tensor.data) % ALIGNMENT)
        values = b"".join(text(key) + value(found) for key, found in self.values.items())
        counts = struct.pack("<IQQ", self.version, len(self.tensors), len(self.values))
        head = b"GGUF" + counts + values + listed
        return head + b"\0" * (-len(head) % ALIGNMENT), data

    def save(self, path: Path) -> Path:
        path.write_bytes(b"".join(self.header()))
        return path


def text(content: str) -> bytes:
    encoded = content.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def value(found: Any) -> bytes:
    """As a key's value: type, then content."""
    if isinstance(found, list):
        kind, _ = scalar(found[0]) if found else (5, b"")
        return struct.pack("<IIQ", 9, kind, len(found)) + b"".join(scalar(x)[1] for x in found)
    kind, content = scalar(found)
    return struct.pack("<I", kind) + content


def scalar(found: Any) -> tuple[int, bytes]:
    if isinstance(found, bool):
        return 7, struct.pack("<B", found)
    if isinstance(found, int):
        return 4, struct.pack("<I", found)
    if isinstance(found, float):
        return 6, struct.pack("<f", found)
    return 8, text(found)


def plain(tensor: Tensor, kind: str = "F32") -> Written:
    as_kind = tensor.to(FLOAT_TYPES[kind]).contiguous()
    return Written(kind, tuple(tensor.shape), as_kind.view(torch.uint8).numpy().tobytes())


def random_blocks(kind: str, shape: Sequence[int], seed: int) -> Written:
    """Codes that are anything, of values around one in a row of so many features."""
    features, nbytes = SIZES[kind]
    draw = np.random.default_rng(seed)
    count = int(np.prod(shape)) // features
    raw = draw.integers(0, 256, (count, nbytes), np.uint8)
    size = {"Q8_0": 100.0, "Q6_K": 3000.0, "Q4_K": 900.0, "Q5_K": 1800.0}.get(kind, 16.0)
    for at in HALVES[kind]:
        scale = draw.normal(size=(count, 1)) / size / shape[-1] ** 0.5
        raw[:, at : at + 2] = scale.astype("<f2").view(np.uint8)
    if kind == "MXFP4":
        raw[:, 0] = draw.integers(119, 123, count)
    return Written(kind, tuple(shape), raw.tobytes())


def slow_values(kind: str, data: bytes) -> NDArray[np.float32]:
    """What blocks stand for, one value after the other, in fp32."""
    _, nbytes = SIZES[kind]
    found: list[np.float32] = []
    for at in range(0, len(data), nbytes):
        found += SLOW[kind](data[at : at + nbytes])
    return np.array(found, np.float32)


def half(block: bytes, at: int) -> np.float32:
    return np.float32(struct.unpack_from("<e", block, at)[0])


def nibble(block: bytes, begin: int, j: int) -> int:
    """Code j of 32 in 16 bytes: low halves first."""
    return block[begin + j] & 15 if j < 16 else block[begin + j - 16] >> 4


def slow_four(block: bytes) -> list[np.float32]:
    return [half(block, 0) * np.float32(nibble(block, 2, j) - 8) for j in range(32)]


def slow_four_and_least(block: bytes) -> list[np.float32]:
    d, m = half(block, 0), half(block, 2)
    return [np.float32(nibble(block, 4, j)) * d + m for j in range(32)]


def five(block: bytes, begin: int, j: int) -> int:
    high = int.from_bytes(block[begin : begin + 4], "little") >> j & 1
    return nibble(block, begin + 4, j) | high << 4


def slow_five(block: bytes) -> list[np.float32]:
    return [half(block, 0) * np.float32(five(block, 2, j) - 16) for j in range(32)]


def slow_five_and_least(block: bytes) -> list[np.float32]:
    d, m = half(block, 0), half(block, 2)
    return [np.float32(five(block, 4, j)) * d + m for j in range(32)]


def slow_eight(block: bytes) -> list[np.float32]:
    codes = struct.unpack_from("<32b", block, 2)
    return [half(block, 0) * np.float32(code) for code in codes]


def scale_and_least(packed: bytes, group: int) -> tuple[int, int]:
    if group < 4:
        return packed[group] & 63, packed[group + 4] & 63
    low = packed[group + 4]
    return low & 15 | packed[group - 4] >> 6 << 4, low >> 4 | packed[group] >> 6 << 4


def slow_k(block: bytes, codes: int, fifth: int | None) -> list[np.float32]:
    d, least, found = half(block, 0), half(block, 2), []
    for group in range(8):
        scale, base = scale_and_least(block[4:16], group)
        step, below = d * np.float32(scale), least * np.float32(base)
        for i in range(32):
            byte = block[codes + group // 2 * 32 + i]
            code = byte >> 4 if group % 2 else byte & 15
            if fifth is not None:
                code |= (block[fifth + i] >> group & 1) << 4
            found.append(step * np.float32(code) - below)
    return found


def slow_six(block: bytes) -> list[np.float32]:
    d, found = half(block, 208), []
    scales = struct.unpack_from("<16b", block, 192)
    for i in range(256):
        part, within = divmod(i, 128)
        quarter, place = divmod(within, 32)
        low = block[part * 64 + quarter % 2 * 32 + place]
        low = low >> 4 if quarter >= 2 else low & 15
        high = block[128 + part * 32 + place] >> 2 * quarter & 3
        found.append(d * np.float32(scales[i // 16]) * np.float32((low | high << 4) - 32))
    return found


def slow_mx(block: bytes) -> list[np.float32]:
    levels = (0, 1, 2, 3, 4, 6, 8, 12)
    power = np.float32(2.0 ** (block[0] - 128))
    codes = [nibble(block, 1, j) for j in range(32)]
    return [power * np.float32(levels[c & 7] * (-1 if c & 8 else 1)) for c in codes]


SLOW: Mapping[str, Callable[[bytes], list[np.float32]]] = {
    "Q4_0": slow_four,
    "Q4_1": slow_four_and_least,
    "Q5_0": slow_five,
    "Q5_1": slow_five_and_least,
    "Q8_0": slow_eight,
    "Q4_K": lambda block: slow_k(block, 16, None),
    "Q5_K": lambda block: slow_k(block, 48, 16),
    "Q6_K": slow_six,
    "MXFP4": slow_mx,
}

ARCHITECTURES = {
    "DeepseekV2ForCausalLM": "deepseek2",
    "DeepseekV3ForCausalLM": "deepseek2",
    "Glm4MoeForCausalLM": "glm4moe",
    "GptOssForCausalLM": "gpt-oss",
    "MixtralForCausalLM": "llama",
    "OlmoeForCausalLM": "olmoe",
    "Qwen2MoeForCausalLM": "qwen2moe",
    "Qwen3MoeForCausalLM": "qwen3moe",
}
COMMON_KEYS = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "num_local_experts": "expert_count",
    "num_experts": "expert_count",
    "n_routed_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "n_shared_experts": "expert_shared_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "routed_scaling_factor": "expert_weights_scale",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
    "q_lora_rank": "attention.q_lora_rank",
    "kv_lora_rank": "attention.kv_lora_rank",
    "clip_qkv": "attention.clamp_kqv",
    "head_dim": "attention.key_length",
}
ROPE_KEYS = {
    "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}
MODULES = {
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
    "mlp.router": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "eh_proj": "nextn.eh_proj",
    "enorm": "nextn.enorm",
    "hnorm": "nextn.hnorm",
    "embed_tokens": "nextn.embed_tokens",
    "shared_head.head": "nextn.shared_head_head",
    "shared_head.norm": "nextn.shared_head_norm",
}
EXPERTS = {
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up",
    "w2": "down",
}  # fmt: skip


def metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a ``config.json``, as llama.cpp's converter writes it."""
    arch = ARCHITECTURES[config["architectures"][0]]
    found: dict[str, Any] = {
        f"{arch}.{theirs}": config[ours]
        for ours, theirs in COMMON_KEYS.items()
        if config.get(ours) is not None
    }
    rope = config.get("rope_parameters") or {}
    found[f"{arch}.rope.freq_base"] = float(rope.get("rope_theta", 10_000.0))
    if rope.get("rope_type", "default") != "default":
        found[f"{arch}.rope.scaling.type"] = rope["rope_type"]
        pairs = ((theirs, rope[ours]) for ours, theirs in ROPE_KEYS.items() if ours in rope)
        found |= {f"{arch}.{name}": float(x) for name, x in pairs if "length" not in name}
        if "original_max_position_embeddings" in rope:
            name = f"{arch}.rope.scaling.original_context_length"
            found[name] = rope["original_max_position_embeddings"]
        if "mscale_all_dim" in rope:
            found[f"{arch}.rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    if arch == "deepseek2":
        rotated, latent = config["qk_rope_head_dim"], config["kv_lora_rank"]
        found |= {
            f"{arch}.attention.head_count_kv": 1,
            f"{arch}.attention.key_length": latent + rotated,
            f"{arch}.attention.value_length": latent,
            f"{arch}.attention.key_length_mla": config["qk_nope_head_dim"] + rotated,
            f"{arch}.attention.value_length_mla": config["v_head_dim"],
            f"{arch}.rope.dimension_count": rotated,
            f"{arch}.expert_gating_func": 2 if "V3" in config["architectures"][0] else 1,
            f"{arch}.expert_weights_norm": config.get("norm_topk_prob", True),
        }
    if arch == "glm4moe":
        part = int(config["head_dim"] * rope["partial_rotary_factor"])
        found |= {f"{arch}.rope.dimension_count": part, f"{arch}.expert_gating_func": 2}
        found[f"{arch}.expert_weights_norm"] = config["norm_topk_prob"]
    if arch == "gpt-oss":
        found[f"{arch}.attention.sliding_window"] = config["sliding_window"]
        found[f"{arch}.expert_feed_forward_length"] = config["intermediate_size"]
    found["general.architecture"] = arch
    found["tokenizer.ggml.eos_token_id"] = config["eos_token_id"]
    return found


def turned(rows: Tensor, heads: int) -> Tensor:
    """For a rotary embedding of neighbours."""
    pairs = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def named(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A folder's tensors under the names, and in the arrangement, of a GGUF file."""
    arch = ARCHITECTURES[config["architectures"][0]]
    found: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if parts[1] != "layers":
            top = {"model.embed_tokens": "token_embd", "lm_head": "output"}
            found[f"{top.get(name.removesuffix('.weight'), 'output_norm')}.weight"] = tensor
            continue
        prefix, inner, end = f"blk.{parts[2]}", ".".join(parts[3:-1]), parts[-1]
        if "experts" in parts and parts[-2] in EXPERTS:
            stack = f"{prefix}.ffn_{EXPERTS[parts[-2]]}_exps.weight"
            stacks.setdefault(stack, {})[int(parts[-3])] = tensor
        elif "experts" in parts:
            found |= stacked_experts(prefix, end, tensor)
        elif inner == "self_attn.kv_b_proj":
            up = tensor.view(config["num_attention_heads"], -1, config["kv_lora_rank"])
            nope = config["qk_nope_head_dim"]
            found[f"{prefix}.attn_k_b.weight"] = up[:, :nope].transpose(1, 2)
            found[f"{prefix}.attn_v_b.weight"] = up[:, nope:]
        elif end == "sinks":
            found[f"{prefix}.attn_sinks.weight"] = tensor
        elif end == "e_score_correction_bias":
            found[f"{prefix}.exp_probs_b.bias"] = tensor
        elif inner == "mlp.shared_expert_gate":
            found[f"{prefix}.ffn_gate_inp_shexp.weight"] = tensor[0]
        else:
            module = MODULES[inner]
            if module == "ffn_norm" and arch in ("gpt-oss", "glm4moe"):
                module = "post_attention_norm"
            if arch == "llama" and module in ("attn_q", "attn_k"):
                key = "attention_heads" if module == "attn_q" else "key_value_heads"
                tensor = turned(tensor, config[f"num_{key}"])
            found[f"{prefix}.{module}.{end}"] = tensor
    for name, experts in stacks.items():
        found[name] = torch.stack([experts[e] for e in range(len(experts))])
    return found


def stacked_experts(prefix: str, end: str, tensor: Tensor) -> dict[str, Tensor]:
    """Of GPT-OSS, which has gate and up alternating."""
    part, _, bias = end.partition("_proj")
    kind = "bias" if bias else "weight"
    rows = tensor if bias else tensor.transpose(1, 2)
    if part == "down":
        return {f"{prefix}.ffn_down_exps.{kind}": rows}
    names = (f"{prefix}.ffn_gate_exps.{kind}", f"{prefix}.ffn_up_exps.{kind}")
    return {names[0]: rows[:, 0::2], names[1]: rows[:, 1::2]}


def converted(folder: Path, kind: str = "F32") -> GgufFile:
    """A model folder as a GGUF file of floats: matrices of a kind, all others in fp32."""
    config = json.loads((folder / "config.json").read_text())
    tensors = named(config, load_file(folder / "model.safetensors"))
    return GgufFile(
        metadata(config),
        {n: plain(t, kind if is_matrix(n, t) else "F32") for n, t in tensors.items()},
    )


def is_matrix(name: str, tensor: Tensor) -> bool:
    """What a converter stores in fewer bits: neither norms, routers nor biases."""
    return tensor.ndim > 1 and name.endswith(".weight") and "ffn_gate_inp" not in name


def saved(file: GgufFile, path: Path, parts: Iterable[Sequence[str]] = ()) -> Path:
    """Whole, or its tensors in several files, of which the first has the keys."""
    listed = list(parts)
    if not listed:
        return file.save(path)
    paths = [
        path.with_name(f"{path.stem}-{i:05}-of-{len(listed):05}.gguf")
        for i in range(1, len(listed) + 1)
    ]
    for i, names in enumerate(listed):
        own = {"split.no": i, "split.count": len(listed)}
        kept = {n: file.tensors[n] for n in names}
        GgufFile({**(file.values if i == 0 else {}), **own}, kept).save(paths[i])
    return paths[0]
