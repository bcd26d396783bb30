"""A GGUF file goes wherever a model folder goes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moeserve.cli import main
from moeserve.config.options import LoadOptions
from moeserve.errors import CheckpointError, ConfigError
from moeserve.kernels.ops import Ops
from moeserve.models.batch import Span, pack_spans
from moeserve.models.checkpoint import Checkpoint
from moeserve.models.decoder import load_decoder
from moeserve.models.fingerprint import fingerprint
from moeserve.models.hub import is_hub_id
from moeserve.models.library import resolve_model
from moeserve.models.packed.writer import pack_model
from moeserve.models.quantize import Recipe, quantize
from moeserve.models.tokenizer import Tokenizer
from moeserve.pools.compute_id import compute_id
from moeserve.pools.weights.manifest import manifest_of

Sayable = Callable[[str], Path]
KEYS = "tokenizer.ggml."


@pytest.fixture
def file(sayable: Sayable, writer: Any, tmp_path: Path) -> Path:
    """A model with experts and embedding in blocks, and the tokenizer of its folder."""
    folder = sayable("deepseek_v3")
    made = writer.converted(folder)
    whole = json.loads((folder / "tokenizer.json").read_text())
    vocab = whole["model"]["vocab"]
    special = {t["content"] for t in whole["added_tokens"]}
    tokens = sorted(vocab, key=vocab.__getitem__)
    merges = [" ".join(m) for m in whole["model"]["merges"]]
    made.values |= {
        f"{KEYS}model": "gpt2",
        f"{KEYS}pre": "gpt-2",
        f"{KEYS}tokens": tokens,
        f"{KEYS}token_type": [3 if t in special else 1 for t in tokens],
        f"{KEYS}merges": merges,
    }
    for name, tensor in made.tensors.items():
        if "exps" in name or "token_embd" in name:
            kind = "Q4_0" if "down" in name else "Q8_0"
            made.tensors[name] = writer.random_blocks(kind, tensor.shape, len(name))
    path: Path = made.save(tmp_path / "model.gguf")
    return path


def logits(path: Path, ops: Ops, **options: Any) -> torch.Tensor:
    decoder = load_decoder(path, ops=ops, options=LoadOptions(**options))
    step = pack_spans([Span([1, 2, 3, 250, 17], 0, [0], 5)], 8)
    return decoder.forward(step, decoder.new_cache(1, 8))


def test_its_path_and_its_folder_are_model_names(file: Path) -> None:
    assert resolve_model(str(file)) == resolve_model(str(file.parent)) == file
    for other in (str(file.with_name("other.gguf")), "models/other.gguf"):
        assert not is_hub_id(other)
        with pytest.raises(CheckpointError, match=r"no such folder; .* or a GGUF file"):
            resolve_model(other)


def test_experts_are_shared_out(file: Path, ops: Ops, share_out: Callable[..., None]) -> None:
    share_out(file, ops)


def test_a_quantised_copy_is_a_folder(file: Path, ops: Ops, tmp_path: Path) -> None:
    out = tmp_path / "out"

    done = quantize(file, out, Recipe())

    assert done.int8 > 100
    assert not done.left_out
    assert torch.equal(
        logits(out, ops, quantization="int8"), logits(file, ops, quantization="int8")
    )
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert Tokenizer.load(out).encode("the other") == Tokenizer.load(file).encode("the other")


def test_a_packed_copy_is_the_same_model_with_its_tokenizer(
    file: Path, ops: Ops, tmp_path: Path
) -> None:
    out = tmp_path / "packed"
    pack_model(file, out, ops, LoadOptions())
    assert torch.equal(logits(out, ops), logits(file, ops))
    assert Tokenizer.load(out).encode("the other") == Tokenizer.load(file).encode("the other")


def test_experts_of_gpt_oss_are_not_copied(sayable: Sayable, writer: Any, tmp_path: Path) -> None:
    path = writer.converted(sayable("gpt_oss")).save(tmp_path / "oss.gguf")
    with pytest.raises(CheckpointError, match="whose quantised copies others do not read"):
        quantize(path, tmp_path / "out", Recipe())
    with pytest.raises(ConfigError, match="exists"):
        quantize(path, tmp_path, Recipe())


def test_what_it_is_follows_from_header_and_tensors(file: Path) -> None:
    options = LoadOptions()
    first = fingerprint(file), compute_id(file, options, "x")
    assert list(first[0]) == ["model.gguf"]
    assert (fingerprint(file), compute_id(file, options, "x")) == first
    content = bytearray(file.read_bytes())
    entry = Checkpoint.open(file)._entries["lm_head.weight"]
    content[(entry.start + entry.end) // 2] ^= 1
    file.write_bytes(content)
    assert fingerprint(file) == first[0]
    assert compute_id(file, options, "x") != first[1]
    with pytest.raises(CheckpointError, match="is not handed on"):
        manifest_of(file, "name")


def test_other_architectures_and_keys_are_refused_by_name(
    sayable: Sayable, writer: Any, tmp_path: Path
) -> None:
    made, path = writer.converted(sayable("qwen3_moe")), tmp_path / "m.gguf"
    good = dict(made.values)

    def said(**changes: Any) -> str:
        renamed = {k.replace("__", "."): v for k, v in changes.items()}
        made.values = {k: v for k, v in (good | renamed).items() if v is not None}
        made.save(path)
        with pytest.raises(CheckpointError, match=r"m\.gguf") as caught:
            Checkpoint.open(path)
        return caught.value.message

    assert "architecture 'mamba' is not supported" in said(general__architecture="mamba")
    dense = said(qwen3moe__expert_count=None)
    assert "architecture 'qwen3moe' without experts is not supported" in dense
    assert "qwen3moe.logit_scale=0.5 is not supported" in said(qwen3moe__logit_scale=0.5)
    many = said(qwen3moe__expert_count=1 << 20)
    assert "1048576 experts" in many
    assert "expected an integer in 1..4096" in said(qwen3moe__block_count=1 << 30)
    assert "expected 4 experts" in said(qwen3moe__expert_count=4)
    assert "key qwen3moe.block_count is missing" in said(qwen3moe__block_count=None)
    scaling = {"qwen3moe__rope__scaling__type": "longrope"}
    assert "type='longrope' is not supported" in said(**scaling)
    assert "expected an integer" in said(qwen3moe__embedding_length="64")


def test_a_tensor_without_a_name_of_ours_is_not_dropped(
    sayable: Sayable, writer: Any, ops: Ops, tmp_path: Path
) -> None:
    made = writer.converted(sayable("mixtral"))
    made.tensors["rope_freqs.weight"] = writer.plain(torch.ones(8))
    path = made.save(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match=r"does not explain the tensors rope_freqs\.weight"):
        load_decoder(path, ops=ops)


@pytest.mark.long
def test_it_is_examined_and_answers(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", str(file), "--json"]) in (0, 1)
    model = json.loads(capsys.readouterr().out)["model"]
    assert (model["architecture"], model["layers"]) == ("DeepseekV3ForCausalLM", 3)
    words = ["generate", "--model", str(file.parent), "--prompt", "the", "--max-tokens", "4"]
    assert main([*words, "--temperature", "0", "--ignore-eos", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["token_ids"]) == 4
