"""Quantised checkpoints are read to the exact values that their codes stand for.

Every format is written here from floats by code of its own, one loop at a time, beside the values
that a reader must find. A whole model is right if its logits equal, to the bit, those of a float
checkpoint that holds these values.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from moeserve.config.options import LoadOptions
from moeserve.errors import CheckpointError
from moeserve.kernels.matrix import (
    Int4Matrix,
    Int8Matrix,
    Matrix,
    Source,
    joined,
    to_float,
    to_int8,
)
from moeserve.kernels.ops import Activation, Experts, Linear, Ops
from moeserve.kernels.reference.ops import ReferenceOps
from moeserve.models.batch import Span, pack_spans
from moeserve.models.checkpoint import Checkpoint
from moeserve.models.decoder import load_decoder
from moeserve.models.fields import Fields
from moeserve.models.formats.layouts import Stored
from moeserve.models.formats.method import read_method
from moeserve.models.survey import survey

Config = dict[str, Any]


class FloatOps(ReferenceOps):
    """Computes with what the codes stand for, and remembers the matrices it was given."""

    def __init__(self) -> None:
        self.packed: list[Matrix] = []

    def pack_linear(self, weight_NK: Source, bias_N: Tensor | None = None) -> Linear:
        matrix = joined(weight_NK)
        self.packed.append(matrix)
        return super().pack_linear(to_float(matrix), bias_N)

    def pack_experts(
        self,
        gate_up_E2IH: Source,
        down_EHI: Source,
        gate_up_bias_E2I: Tensor | None = None,
        down_bias_EH: Tensor | None = None,
        activation: Activation = Activation.SWIGLU,
    ) -> Experts:
        kept = len(self.packed)
        up_E2IH, down_EHI = joined(gate_up_E2IH), joined(down_EHI)
        floats = to_float(up_E2IH), to_float(down_EHI)
        made = super().pack_experts(*floats, gate_up_bias_E2I, down_bias_EH, activation)
        self.packed[kept:] = [up_E2IH, down_EHI]
        return made

    def pack_heads(self, weight_ANK: Source) -> Linear:
        kept, matrix = len(self.packed), joined(weight_ANK)
        made = super().pack_heads(to_float(matrix))
        self.packed[kept:] = [matrix]
        return made


@dataclass
class Written:
    """A matrix [N, K] in some format: what is in the file, and what it stands for.

    ``rounded`` formats are int8 per row in memory, unless floats are asked for.
    """

    tensors: dict[str, Tensor]
    exact: Tensor
    kind: type
    config: Config
    rounded: bool = False

    @property
    def value(self) -> Tensor:
        return to_float(to_int8(self.exact)) if self.rounded else self.exact


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """int32 words along the last axis, code i of a word at bit i * bits."""
    per = 32 // bits
    out = np.zeros((*codes.shape[:-1], -(-codes.shape[-1] // per)), np.uint32)
    for k in range(codes.shape[-1]):
        out[..., k // per] |= codes[..., k].astype(np.uint32) << np.uint32(k % per * bits)
    return out.view(np.int32)


def grid(w: np.ndarray, group: int, bits: int, seed: int) -> tuple[np.ndarray, ...]:
    """Codes [N, K], fp16 scales and zero points [N, G] of asymmetric rounding."""
    n, k = w.shape
    groups = -(-k // group)
    scale, zero = np.zeros((n, groups), np.float16), np.zeros((n, groups), np.int64)
    codes = np.zeros((n, k), np.int64)
    top = 2**bits - 1
    for g in range(groups):
        part = w[:, g * group : (g + 1) * group]
        scale[:, g] = (part.max(1) - part.min(1)) / top + 1e-3
        zero[:, g] = np.clip(np.round(-part.min(1) / scale[:, g]), 1, top)
        whole = np.round(part / scale[:, g : g + 1]) + zero[:, g : g + 1]
        codes[:, g * group : (g + 1) * group] = np.clip(whole, 0, top)
    return codes, scale, zero


def values(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, index: np.ndarray) -> Tensor:
    whole = (codes - zero[:, index]).astype(np.float32)
    return torch.from_numpy(whole * scale.astype(np.float32)[:, index])


def put(x: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x))


def write_int8(w: np.ndarray, seed: int) -> Written:
    scale = (np.abs(w).max(1, keepdims=True) / 127.5 + 1e-6).astype(np.float32)
    codes = np.clip(np.round(w / scale), -128, 127).astype(np.int8)
    stored = {"weight": put(codes), "weight_scale": put(scale)}
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int"}}
    config = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    return Written(stored, put(codes.astype(np.float32) * scale), Int8Matrix, config | one(group))


def write_packed(w: np.ndarray, seed: int) -> Written:
    group = (32, 64, 128)[seed % 3]
    codes, scale, zero = grid(w, group, 4, seed)
    if seed % 2:
        zero[:] = 8
    stored = {
        "weight_packed": put(words(codes, 4)),
        "weight_scale": put(scale),
        "weight_shape": torch.tensor(w.shape),
    }
    if not seed % 2:
        stored["weight_zero_point"] = put(words(zero.T, 4).T)
    index = np.arange(w.shape[1]) // group
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    config |= one({"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": group}})
    return Written(stored, values(codes, scale, zero, index), Int4Matrix, config)


def one(group: Config) -> Config:
    return {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}


def write_fp8(w: np.ndarray, seed: int) -> Written:
    block = (16, 32)
    rows, columns = (-(-a // b) for a, b in zip(w.shape, block, strict=True))
    inverse = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) + 0.5
    spread = torch.from_numpy(np.kron(inverse.numpy(), np.ones(block, np.float32)))
    spread = spread[: w.shape[0], : w.shape[1]]
    codes = (torch.from_numpy(w) / spread).to(torch.float8_e4m3fn)
    stored = {"weight": codes, "weight_scale_inv": inverse}
    config = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)}
    return Written(stored, codes.float() * spread, Int8Matrix, config, rounded=True)


def write_gptq(w: np.ndarray, seed: int, version: str = "gptq", order: bool = False) -> Written:
    group = (32, 64, 128)[seed % 3]
    codes, scale, zero = grid(w, group, 4, seed)
    index = np.arange(w.shape[1]) // group
    if order:
        index = np.random.default_rng(seed).permutation(index)
    less = 1 if version == "gptq" else 0
    stored = {
        "qweight": put(words(codes, 4).T),
        "qzeros": put(words(zero.T - less, 4)),
        "scales": put(scale.T),
        "g_idx": put(index.astype(np.int32)),
    }
    value = values(codes, scale, zero, index)
    rounded = bool((index != np.arange(w.shape[1]) // group).any())
    kind = Int8Matrix if rounded else Int4Matrix
    config = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": order}
    return Written(stored, value, kind, config | {"checkpoint_format": version}, rounded)


def write_gptq8(w: np.ndarray, seed: int) -> Written:
    """One group as long as a row, symmetric: exactly int8 per row."""
    scale = (np.abs(w).max(1, keepdims=True) / 127 + 1e-3).astype(np.float16)
    codes = np.clip(np.round(w / scale.astype(np.float32)) + 128, 0, 255).astype(np.int64)
    zero = np.full((len(w), 1), 128)
    stored = {
        "qweight": put(words(codes, 8).T),
        "qzeros": put(words(zero.T, 8)),
        "scales": put(scale.T),
    }
    index = np.zeros(w.shape[1], np.int64)
    config = {"quant_method": "gptq", "bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2"}
    return Written(stored, values(codes, scale, zero, index), Int8Matrix, config)


def write_awq(w: np.ndarray, seed: int) -> Written:
    group = (32, 64, 128)[seed % 3]
    codes, scale, zero = grid(w, group, 4, seed)

    def shuffled(x: np.ndarray) -> np.ndarray:
        out = np.empty_like(x)
        for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            out[:, place::8] = x[:, column::8]
        return words(out, 4)

    stored = {"qweight": put(shuffled(codes.T)), "scales": put(scale.T)}
    stored["qzeros"] = put(shuffled(zero.T))
    index = np.arange(w.shape[1]) // group
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"}
    return Written(stored, values(codes, scale, zero, index), Int4Matrix, config)


Writer = Callable[[np.ndarray, int], Written]
ShareOut = Callable[..., None]
WRITERS: dict[str, Writer] = {
    "int8": write_int8,
    "packed": write_packed,
    "fp8": write_fp8,
    "gptq": write_gptq,
    "gptq_v2": lambda w, seed: write_gptq(w, seed, "gptq_v2"),
    "gptq_order": lambda w, seed: write_gptq(w, seed, order=True),
    "gptq8": write_gptq8,
    "awq": write_awq,
}
each_format = pytest.mark.parametrize("name", WRITERS)
no_fixture_check = settings(
    max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def save(folder: Path, tensors: dict[str, Tensor], config: Config) -> None:
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def open_stored(folder: Path) -> Stored:
    checkpoint = Checkpoint.open(folder)
    return Stored(checkpoint, read_method(Fields(checkpoint.config)))


@each_format
@no_fixture_check
@given(n=st.integers(1, 6), k=st.integers(1, 9), seed=st.integers(0, 99))
def test_a_matrix_is_read_to_its_exact_values(
    tmp_path: Path, name: str, n: int, k: int, seed: int
) -> None:
    shape = (8 * n, (8 if name == "gptq8" else 32) * k)
    w = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    written = WRITERS[name](w, seed)
    tensors = {f"a.b.{part}": tensor for part, tensor in written.tensors.items()}
    save(tmp_path, tensors, {"quantization_config": written.config})

    stored = open_stored(tmp_path)
    found = stored.linear("a.b", *shape)

    assert isinstance(found, written.kind)
    assert found.shape == shape
    assert torch.equal(to_float(found), written.value)
    assert torch.equal(to_float(stored.exactly("a.b", *shape)), written.exact)
    assert stored.rounded.total() == written.rounded
    assert stored.checkpoint.unread() == ()


def is_matrix(name: str, tensor: Tensor) -> bool:
    plain = ("embed_tokens", "lm_head", "norm", ".gate.", "router", "_gate.", "kv_b_proj")
    return tensor.ndim == 2 and not any(word in name for word in plain)


@dataclass(frozen=True)
class Converted:
    """A folder in some format, and the floats it stands for: as read to codes, and exactly."""

    folder: Path
    floats: dict[str, Tensor]
    exact: dict[str, Tensor]


def convert(folder: Path, write: Writer) -> Converted:
    """Rewrites the folder's matrices in a format."""
    tensors, quantised = load_file(folder / "model.safetensors"), {}
    floats, exact = {}, {}
    settings: Config = {}
    for name, tensor in tensors.items():
        if not is_matrix(name, tensor):
            floats[name] = exact[name] = quantised[name] = tensor
            continue
        written = write(tensor.numpy(), 0)
        floats[name], exact[name] = written.value, written.exact
        module = name.removesuffix(".weight")
        quantised |= {f"{module}.{part}": t for part, t in written.tensors.items()}
        settings = written.config
    config = json.loads((folder / "config.json").read_text())
    save(folder, quantised, config | {"quantization_config": settings})
    return Converted(folder, floats, exact)


