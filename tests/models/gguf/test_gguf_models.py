"""A GGUF file is the model that a folder of the same values is, to the bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moeserve.config.options import LoadOptions
from moeserve.kernels.ops import Ops
from moeserve.kernels.reference.ops import ReferenceOps
from moeserve.models.batch import Span, pack_spans
from moeserve.models.decoder import load_decoder

FAMILIES = (
    "deepseek_v2 deepseek_v2_lite deepseek_v3 deepseek_v3_plain glm4_moe gpt_oss mixtral olmoe "
    "olmoe_linear qwen2_moe qwen3_moe qwen3_moe_yarn"
).split()
PROMPT = [17, 300, 5, 88, 88, 251, 199, 3, 42, 120, 7] * 4
Sayable = Callable[[str], Path]


def logits(path: Path, ops: Ops, ids: Sequence[int] = PROMPT, **options: Any) -> Tensor:
    decoder = load_decoder(path, ops=ops, options=LoadOptions(**options))
    step = pack_spans([Span(ids, 0, list(range(8)), len(ids))], 8)
    return decoder.forward(step, decoder.new_cache(8, 8))


@pytest.mark.parametrize("family", FAMILIES)
def test_floats_give_the_logits_of_the_folder(
    family: str, sayable: Sayable, writer: Any, ops: Ops, tmp_path: Path
) -> None:
    folder = sayable(family)
    file = writer.converted(folder).save(tmp_path / "model.gguf")

    assert torch.equal(logits(file, ops), logits(folder, ops))


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_floats_of_16_bits_do_too(
    kind: str, sayable: Sayable, writer: Any, ops: Ops, tmp_path: Path
) -> None:
    """Beside the folder of these values: the float type of the embedding decides how both run."""
    folder = tmp_path / "model"
    shutil.copytree(sayable("qwen2_moe"), folder)
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}[kind]
    tensors = load_file(folder / "model.safetensors")
    kept = ("norm", ".gate.", "shared_expert_gate", "bias")
    plain = {n: t if any(k in n for k in kept) else t.to(dtype) for n, t in tensors.items()}
    save_file(plain, folder / "model.safetensors")
    file = writer.converted(sayable("qwen2_moe"), kind).save(tmp_path / "model.gguf")

    assert torch.equal(logits(file, ops), logits(folder, ops))


def test_experts_one_by_one_and_gate_with_up(
    sayable: Sayable, writer: Any, ops: Ops, tmp_path: Path
) -> None:
    """As files had them at first, and as they may have them now."""
    folder = sayable("mixtral")
    expected = logits(folder, ops)
    apart, fused = writer.converted(folder), writer.converted(folder)
    for name, tensor in list(apart.tensors.items()):
        if "_exps" in name:
            count = tensor.shape[0]
            size = len(tensor.data) // count
            for e in range(count):
                own = name.replace("_exps", f".{e}")
                data = tensor.data[e * size : (e + 1) * size]
                apart.tensors[own] = writer.Written("F32", tensor.shape[1:], data)
            del apart.tensors[name]
    for layer in range(3):
        gate, up = (fused.tensors.pop(f"blk.{layer}.ffn_{p}_exps.weight") for p in ("gate", "up"))
        both = [as_floats(t) for t in (gate, up)]
        name = f"blk.{layer}.ffn_gate_up_exps.weight"
        fused.tensors[name] = writer.plain(torch.cat(both, 1))

    assert torch.equal(logits(apart.save(tmp_path / "apart.gguf"), ops), expected)
    assert torch.equal(logits(fused.save(tmp_path / "fused.gguf"), ops), expected)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_the_module_that_predicts_another_token(
    kind: str, sayable: Sayable, writer: Any, tmp_path: Path
) -> None:
    """Of GLM, whose converter keeps it: in the layer after the last."""
    folder = tmp_path / "model"
    shutil.copytree(sayable("glm4_moe"), folder)
    tensors = load_file(folder / "model.safetensors")
    prefix, last = "model.layers.3", "model.layers.2"
    tensors |= {
        n.replace(last, prefix): t.clone() for n, t in tensors.items() if n.startswith(f"{last}.")
    }
    draw = torch.Generator().manual_seed(1)
    own = {"eh_proj": (64, 128), "embed_tokens": (320, 64), "shared_head.head": (320, 64)}
    own |= dict.fromkeys(("enorm", "hnorm", "shared_head.norm"), (64,))
    for name, shape in own.items():
        tensors[f"{prefix}.{name}.weight"] = torch.randn(shape, generator=draw) / 8
    save_file(tensors, folder / "model.safetensors")
    made = writer.converted(folder)
    made.values |= {"glm4moe.block_count": 4, "glm4moe.nextn_predict_layers": 1}
    if kind != "F32":
        for seed, name in enumerate(("eh_proj", "embed_tokens", "shared_head_head")):
            tensor = made.tensors[f"blk.3.nextn.{name}.weight"]
            written = writer.random_blocks(kind, tensor.shape, seed)
            made.tensors[f"blk.3.nextn.{name}.weight"] = written
            theirs = f"{prefix}.{name.replace('shared_head_', 'shared_head.')}.weight"
            values = torch.from_numpy(writer.slow_values(kind, written.data))
            tensors[theirs] = values.view(tensor.shape)
        save_file(tensors, folder / "model.safetensors")
    path = made.save(tmp_path / "model.gguf")

    found = [drafts(p, LoadOptions(quantization="none")) for p in (path, folder)]

    assert torch.equal(*found)


def drafts(path: Path, options: LoadOptions) -> Tensor:
    decoder = load_decoder(path, ReferenceOps(), options)
    assert decoder.mtp is not None
    step = pack_spans([Span(PROMPT, 0, list(range(8)), len(PROMPT))], 8)
    normed = torch.randn(len(PROMPT), 64, generator=torch.Generator().manual_seed(4))
    return decoder.mtp_forward(normed, step, decoder.new_cache(8, 8))


def as_floats(tensor: Any) -> Tensor:
    return torch.frombuffer(bytearray(tensor.data), dtype=torch.float32).view(tensor.shape)
