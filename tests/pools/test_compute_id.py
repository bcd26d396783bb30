"""Members of one id compute the same bits; whatever may change numbers changes the id."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moeserve.config.options import LoadOptions
from moeserve.errors import CheckpointError
from moeserve.kernels.select import choose_ops
from moeserve.models.packed.writer import pack_model
from moeserve.pools.compute_id import compute_id

PLAIN = LoadOptions()


@pytest.fixture
def folder(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint("deepseek_v3"), tmp_path / "model"))


def test_the_id_is_of_the_content_and_not_of_the_place(folder: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(folder, tmp_path / "again"))
    assert compute_id(folder, PLAIN, "cpu") == compute_id(again, PLAIN, "cpu")


@pytest.mark.parametrize(
    "other",
    [
        LoadOptions(kv_dtype="int8"),
        LoadOptions(quantization="int8"),
        LoadOptions(quantization="int8", quantize_attention=False),
        LoadOptions(dtype="float32"),
        LoadOptions(combine="ordered"),
    ],
)
def test_settings_that_change_numbers_change_it(folder: Path, other: LoadOptions) -> None:
    ids = {compute_id(folder, options, "cpu") for options in (PLAIN, other)}
    assert len(ids) == 2


def test_other_kernels_have_another(folder: Path) -> None:
    assert compute_id(folder, PLAIN, "cpu avx2") != compute_id(folder, PLAIN, "cpu avx512")


def test_weights_of_the_same_shapes_have_another(folder: Path) -> None:
    before = compute_id(folder, PLAIN, "cpu")
    (file,) = folder.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    header = int.from_bytes(content[:8], "little")
    tensors = json.loads(content[8 : 8 + header])
    tensors.pop("__metadata__", None)
    name, found = next(iter(tensors.items()))
    start, end = found["data_offsets"]
    content[8 + header + (start + end) // 2] ^= 1
    file.write_bytes(content)
    assert compute_id(folder, PLAIN, "cpu") != before, name


def test_another_configuration_has_another(folder: Path) -> None:
    before = compute_id(folder, PLAIN, "cpu")
    file = folder / "config.json"
    file.write_text(file.read_text().replace("{", '{"rope_theta": 5, ', 1))
    assert compute_id(folder, PLAIN, "cpu") != before


def test_what_is_no_checkpoint_is_named(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"safetensors: not safetensors"):
        compute_id(folder, PLAIN, "cpu")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        compute_id(folder, PLAIN, "cpu")


@pytest.mark.parametrize("made", [PLAIN, LoadOptions(quantization="int8", dtype="bfloat16")])
def test_a_packed_folder_computes_what_it_was_made_from_computes(
    folder: Path, tmp_path: Path, made: LoadOptions
) -> None:
    packed = tmp_path / "packed"
    pack_model(folder, packed, choose_ops(), made)
    for kv in ("auto", "int8"):
        served = PLAIN.model_copy(update={"kv_dtype": kv})
        plain = made.model_copy(update={"kv_dtype": kv})
        assert compute_id(packed, served, "cpu") == compute_id(folder, plain, "cpu")
    assert compute_id(packed, made, "cpu") == compute_id(folder, made, "cpu")
    with pytest.raises(CheckpointError, match="packed with"):
        compute_id(packed, LoadOptions(quantization="int4"), "cpu")
