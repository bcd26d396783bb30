"""``moeserve quantize``: the copy holds exactly what loading would have rounded to, or nothing."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moeserve.cli import main
from moeserve.config.options import LoadOptions
from moeserve.errors import CheckpointError, ConfigError
from moeserve.kernels.matrix import to_float, to_int4
from moeserve.kernels.ops import Ops
from moeserve.models import quantize as module
from moeserve.models.batch import Span, pack_spans
from moeserve.models.decoder import load_decoder
from moeserve.models.quantize import Recipe, fitted_int4, quantization_config, quantize

Tiny = Callable[[str], Path]
FAMILIES = [
    "deepseek_v3",
    "glm4_moe",
    "mixtral",
    "mixtral_llama3",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
]


def logits(folder: Path, ops: Ops, quantization: str = "auto") -> Tensor:
    decoder = load_decoder(folder, ops=ops, options=LoadOptions(quantization=quantization))
    step = pack_spans([Span([1, 2, 3, 250, 17], 0, [0], 5)], 8)
    return decoder.forward(step, decoder.new_cache(1, 8))


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_copy_is_what_loading_would_have_rounded_to(
    tiny_checkpoint: Tiny, tmp_path: Path, ops: Ops, family: str
) -> None:
    source, out = tiny_checkpoint(family), tmp_path / "out"

    done = quantize(source, out, Recipe())

    # The head, kept for others, and MLA's absorbed matrices are rounded as they load.
    assert torch.equal(logits(out, ops, "int8"), logits(source, ops, "int8"))
    assert done.left_out == ()
    assert done.int8 > 0
    assert read(out)["format"] == "int-quantized"


def test_fused_experts_are_written_one_by_one(
    tiny_checkpoint: Tiny, tmp_path: Path, ops: Ops
) -> None:
    source = tmp_path / "fused"
    shutil.copytree(tiny_checkpoint("qwen3_moe"), source)
    tensors = load_file(source / "model.safetensors")
    for layer in (1, 3):
        stem = f"model.layers.{layer}.mlp.experts"
        each = [
            [tensors.pop(f"{stem}.{e}.{part}_proj.weight") for part in ("gate", "up", "down")]
            for e in range(8)
        ]
        tensors[f"{stem}.gate_up_proj"] = torch.stack([torch.cat(x[:2]) for x in each])
        tensors[f"{stem}.down_proj"] = torch.stack([x[2] for x in each])
    save_file(tensors, source / "model.safetensors")

    quantize(source, tmp_path / "one", Recipe(head=True))
    quantize(tiny_checkpoint("qwen3_moe"), tmp_path / "other", Recipe(head=True))

    one, other = (load_file(tmp_path / x / "model.safetensors") for x in ("one", "other"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_four_bits_are_for_experts_and_eight_for_the_rest(
    tiny_checkpoint: Tiny, tmp_path: Path, ops: Ops
) -> None:
    source, out = tiny_checkpoint("qwen3_moe"), tmp_path / "out"

    done = quantize(source, out, Recipe("int4", group=32))

    tensors = load_file(out / "model.safetensors")
    plain = load_file(source / "model.safetensors")
    packed = {n.removesuffix(".weight_packed") for n in tensors if n.endswith("weight_packed")}
    assert packed
    assert len(packed) == done.int4
    assert all(".mlp." in name for name in packed)
    told = read(out)
    assert told["format"] == "mixed-precision"
    assert {g["format"] for g in told["config_groups"].values()} == {
        "int-quantized",
        "pack-quantized",
    }
    name = sorted(packed)[0]
    expected = to_float(fitted_int4(plain[f"{name}.weight"].float(), 32))
    words = tensors[f"{name}.weight_packed"]
    nibbles = torch.stack([(words >> shift) & 15 for shift in range(0, 32, 4)], -1).flatten(-2)
    spread = tensors[f"{name}.weight_scale"].repeat_interleave(32, -1)
    assert torch.equal((nibbles - 8).float() * spread, expected)
    assert logits(out, ops).isfinite().all()


def test_a_fitted_scale_is_never_worse_than_the_greatest_magnitude() -> None:
    w = torch.randn(16, 256, generator=torch.Generator().manual_seed(3))
    w[:, 7] *= 6

    plain, fitted = ((to_float(m) - w).square() for m in (to_int4(w), fitted_int4(w, 128)))

    plain, fitted = (e.view(16, 2, 128).sum(-1) for e in (plain, fitted))
    assert (fitted <= plain * 1.0001).all()
    assert fitted.sum() < 0.95 * plain.sum()


def test_what_is_kept_is_copied_to_the_bit_and_ignored_by_name(
    tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    source, out = tiny_checkpoint("deepseek_v3"), tmp_path / "out"

    quantize(source, out, Recipe(attention=False))

    before, after = (load_file(x / "model.safetensors") for x in (source, out))
    kept = [n for n in before if "self_attn" in n or "norm" in n or n == "lm_head.weight"]
    assert all(torch.equal(before[name], after[name]) for name in kept)
    ignored = set(read(out)["ignore"])
    assert {"lm_head", "model.layers.1.mlp.gate", "model.layers.0.self_attn.o_proj"} <= ignored
    assert all(after[f"{name}.weight"].is_floating_point() for name in ignored)


def test_targets_of_two_schemes_never_meet() -> None:
    schemes = {
        "model.layers.0.mlp.down_proj": "int8",
        "model.layers.1.mlp.down_proj": "int4",
        "model.layers.1.mlp.up_proj": "int4",
        "model.layers.2.mlp.up_proj": "int4",
    }

    groups = quantization_config(schemes, 128, ())["config_groups"]

    assert [g["targets"] for g in groups.values()] == [
        ["model.layers.1.mlp.down_proj", r"re:^model\.layers\.\d+\.mlp\.up_proj$"],
        ["model.layers.0.mlp.down_proj"],
    ]


def test_a_quantised_source_may_be_quantised_again(
    tiny_checkpoint: Tiny, tmp_path: Path, ops: Ops
) -> None:
    """int8 to int4 and back: what was rounded to int8 stays as it was."""
    first, second = tmp_path / "first", tmp_path / "second"
    quantize(tiny_checkpoint("qwen3_moe"), first, Recipe())
    again = quantize(first, second, Recipe())

    assert again.left_out == ()
    one, two = (load_file(x / "model.safetensors") for x in (first, second))
    assert one.keys() == two.keys()
    for name in one:
        if one[name].dtype is torch.int8:
            assert torch.equal(one[name], two[name])


def test_shards_hold_what_one_file_holds(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source, heard = tiny_checkpoint("olmoe"), []
    quantize(source, tmp_path / "one", Recipe())

    quantize(
        source,
        tmp_path / "many",
        Recipe(),
        shard_bytes=60_000,
        progress=lambda done, total: heard.append((done, total)),
    )

    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 3
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    parts = {name: shard.name for shard in shards for name in load_file(shard)}
    assert index["weight_map"] == parts
    together = {k: v for shard in shards for k, v in load_file(shard).items()}
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert together.keys() == whole.keys()
    assert all(torch.equal(together[k], whole[k]) for k in whole)
    assert [d for d, _ in heard] == sorted(d for d, _ in heard)
    assert heard[-1][0] == heard[-1][1]


def test_other_files_come_along_and_pickles_do_not(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_checkpoint("olmoe"), source)
    (source / "pytorch_model.bin").write_bytes(b"x")

    quantize(source, tmp_path / "out", Recipe())

    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    assert "pytorch_model.bin" not in names


def test_a_folder_that_exists_is_not_touched(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists; give a folder that does not"):
        quantize(tiny_checkpoint("olmoe"), tmp_path, Recipe())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("when", ["before", "while writing"])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    name = "_require_space" if when == "before" else "copy_others"
    monkeypatch.setattr(module, name, full)

    with pytest.raises(CheckpointError, match=r"out: cannot be written: No space .* are needed"):
        quantize(tiny_checkpoint("olmoe"), tmp_path / "out", Recipe())
    assert not list(tmp_path.iterdir())


def test_a_matrix_with_nan_is_named(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_checkpoint("olmoe"), source)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj"
    tensors[f"{name}.weight"][3, 4] = torch.nan
    save_file(tensors, source / "model.safetensors")

    with pytest.raises(CheckpointError, match=f"{name} holds NaN"):
        quantize(source, tmp_path / "out", Recipe())
    assert not (tmp_path / "out").exists()


def test_experts_of_gpt_oss_are_refused(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"GPT-OSS.*--quantization"):
        quantize(tiny_checkpoint("gpt_oss"), tmp_path / "out", Recipe())


@pytest.mark.parametrize("group", [0, 12, -128])
def test_a_group_that_no_word_holds_is_refused(group: int) -> None:
    with pytest.raises(ConfigError, match=f"group={group}: expected a multiple of 8"):
        Recipe(group=group)


def test_the_command_prints_what_it_wrote(
    tiny_checkpoint: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    status = main(
        ["quantize", "--model", str(tiny_checkpoint("olmoe")), "--out", str(out), "--json"]
    )

    assert status == 0
    told = json.loads(capsys.readouterr().out)
    assert told["folder"] == str(out)
    assert told["int8_matrices"] == 3 * (4 + 3 * 8)
    assert told["bytes_after"] < told["bytes_before"] / 2


PEAK = """
import resource, sys, torch
from pathlib import Path
from moeserve.models.quantize import Recipe, quantize
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
done = quantize(Path(sys.argv[1]), Path(sys.argv[2]), Recipe(head=True))
print(peak() - before, done.bytes_before)
"""


@pytest.mark.long
def test_a_model_is_never_whole_in_memory(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """A model of 200 MB, in a process whose memory may rise by less than that."""
    source = tmp_path / "source"
    shutil.copytree(tiny_checkpoint("olmoe"), source)
    config = json.loads((source / "config.json").read_text())
    config |= {"vocab_size": 100_000, "hidden_size": 256, "intermediate_size": 64}
    (source / "config.json").write_text(json.dumps(config))
    tensors = {
        name: torch.randn([{320: 100_000, 64: 256, 96: 64}.get(n, n) for n in t.shape]).bfloat16()
        if "norm" not in name
        else torch.ones(256 if len(t) == 64 else len(t) * 4)
        for name, t in load_file(source / "model.safetensors").items()
    }
    widened = {n: _square(n, t) for n, t in tensors.items()}
    save_file({n: t.float() for n, t in widened.items()}, source / "model.safetensors")

    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(source), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    rise, size = map(int, done.stdout.split())
    assert size > 200e6
    assert rise < 0.75 * size


def _square(name: str, t: Tensor) -> Tensor:
    """Keys and values have half as many heads."""
    if "k_proj" in name or "v_proj" in name:
        return torch.randn(128, 256)
    return torch.ones(128) if "k_norm" in name else t
