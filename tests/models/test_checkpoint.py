"""A model folder that cannot be served is refused with the file, tensor or key at fault."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from moeserve.config.options import LoadOptions
from moeserve.errors import CheckpointError
from moeserve.kernels.ops import Ops
from moeserve.kernels.reference.ops import ReferenceOps
from moeserve.models.batch import Span, pack_spans
from moeserve.models.checkpoint import Checkpoint
from moeserve.models.decoder import Decoder, assemble, load_decoder
from moeserve.models.library import resolve_model

Edit = Callable[[dict[str, Tensor]], None]


@pytest.fixture
def folder(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a good Qwen3-MoE checkpoint, to be spoiled."""
    shutil.copytree(tiny_checkpoint("qwen3_moe"), tmp_path / "model")
    return tmp_path / "model"


def edit_tensors(folder: Path, edit: Edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def shard(folder: Path) -> Path:
    """Splits the weights over two files with an index, and returns the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def first_logits(decoder: Decoder) -> Tensor:
    step = pack_spans([Span([1, 2, 3], 0, [0])], 8)
    return decoder.forward(step, decoder.new_cache(1, 8))


def test_bytes_are_counted_as_tensors_are_read(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.bytes_read == 0
    name = "model.embed_tokens.weight"

    assert checkpoint.has(name)
    assert checkpoint.get(name).shape == (320, 64)
    assert checkpoint.bytes_read == 320 * 64 * 4
    assert name not in checkpoint.unread()
    assert set(checkpoint.unread()) == checkpoint.names - {name}


def test_progress_rises_to_the_end(folder: Path, ops: Ops) -> None:
    heard: list[tuple[int, int]] = []

    load_decoder(folder, ops=ops, progress=lambda done, total: heard.append((done, total)))

    done = [d for d, _ in heard]
    assert done == sorted(done)
    size = (folder / "model.safetensors").stat().st_size
    assert heard[-1] == (size, size)


def test_the_embedding_stays_where_the_file_has_it(folder: Path, ops: Ops) -> None:
    checkpoint = Checkpoint.open(folder)

    decoder = assemble(checkpoint, ops=ops)

    mapped = checkpoint.get("model.embed_tokens.weight")
    assert decoder.embedding_WH.data_ptr() == mapped.data_ptr()


def test_a_sharded_checkpoint_is_the_same_model(
    folder: Path, ops: Ops, tiny_decoder: Callable[[str], Decoder]
) -> None:
    shard(folder)

    decoder = load_decoder(folder, ops=ops)

    assert torch.equal(first_logits(decoder), first_logits(tiny_decoder("qwen3_moe")))


def fuse(tensors: dict[str, Tensor]) -> None:
    """One tensor per layer for all gates and ups, and one for all downs."""
    for layer in (1, 3):
        stem = f"model.layers.{layer}.mlp.experts"
        each = [
            [tensors.pop(f"{stem}.{e}.{part}_proj.weight") for part in ("gate", "up", "down")]
            for e in range(8)
        ]
        tensors[f"{stem}.gate_up_proj"] = torch.stack([torch.cat(x[:2]) for x in each])
        tensors[f"{stem}.down_proj"] = torch.stack([x[2] for x in each])


def test_fused_experts_are_the_same_model(
    folder: Path, ops: Ops, tiny_decoder: Callable[[str], Decoder]
) -> None:
    edit_tensors(folder, fuse)

    decoder = load_decoder(folder, ops=ops)

    assert torch.equal(first_logits(decoder), first_logits(tiny_decoder("qwen3_moe")))


def test_a_mixtral_may_spell_its_block_either_way(
    tiny_checkpoint: Callable[[str], Path],
    tiny_decoder: Callable[[str], Decoder],
    tmp_path: Path,
    ops: Ops,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("mixtral"), folder)

    def rename(tensors: dict[str, Tensor]) -> None:
        olds = [name for name in tensors if ".block_sparse_moe." in name]
        assert olds, "the saved spelling is the original one"
        for old in olds:
            tensors[old.replace(".block_sparse_moe.", ".mlp.")] = tensors.pop(old)

    edit_tensors(folder, rename)

    decoder = load_decoder(folder, ops=ops)
    assert torch.equal(first_logits(decoder), first_logits(tiny_decoder("mixtral")))


def test_float16_is_held_exactly_as_float32(folder: Path, ops: Ops) -> None:
    edit_tensors(folder, lambda t: t.update({k: v.half() for k, v in t.items()}))
    half = load_decoder(folder, ops=ops)
    edit_tensors(folder, lambda t: t.update({k: v.float() for k, v in t.items()}))
    full = load_decoder(folder, ops=ops, options=LoadOptions(dtype="float32"))

    assert half.dtype is full.dtype is torch.float32
    assert torch.equal(first_logits(half), first_logits(full))


def test_bfloat16_stays_bfloat16_unless_asked(folder: Path, ops: Ops) -> None:
    edit_tensors(folder, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))

    assert load_decoder(folder, ops=ops).dtype is torch.bfloat16
    assert load_decoder(folder, ops, LoadOptions(dtype="float32")).dtype is torch.float32


def refused(folder: Path, *said: str) -> None:
    """Before any backend packs a tensor, so it does not matter which."""
    with pytest.raises(CheckpointError) as caught:
        load_decoder(folder, ops=ReferenceOps())
    for word in said:
        assert word in caught.value.message


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere", "no such folder")


def test_a_folder_without_config_is_named(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, "config.json", "missing")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"[" * 100_000])
def test_a_config_that_is_no_json_object_is_named(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    refused(folder, "config.json", "JSON")


def test_pickle_is_never_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "pickle", "convert")


def test_a_folder_without_weights_says_what_it_looked_for(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "model.safetensors.index.json")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_a_truncated_file_is_named(folder: Path, keep: float) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep if keep > 1 or keep == 0 else keep * len(whole))])
    refused(folder, "model.safetensors", "truncated")


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, "model-00002-of-00002.safetensors is missing")


def test_an_index_that_promises_too_much_is_named(folder: Path) -> None:
    index = shard(folder)
    said = json.loads(index.read_text())
    said["weight_map"]["model.ghost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(said))
    refused(folder, "model.ghost", "model-00001-of-00002.safetensors")


@pytest.mark.parametrize("escape", ["../model.safetensors", "/etc/passwd", ".."])
def test_a_shard_outside_the_folder_is_refused(folder: Path, escape: str) -> None:
    index = shard(folder)
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": escape}}))
    refused(folder, "not a plain file name")


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.experts.5.up_proj.weight",
        "model.layers.2.self_attn.k_norm.weight",
    ],
)
def test_a_missing_tensor_is_named(folder: Path, name: str) -> None:
    edit_tensors(folder, lambda t: t.pop(name))
    refused(folder, name, "missing")


def test_a_wrong_shape_is_named_with_both_shapes(folder: Path) -> None:
    name = "model.layers.2.self_attn.k_proj.weight"
    edit_tensors(folder, lambda t: t.update({name: torch.zeros(5, 64)}))
    refused(folder, name, "[5, 64]", "[64, 64]")


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("qwen3_moe", "moe_intermediate_size"),
        ("qwen2_moe", "shared_expert_intermediate_size"),
        ("deepseek_v3", "intermediate_size"),
    ],
)
def test_a_size_that_no_tensor_has_takes_no_memory(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, family: str, key: str
) -> None:
    shutil.copytree(tiny_checkpoint(family), tmp_path / family)
    edit_config(tmp_path / family, **{key: (1 << 31) - 1})
    refused(tmp_path / family, "config.json implies [2147483647")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bits_of_a_header_load_or_are_refused_in_one_line(
    folder: Path, tiny_checkpoint: Callable[[str], Path], ops: Ops, data: st.DataObject
) -> None:
    whole = bytearray((tiny_checkpoint("qwen3_moe") / "model.safetensors").read_bytes())
    header = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, header - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / "model.safetensors").write_bytes(whole)
    try:
        load_decoder(folder, ops=ops)
    except CheckpointError as error:
        assert "\n" not in error.message  # noqa: PT017 - a lucky flip may load


def test_an_unexpected_dtype_is_named(folder: Path) -> None:
    name = "model.layers.2.self_attn.k_proj.weight"
    edit_tensors(folder, lambda t: t.update({name: torch.zeros(64, 64, dtype=torch.int8)}))
    refused(folder, name, "int8", "quantised")


def test_a_tensor_that_the_model_does_not_explain_is_refused(folder: Path) -> None:
    name = "model.layers.2.self_attn.q_proj.bias"
    edit_tensors(folder, lambda t: t.update({name: torch.zeros(128)}))
    refused(folder, name, "does not explain")


def test_needless_tensors_are_listed_not_dropped_in_silence(folder: Path, ops: Ops) -> None:
    needless = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
        "model.layers.4.eh_proj.weight": torch.zeros(2, 2),
    }
    edit_tensors(folder, lambda t: t.update(needless))

    assert load_decoder(folder, ops=ops).unread == tuple(sorted(needless))


@pytest.mark.parametrize("method", ["bitsandbytes", "hqq", "quark", ""])
def test_an_unknown_method_of_quantisation_is_refused_by_name(folder: Path, method: str) -> None:
    edit_config(folder, quantization_config={"quant_method": method})
    refused(folder, "quantization_config", method or "unnamed", "compressed-tensors")


def test_an_unknown_architecture_is_named_beside_those_we_know(folder: Path) -> None:
    edit_config(folder, architectures=["MambaForCausalLM"])
    refused(folder, "MambaForCausalLM", "DeepseekV3ForCausalLM", "Qwen3MoeForCausalLM")


def test_generation_config_adds_end_tokens(folder: Path, ops: Ops) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [258, 256]}')

    assert load_decoder(folder, ops=ops).spec.eos_ids == (258, 256)


def test_the_demo_is_a_name_and_everything_else_a_folder(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    with pytest.raises(CheckpointError, match=r"'mystery': no such folder; give 'demo'"):
        resolve_model("mystery")


@pytest.mark.parametrize("name", ["", "demo\0", "DEMO"])
def test_a_name_that_is_neither_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve_model(name)
