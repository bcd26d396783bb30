"""What a checkpoint consists of; and a manifest of a stranger, who may claim anything."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.config.options import LoadOptions
from moeserve.errors import DataLossError, InvalidRequestError
from moeserve.kernels.select import choose_ops
from moeserve.models.packed.writer import pack_model
from moeserve.pools.weights.counts import WeightCounts
from moeserve.pools.weights.manifest import CHUNK_BYTES, Manifest, manifest_of, read_manifest
from moeserve.pools.weights.offers import HeldCheckpoint


@pytest.fixture
def copied(demo: Manifest, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in demo.files:
        shutil.copy(Path(demo.folder) / file.name, folder)
    return folder


def test_a_copy_is_the_same_checkpoint_and_a_changed_one_is_not(
    demo: Manifest, copied: Path
) -> None:
    (copied / "train.py").write_text("no file of a model")
    assert manifest_of(copied, "demo").id == demo.id
    (copied / "tokenizer_config.json").write_text("{}")
    assert manifest_of(copied, "demo").id != demo.id


def test_chunks_cover_every_byte_once(demo: Manifest) -> None:
    chunks = list(demo.chunks())
    assert sum(chunk.nbytes for chunk in chunks) == demo.nbytes
    assert len({chunk.key for chunk in chunks}) == len(chunks)
    for file in demo.files:
        own = [(c.start, c.start + c.nbytes) for c in chunks if c.file == file.name]
        ends = [0, *(end for _, end in own)]
        assert ends == [*(start for start, _ in own), file.nbytes]
        assert all(end - start <= CHUNK_BYTES for start, end in own)


def test_bytes_that_are_others_the_next_time_are_not_sent(copied: Path) -> None:
    counts = WeightCounts()
    held = HeldCheckpoint(manifest_of(copied, "copy"), counts)
    chunk = next(c for c in held.manifest.chunks() if c.file == "model.safetensors")
    before = held.read(chunk.key)
    assert before == held.read(chunk.key)
    with (copied / chunk.file).open("r+b") as opened:
        opened.seek(chunk.nbytes // 2)
        (was,) = opened.read(1)
        opened.seek(chunk.nbytes // 2)
        opened.write(bytes([was ^ 1]))
    with pytest.raises(DataLossError, match="changed"):
        held.read(chunk.key)
    assert counts.changed == 1


def test_a_manifest_comes_back_as_it_was_written(demo: Manifest) -> None:
    assert read_manifest(demo.to_json()) == demo


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "../x.json"),
        ("name", "/etc/x.json"),
        ("name", "a/b.safetensors"),
        ("name", ".hidden.json"),
        ("name", "x.py"),
        ("name", "x.json\n"),
        ("name", "x\0.json"),
        ("name", 7),
        ("name", None),
        ("nbytes", -1),
        ("nbytes", 1 << 60),
        ("nbytes", 1.5),
        ("nbytes", True),
        ("nbytes", "12"),
    ],
)
def test_a_file_that_no_model_has_is_refused(demo: Manifest, field: str, value: object) -> None:
    found = json.loads(demo.to_json())
    found["files"][0][field] = value
    with pytest.raises(InvalidRequestError):
        read_manifest(json.dumps(found).encode())


@pytest.mark.parametrize(
    "change",
    [
        {"id": "../x"},
        {"id": 3},
        {"files": []},
        {"files": 5},
        {"folder": None},
        {"name": "x" * 9999},
    ],
)
def test_a_manifest_of_no_model_is_refused(demo: Manifest, change: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        read_manifest(json.dumps(json.loads(demo.to_json()) | change).encode())


def test_a_file_that_is_there_twice_is_refused(demo: Manifest) -> None:
    found = json.loads(demo.to_json())
    found["files"] *= 2
    with pytest.raises(InvalidRequestError, match="twice"):
        read_manifest(json.dumps(found).encode())


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_whatever_comes_is_refused_in_our_words(content: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        read_manifest(content)


def test_a_packed_copy_is_another_checkpoint_whose_files_may_travel(
    demo: Manifest, tmp_path: Path
) -> None:
    packed = tmp_path / "packed"
    pack_model(Path(demo.folder), packed, choose_ops(), LoadOptions(quantization="int8"))
    manifest = manifest_of(packed, "demo")
    assert manifest.id != demo.id
    assert {"packed.json", "packed-00001.bin", "config.json"} <= {f.name for f in manifest.files}
    assert read_manifest(manifest.to_json()) == manifest
    stranger = json.loads(manifest.to_json())
    for name in ("packed-1.bin", "weights.bin", "packed-00001.bin.pt"):
        stranger["files"][0]["name"] = name
        with pytest.raises(InvalidRequestError, match="no name of a model's file"):
            read_manifest(json.dumps(stranger).encode())
