"""A rank reads its own experts and no byte of others; what it holds is what one process holds."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeserve.errors import CheckpointError, PlacementError
from moeserve.kernels.ops import Ops
from moeserve.models.decoder import load_decoder
from moeserve.models.expert_source import open_experts

TinyCheckpoint = Callable[[str], Path]
ShareOut = Callable[..., None]


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "qwen2_moe", "deepseek_v3", "mixtral", "olmoe", "gpt_oss", "glm4_moe"]
)
def test_every_family_shares_out_its_experts(
    tiny_checkpoint: TinyCheckpoint, ops: Ops, share_out: ShareOut, family: str
) -> None:
    share_out(tiny_checkpoint(family), ops)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_rounded_experts_are_those_of_one_process(
    tiny_checkpoint: TinyCheckpoint, ops: Ops, share_out: ShareOut, family: str, quantization: str
) -> None:
    share_out(tiny_checkpoint(family), ops, quantization=quantization)


def test_fused_experts_are_read_by_the_row(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, ops: Ops, share_out: ShareOut
) -> None:
    folder = tmp_path / "fused"
    shutil.copytree(tiny_checkpoint("qwen3_moe"), folder)
    tensors = load_file(folder / "model.safetensors")
    for layer in (1, 3):
        stem = f"model.layers.{layer}.mlp.experts"
        each = [
            [tensors.pop(f"{stem}.{e}.{part}_proj.weight") for part in ("gate", "up", "down")]
            for e in range(8)
        ]
        tensors[f"{stem}.gate_up_proj"] = torch.stack([torch.cat(x[:2]) for x in each])
        tensors[f"{stem}.down_proj"] = torch.stack([x[2] for x in each])
    save_file(tensors, folder / "model.safetensors")

    share_out(folder, ops)


@pytest.mark.parametrize("spoil", ["missing", "shape", "dtype"])
def test_the_headers_of_others_experts_are_checked(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, ops: Ops, spoil: str
) -> None:
    shutil.copytree(tiny_checkpoint("qwen3_moe"), tmp_path / "bad")
    file = tmp_path / "bad" / "model.safetensors"
    tensors, name = load_file(file), "model.layers.3.mlp.experts.6.up_proj.weight"
    good = tensors.pop(name)
    if spoil != "missing":
        tensors[name] = good[:-1].clone() if spoil == "shape" else good.to(torch.int32)
    save_file(tensors, file)

    with pytest.raises(CheckpointError, match=name):
        load_decoder(tmp_path / "bad", ops=ops, experts={1: [0, 1], 3: [0, 1]})


@pytest.mark.parametrize("own", [[8], [-1, 0], []])
def test_an_expert_that_the_model_lacks_is_named(
    tiny_checkpoint: TinyCheckpoint, ops: Ops, own: list[int]
) -> None:
    with pytest.raises(PlacementError, match=r"layers\.1: experts .* wanted of 0\.\.7"):
        load_decoder(tiny_checkpoint("qwen3_moe"), ops=ops, experts={1: own})


def test_a_dense_layer_has_no_experts_to_read(tiny_checkpoint: TinyCheckpoint, ops: Ops) -> None:
    source = open_experts(tiny_checkpoint("qwen3_moe"), ops=ops)
    for layer in (0, 4, -1):
        with pytest.raises(PlacementError, match="has no experts"):
            source.read(layer, [0])