@pytest.fixture(scope="module")
def converted(
    tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Converted]:
    """The tiny checkpoint of a family in a format, made once and read only."""

    @functools.cache
    def make(family: str, name: str) -> Converted:
        folder = tmp_path_factory.mktemp(f"{family}-{name}") / "codes"
        shutil.copytree(tiny_checkpoint(family), folder)
        return convert(folder, WRITERS[name])

    return make


def logits(folder: Path, ops: ReferenceOps, **options: Any) -> Tensor:
    decoder = load_decoder(folder, ops=ops, options=LoadOptions(dtype="float32", **options))
    step = pack_spans([Span([1, 2, 3, 250, 17], 0, [0], 5)], 8)
    return decoder.forward(step, decoder.new_cache(1, 8))


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "deepseek_v3", "mixtral"])
@pytest.mark.parametrize("name", ["int8", "packed", "fp8", "gptq", "awq"])
def test_a_model_of_codes_equals_the_model_of_their_values(
    tiny_checkpoint: Callable[[str], Path],
    converted: Callable[[str, str], Converted],
    tmp_path: Path,
    family: str,
    name: str,
) -> None:
    codes, plain = converted(family, name), tmp_path / "plain"
    shutil.copytree(tiny_checkpoint(family), plain)
    save_file(codes.exact, plain / "model.safetensors")
    floats = logits(plain, FloatOps())
    assert torch.equal(logits(codes.folder, FloatOps(), quantization="none"), floats)

    save_file(codes.floats, plain / "model.safetensors")
    ops = FloatOps()
    assert torch.equal(logits(codes.folder, ops), logits(plain, FloatOps()))
    assert sum(not isinstance(m, Tensor) for m in ops.packed) > 10


