"""Every type of block is read to the values it stands for, and held exactly where that can be."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from moeserve.config.options import LoadOptions
from moeserve.errors import CheckpointError
from moeserve.kernels.matrix import Int4Matrix, Int8Matrix, Source, joined, to_float, to_int8
from moeserve.kernels.ops import Linear
from moeserve.kernels.reference.ops import ReferenceOps
from moeserve.models.batch import Span, pack_spans
from moeserve.models.checkpoint import Checkpoint
from moeserve.models.decoder import Decoder, load_decoder
from moeserve.models.formats.layouts import Stored
from moeserve.models.formats.method import Method
from moeserve.models.gguf import blocks
from moeserve.models.gguf.block_types import BY_NAME, QUANTISED, suffix_of
from moeserve.models.survey import survey

each_kind = pytest.mark.parametrize("kind", QUANTISED)


def raw_of(written: Any) -> Tensor:
    """Rows of bytes, as a checkpoint has them."""
    rows = torch.frombuffer(bytearray(written.data), dtype=torch.uint8)
    return rows.view(written.shape[0], -1)


@each_kind
@settings(max_examples=12)
@given(rows=st.integers(1, 4), count=st.integers(1, 3), seed=st.integers(0, 999))
def test_values_are_those_of_the_slow_twin(
    writer: Any, kind: str, rows: int, count: int, seed: int
) -> None:
    shape = (rows, count * BY_NAME[kind].values)
    written = writer.random_blocks(kind, shape, seed)
    expected = torch.from_numpy(writer.slow_values(kind, written.data)).view(shape)
    raw = raw_of(written)

    assert blocks.sound(kind, raw)
    assert blocks.features_of(kind, raw.shape[1]) == shape[1]
    assert torch.equal(blocks.to_values(kind, raw), expected)
    assert torch.equal(blocks.to_values(kind, raw, torch.bfloat16), expected.bfloat16())
    rounded, by_row = blocks.to_rows(kind, raw), to_int8(expected)
    assert torch.equal(rounded.codes, by_row.codes)
    assert torch.equal(rounded.scale, by_row.scale)
    if kind in blocks.EXACT:
        groups = blocks.to_groups(kind, raw)
        assert torch.equal(to_float(groups), expected)
        assert bool((groups.scale >= 0).all())


@each_kind
def test_pieces_make_no_difference(writer: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = raw_of(writer.random_blocks(kind, (7, 512), 3))
    whole = blocks.to_values(kind, raw), blocks.to_rows(kind, raw).codes
    monkeypatch.setattr(blocks, "_PIECE", 1024)

    assert torch.equal(blocks.to_values(kind, raw), whole[0])
    assert torch.equal(blocks.to_rows(kind, raw).codes, whole[1])


@each_kind
def test_a_header_has_the_form_of_its_data(writer: Any, kind: str) -> None:
    raw = raw_of(writer.random_blocks(kind, (3, 256), 1))
    for read in (blocks.to_values, blocks.to_rows, blocks.to_groups):
        if read is blocks.to_groups and kind not in blocks.EXACT:
            continue
        found, header = read(kind, raw), read(kind, raw.to("meta"))
        assert type(found) is type(header)
        assert found.shape == header.shape
    assert blocks.sound(kind, raw.to("meta"))


@each_kind
def test_a_scale_that_is_no_number_is_refused(writer: Any, kind: str, tmp_path: Path) -> None:
    written = writer.random_blocks(kind, (2, 256), 5)
    data, nbytes = bytearray(written.data), BY_NAME[kind].nbytes
    last = len(data) - nbytes
    if kind == "MXFP4":
        data[last] = 255
    else:
        at = last + writer.HALVES[kind][-1]
        data[at : at + 2] = b"\x00\x7e"
    name = f"a.{suffix_of(kind)}"
    rows = torch.frombuffer(data, dtype=torch.uint8).view(2, -1)
    save_file({name: rows}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")

    stored = Stored(Checkpoint.open(tmp_path), Method("gguf"))

    with pytest.raises(CheckpointError, match=f"{name}: holds a scale that is not finite"):
        stored.linear("a", 2, 256)
    with pytest.raises(CheckpointError, match=r"its metadata implies \[2, 512\]"):
        stored.linear("a", 2, 512)


class FloatOps(ReferenceOps):
    """Computes with what codes stand for, and remembers the matrices it was given."""

    def __init__(self) -> None:
        self.packed: list[Any] = []

    def pack_linear(self, weight_NK: Source, bias_N: Tensor | None = None) -> Linear:
        matrix = joined(weight_NK)
        self.packed.append(matrix)
        return super().pack_linear(to_float(matrix), bias_N)

    def pack_experts(self, gate_up: Source, down: Source, *others: Any) -> Any:
        both = joined(gate_up), joined(down)
        made = super().pack_experts(to_float(both[0]), to_float(both[1]), *others)
        self.packed += both
        return made

    def pack_heads(self, weight_ANK: Source) -> Linear:
        return super().pack_heads(to_float(joined(weight_ANK)))


def logits_of(decoder: Decoder) -> Tensor:
    step = pack_spans([Span([1, 2, 3, 250, 17], 0, [0], 5)], 8)
    return decoder.forward(step, decoder.new_cache(1, 8))


def in_blocks(writer: Any, folder: Path, kind: str) -> tuple[Any, dict[str, Tensor]]:
    """A file whose matrices are blocks of this type where their rows allow, and the values of all
    of its tensors."""
    file, values = writer.converted(folder), {}
    for seed, (name, tensor) in enumerate(file.tensors.items()):
        shape = tensor.shape
        matrix = len(shape) > 1 and name.endswith(".weight") and "ffn_gate_inp" not in name
        if matrix and shape[-1] % BY_NAME[kind].values == 0:
            written = file.tensors[name] = writer.random_blocks(kind, shape, seed)
            flat = writer.slow_values(kind, written.data)
            values[name] = torch.from_numpy(flat).view(shape)
        else:
            data = bytearray(tensor.data)
            values[name] = torch.frombuffer(data, dtype=torch.float32).view(shape)
    return file, values


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *(("deepseek_v3", kind) for kind in ("Q4_0", "Q8_0")),
        *(("gpt_oss", kind) for kind in ("MXFP4", "Q5_0")),
        *(("mixtral", kind) for kind in ("Q4_0", "Q4_1")),
        ("qwen2_moe", "Q8_0"),
        ("qwen3_moe", "Q5_1"),
    ],
)
def test_a_model_in_blocks_is_the_model_of_their_values(
    sayable: Callable[[str], Path], writer: Any, family: str, kind: str, tmp_path: Path
) -> None:
    codes, values = in_blocks(writer, sayable(family), kind)
    path = codes.save(tmp_path / "codes.gguf")
    plain = writer.GgufFile(codes.values, {n: writer.plain(t) for n, t in values.items()})
    floats = plain.save(tmp_path / "floats.gguf")
    exact = LoadOptions(dtype="float32", quantization="none")

    by_codes = load_decoder(path, FloatOps(), exact)
    assert torch.equal(logits_of(by_codes), logits_of(load_decoder(floats, FloatOps(), exact)))
    ops = FloatOps()
    load_decoder(path, ops)
    kinds = {type(m) for m in ops.packed}
    assert (Int4Matrix in kinds) == (kind in blocks.EXACT)
    assert Int8Matrix in kinds or kind in blocks.EXACT


WIDE = {
    "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 64, "hidden_size": 256,
    "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "num_experts": 2, "num_experts_per_tok": 1,
    "moe_intermediate_size": 256, "rms_norm_eps": 1e-6, "max_position_embeddings": 128,
    "norm_topk_prob": True, "eos_token_id": 1, "rope_theta": 10000.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose rows are whole blocks of 256."""
    folder, draw = tmp_path_factory.mktemp("wide"), torch.Generator().manual_seed(5)
    sizes = {"model.embed_tokens": (64, 256), "lm_head": (64, 256), "model.norm": (256,)}
    layer = "model.layers.0"
    attention = {"q": (256, 256), "k": (128, 256), "v": (128, 256), "o": (256, 256)}
    sizes |= {f"{layer}.self_attn.{x}_proj": s for x, s in attention.items()}
    sizes |= {f"{layer}.self_attn.{x}_norm": (64,) for x in "qk"}
    sizes |= {f"{layer}.{x}_layernorm": (256,) for x in ("input", "post_attention")}
    sizes[f"{layer}.mlp.gate"] = (2, 256)
    for e in range(2):
        parts = ("gate", "up", "down")
        sizes |= {f"{layer}.mlp.experts.{e}.{p}_proj": (256, 256) for p in parts}
    tensors = {f"{n}.weight": torch.randn(s, generator=draw) / 16 for n, s in sizes.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(WIDE))
    return folder


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K", "MXFP4", "Q8_0", "Q4_0"])
def test_what_is_rounded_is_the_folder_of_these_values_rounded_alike(
    wide: Path, writer: Any, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Against safetensors: int8 per row where there is no exact form, and said how often."""
    codes, values = in_blocks(writer, wide, kind)
    path = codes.save(tmp_path / "codes.gguf")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(WIDE))
    ours = {}
    for name, tensor in load_file(wide / "model.safetensors").items():
        ours[name] = values[gguf_name(writer, name)]
        if ".experts." in name:
            ours[name] = ours[name][int(name.split(".")[5])]
        if tensor.ndim == 2 and ".gate." not in name and "embed" not in name:
            exact = kind in blocks.EXACT
            ours[name] = ours[name] if exact else to_float(to_int8(ours[name]))
    save_file({n: t.contiguous() for n, t in ours.items()}, folder / "model.safetensors")

    with caplog.at_level("INFO", logger="moeserve.models"):
        decoder = load_decoder(path, FloatOps(), LoadOptions(dtype="float32"))
    expected = load_decoder(folder, FloatOps(), LoadOptions(dtype="float32"))

    assert torch.equal(logits_of_some(decoder), logits_of_some(expected))
    count = 0 if kind in blocks.EXACT else (4 + 2 * 3) + 1
    said = [r.getMessage() for r in caplog.records if "rounded to int8" in r.getMessage()]
    assert len(said) == (count > 0)
    assert not said or f"{count} matrices of {kind} rounded" in said[0]
    found = survey(path)
    assert found.spec == decoder.spec
    matrices = 2 * 256 * 256 + 2 * 128 * 256 + 6 * 256 * 256 + 64 * 256
    per_value = 0.5 + 5 / 32 if kind in blocks.EXACT else 1.0
    embedding, small = 64 * 256 * 2, (2 * 256 + 3 * 256 + 2 * 64) * 2
    scales = 0 if kind in blocks.EXACT else 4 * (2 * 256 + 2 * 128 + 6 * 256 + 64)
    assert found.weight_bytes == matrices * per_value + embedding + small + scales


def logits_of_some(decoder: Decoder) -> Tensor:
    step = pack_spans([Span([1, 2, 3, 25, 17], 0, [0], 5)], 8)
    return decoder.forward(step, decoder.new_cache(1, 8))


def gguf_name(writer: Any, name: str) -> str:
    """Of the tensor that has this one, or is it."""
    first = re.sub(r"experts\.\d+", "experts.0", name)
    return str(next(iter(writer.named(WIDE, {first: torch.zeros(1, 1)}))))
