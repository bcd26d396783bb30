"""A model folder is data: what is no regular file, or too long, is one error that names it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moeserve.errors import CheckpointError, MoeserveError
from moeserve.models import files
from moeserve.models.checkpoint import Checkpoint
from moeserve.models.files import most_bytes, read_bounded, read_json
from moeserve.models.fingerprint import fingerprint
from moeserve.models.tokenizer import Tokenizer
from moeserve.safetensors_header import MOST_HEADER_BYTES

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("mixtral"), copy)
    return copy


def read_everything(folder: Path) -> None:
    Checkpoint.open(folder)
    Tokenizer.load(folder)
    fingerprint(folder)


def replace(file: Path, kind: str) -> None:
    file.unlink(missing_ok=True)
    match kind:
        case "fifo":
            os.mkfifo(file)
        case "device":
            file.symlink_to("/dev/zero")
        case "folder":
            file.mkdir()
        case "loop":
            file.symlink_to(file)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "loop"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", WEIGHTS])
def test_only_regular_files_are_opened(folder: Path, name: str, kind: str) -> None:
    replace(folder / name, kind)
    with pytest.raises(MoeserveError, match=name) as caught:
        read_everything(folder)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("name", [INDEX, "tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_so_are_files_that_need_not_be_there(folder: Path, name: str, kind: str) -> None:
    replace(folder / name, kind)
    with pytest.raises(MoeserveError, match=name):
        read_everything(folder)


def test_links_to_regular_files_are_followed(folder: Path) -> None:
    for name in ("config.json", "tokenizer.json", WEIGHTS):
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)
    read_everything(folder)


def test_a_file_is_read_up_to_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_MOST_OTHERS", 1 << 20)
    file = tmp_path / "some.json"
    file.write_bytes(b" " * ((1 << 20) - 2) + b"{}")
    assert read_json(file, required=True) == {}
    file.write_bytes(b" " * (1 << 20) + b"{}")
    with pytest.raises(CheckpointError, match=r"some\.json: longer than 1 MiB"):
        read_bounded(file)


def test_values_of_a_file_are_counted_before_they_are_made(tmp_path: Path) -> None:
    file = tmp_path / "some.json"
    file.write_bytes(b'{"a":[' + b"[]," * (files.MOST_VALUES // 2) + b"[]]}")
    with pytest.raises(CheckpointError, match=r"some\.json: more than 1048576 values"):
        read_json(file, required=True)


def test_bounds_leave_room_for_the_largest_models() -> None:
    """DeepSeek-V3's index has 8.9 MB, Kimi-K2's 13 MB; the largest tokenizers have 33 MB."""
    sizes = {"config.json": 1 << 20, "tokenizer.json": 33 << 20, INDEX: 13 << 20}
    assert all(2 * size < most_bytes(Path(name)) for name, size in sizes.items())


@pytest.mark.parametrize("read", [Checkpoint.open, fingerprint], ids=["open", "fingerprint"])
def test_a_header_is_measured_before_it_is_read(
    folder: Path, read: Callable[[Path], object]
) -> None:
    length = MOST_HEADER_BYTES + 8
    with (folder / WEIGHTS).open("wb") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(8 + length)  # a hole, which would be read as so many zeros
    with pytest.raises(CheckpointError, match=f"a header of {length} bytes, at most"):
        read(folder)