def test_modules_of_several_schemes_live_in_one_checkpoint(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, ops: Ops, share_out: ShareOut
) -> None:
    """Attention's keys in floats beside quantised queries, one expert in int8 among int4."""
    codes, plain = tmp_path / "codes", tmp_path / "plain"
    shutil.copytree(tiny_checkpoint("qwen3_moe"), codes)
    shutil.copytree(tiny_checkpoint("qwen3_moe"), plain)
    kept = load_file(codes / "model.safetensors")
    floats = convert(codes, write_packed).floats
    tensors = load_file(codes / "model.safetensors")
    for name in [n for n in kept if "k_proj" in n or ".experts.2." in n]:
        module = name.removesuffix(".weight")
        for part in ("packed", "scale", "shape", "zero_point"):
            tensors.pop(f"{module}.weight_{part}", None)
        if "k_proj" in name:
            tensors[name] = floats[name] = kept[name]
        else:
            written = write_int8(kept[name].numpy(), 0)
            tensors |= {f"{module}.{part}": t for part, t in written.tensors.items()}
    save_file(tensors, codes / "model.safetensors")
    for name in [n for n in kept if ".experts." in n]:
        value = floats[name]
        if ".experts.2." in name:
            value = write_int8(kept[name].numpy(), 0).value
            floats[name] = value
        else:
            floats[name] = to_float(to_int8(value))
    save_file(floats, plain / "model.safetensors")

    assert torch.equal(logits(codes, FloatOps()), logits(plain, FloatOps()))
    share_out(codes, ops)


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def write_mxfp4(tensors: dict[str, Tensor], name: str, seed: int) -> None:
    """Replaces float experts [E, K, N] by random codes and powers, and by their values."""
    count, k, n = tensors[name].shape
    draw = np.random.default_rng(seed)
    codes = draw.integers(0, 16, (count, n, k))
    power = draw.integers(118, 126, (count, n, k // 32)).astype(np.uint8)
    tensors[f"{name}_blocks"] = put(
        (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8).reshape(count, n, k // 32, 16)
    )
    tensors[f"{name}_scales"] = put(power)
    signed = np.array([*E2M1, *(-x for x in E2M1)], np.float32)[codes]
    value = signed * np.repeat(2.0 ** (power.astype(np.float32) - 127), 32, -1).astype(np.float32)
    tensors[name] = put(value.transpose(0, 2, 1))


@pytest.fixture
def gpt_oss(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """``codes`` in MXFP4 as it is published, ``plain`` in floats."""
    for kind in ("codes", "plain"):
        shutil.copytree(tiny_checkpoint("gpt_oss"), tmp_path / kind)
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    names = [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]
    assert len(names) == 6
    for seed, name in enumerate(names):
        write_mxfp4(tensors, name, seed)
    extra = ("_blocks", "_scales")
    floats = {k: v for k, v in tensors.items() if not k.endswith(extra)}
    save_file(floats, tmp_path / "plain" / "model.safetensors")
    config = json.loads((tmp_path / "codes" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["x"]}
    codes = {k: v for k, v in tensors.items() if k not in names}
    save(tmp_path / "codes", codes, config)
    return tmp_path


def test_mxfp4_experts_equal_their_values(gpt_oss: Path) -> None:
    ops = FloatOps()

    assert torch.equal(logits(gpt_oss / "codes", ops), logits(gpt_oss / "plain", FloatOps()))

    fours = [m for m in ops.packed if isinstance(m, Int4Matrix)]
    assert {m.group for m in fours} == {32}
    assert len(fours) == 6


def test_a_scale_of_nan_is_named(gpt_oss: Path) -> None:
    file = gpt_oss / "codes" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.experts.down_proj_scales"
    tensors[name][1, 2, 0] = 255
    save_file(tensors, file)

    with pytest.raises(CheckpointError, match=f"{name}: holds NaN"):
        load_decoder(gpt_oss / "codes", ops=FloatOps())


@each_format
def test_experts_in_codes_are_shared_out(
    converted: Callable[[str, str], Converted], ops: Ops, share_out: ShareOut, name: str
) -> None:
    share_out(converted("qwen3_moe", name).folder, ops)


def test_experts_in_mxfp4_are_shared_out(gpt_oss: Path, ops: Ops, share_out: ShareOut) -> None:
    share_out(gpt_oss / "codes", ops)


def test_a_survey_of_codes_counts_what_is_stored(
    converted: Callable[[str, str], Converted],
) -> None:
    for name in ("int8", "packed", "fp8", "gptq", "awq"):
        folder = converted("qwen3_moe", name).folder
        tensors = load_file(folder / "model.safetensors")

        found = survey(folder)

        stored = sum(t.numel() * width(t) for t in tensors.values())
        assert found.weight_bytes == stored, name
        assert found.active_bytes < found.weight_bytes, name


def width(t: Tensor) -> int:
    return 4 if t.dtype in (torch.float16, torch.bfloat16) else t.itemsize
