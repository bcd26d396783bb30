"""Write the trained demo model as an ordinary DeepSeek-V3 checkpoint folder.

``python examples/demo_model/export.py --data DIR --run DIR --out moeserve/demo`` reads the
tokenizer of ``data.py`` and the checkpoint of ``train.py`` and writes bf16 safetensors,
``config.json``, tokenizer and generation defaults. The balancing biases stay fp32.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path

import torch
from data import EOS
from model import Block, Config, DemoModel, MoE
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %} {{ m.content }}\n"
    "{% elif m.role == 'system' %}{{ m.content }}\n"
    "{% else %}Question: {{ m.content }}\nAnswer:{% endif %}"
    "{% endfor %}"
)


def load_trained(run: Path) -> DemoModel:
    """The model of the newest checkpoint under ``run``, in fp32."""
    model = DemoModel(Config())
    with safe_open(run / "checkpoint.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith("model.")]  # noqa: SIM118
        model.load_state_dict({n.removeprefix("model."): file.get_tensor(n) for n in names})
    return model.eval()


def mlp_tensors(mlp: torch.nn.Module, prefix: str) -> dict[str, Tensor]:
    if not isinstance(mlp, MoE):
        return {f"{prefix}.{name}": p for name, p in mlp.named_parameters()}
    out = {
        f"{prefix}.gate.weight": mlp.router,
        f"{prefix}.gate.e_score_correction_bias": mlp.bias_E,
    }
    inner = mlp.c.moe_intermediate_size
    for e in range(mlp.c.n_routed_experts):
        out[f"{prefix}.experts.{e}.gate_proj.weight"] = mlp.gate_up[e, :inner]
        out[f"{prefix}.experts.{e}.up_proj.weight"] = mlp.gate_up[e, inner:]
        out[f"{prefix}.experts.{e}.down_proj.weight"] = mlp.down[e]
    out |= {f"{prefix}.shared_experts.{name}": p for name, p in mlp.shared.named_parameters()}
    return out


def block_tensors(block: Block, prefix: str) -> dict[str, Tensor]:
    plain = {
        f"{prefix}.{name}": p for name, p in block.named_parameters() if not name.startswith("mlp.")
    }
    return plain | mlp_tensors(block.mlp, f"{prefix}.mlp")


def checkpoint_tensors(model: DemoModel) -> dict[str, Tensor]:
    """Names as in published DeepSeek-V3 checkpoints; MTP is the layer after the last."""
    out = {"model.embed_tokens.weight": model.embed.weight, "lm_head.weight": model.head.weight}
    out["model.norm.weight"] = model.norm.weight
    for i, layer in enumerate(model.layers):
        assert isinstance(layer, Block)
        out |= block_tensors(layer, f"model.layers.{i}")
    mtp = f"model.layers.{len(model.layers)}"
    out |= block_tensors(model.mtp, mtp)
    out[f"{mtp}.enorm.weight"] = model.enorm.weight
    out[f"{mtp}.hnorm.weight"] = model.hnorm.weight
    out[f"{mtp}.eh_proj.weight"] = model.eh_proj.weight
    out[f"{mtp}.shared_head.norm.weight"] = model.mtp_norm.weight
    dtypes = dict.fromkeys(out, torch.bfloat16)
    dtypes |= {name: torch.float32 for name in out if name.endswith("_bias")}
    return {name: t.detach().to(dtypes[name]).contiguous() for name, t in out.items()}


def hf_config(c: Config) -> dict[str, object]:
    return dataclasses.asdict(c) | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_key_value_heads": c.num_attention_heads,
        "num_nextn_predict_layers": 1,
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_scaling": None,
        "rope_interleave": True,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder written by data.py")
    parser.add_argument("--run", type=Path, required=True, help="folder written by train.py")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    model = load_trained(args.run)
    path = args.out / "model.safetensors"
    save_file(checkpoint_tensors(model), path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes it for its owner only
    shutil.copy(args.data / "tokenizer.json", args.out / "tokenizer.json")
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOS,
        "eos_token": EOS,
        "model_max_length": model.c.max_position_embeddings,
        "chat_template": CHAT_TEMPLATE,
    }
    generation = {"bos_token_id": 0, "eos_token_id": 0}
    for name, content in {
        "config.json": hf_config(model.c),
        "tokenizer_config.json": tokenizer_config,
        "generation_config.json": generation,
    }.items():
        (args.out / name).write_text(json.dumps(content, indent=1) + "\n")
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
