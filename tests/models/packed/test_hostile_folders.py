"""A packed folder may be a stranger's, another machine's, or half of one: an error says so."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeserve.config.options import LoadOptions
from moeserve.errors import CheckpointError
from moeserve.kernels.ops import Ops
from moeserve.models.decoder import load_decoder
from moeserve.models.packed.checkpoint import PackedCheckpoint
from moeserve.models.packed.layout import HEADER, read_packed_header
from moeserve.models.packed.model import PackedModel
from moeserve.models.packed.writer import pack_model, verify_packed

Tiny = Callable[[str], Path]
BIN = "packed-00001.bin"


@pytest.fixture(scope="module")
def made(tiny_checkpoint: Tiny, tmp_path_factory: pytest.TempPathFactory, ops: Ops) -> Path:
    out = tmp_path_factory.mktemp("made") / "packed"
    pack_model(tiny_checkpoint("deepseek_v3"), out, ops, LoadOptions(quantization="int4"))
    return out


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "packed"))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    header = json.loads((folder / HEADER).read_text())
    change(header)
    (folder / HEADER).write_text(json.dumps(header))


def put(*way: str | int, value: object) -> Callable[[dict[str, Any]], None]:
    def change(header: Any) -> None:
        for step in way[:-1]:
            header = header[step]
        header[way[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("version", value=2), "version 2"),
        (put("packing", value="panels of 64 rows"), "packed for panels of 64 rows"),
        (put("byte_order", value="big"), "big-endian"),
        (put("surprise", value=1), "surprise"),
        (put("files", value={}), "0 files"),
        (put("files", "../../etc/passwd", value=4096), "a file '../../etc/passwd'"),
        (put("files", "packed-a.bin", value=4096), "packed-a.bin"),
        (put("ends", "region", "start", value=-4096), "does not lie in"),
        (put("ends", "region", "start", value=64), "does not lie in"),
        (put("ends", "region", "nbytes", value=1 << 40), "does not lie in"),
        (put("ends", "region", "nbytes", value=4096), "beyond its region|packed as"),
        (put("ends", "region", "file", value="packed-00009.bin"), "does not lie in"),
        (put("ends", "leaves", "embedding", "shape", value=[1 << 40, 8]), "packed as"),
        (put("ends", "leaves", "embedding", "dtype", value="int8"), "leaves"),
        (put("ends", "leaves", "extra", value={"dtype": "float32", "shape": [1]}), "other parts"),
        (put("layers", value=[]), "0 layers"),
        (put("layers", 0, "trunk", "leaves", value={}), "other parts"),
        (put("layers", 0, "trunk", "leaves", "attention.o", "kind", value="int2"), "kind"),
        (put("layers", 0, "trunk", "leaves", "attention.o", "in_features", value=1 << 30), "as"),
        (put("layers", 0, "trunk", "leaves", "attention.o", "count", value=7), "packed as"),
        (put("layers", 0, "trunk", "leaves", "attention.o", "biased", value=True), "packed as"),
        (put("layers", 0, "trunk", "leaves", "attention.o", "zero", value=99), "no matrix is"),
        (put("layers", -1, "experts", value=None), "implies others"),
        (put("layers", -1, "experts", "digests", value=["00"]), "implies others"),
        (put("layers", -1, "experts", "nbytes", value=4096 * 64), "not as their form|not lie"),
        (put("layers", -1, "experts", "form", "down", "group", value=1), "not as their form"),
        (put("layers", -1, "experts", "form", "down", "levels", value=[1]), "no matrix is"),
    ],
)
def test_a_header_that_says_something_else(
    folder: Path, ops: Ops, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    edit(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load_decoder(folder, ops)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"\xff" * 100, b"[" * 100_000, b"1" * (9 << 20)]
)
def test_a_header_that_is_none(folder: Path, ops: Ops, content: bytes) -> None:
    (folder / HEADER).write_bytes(content)
    with pytest.raises(CheckpointError, match=HEADER):
        load_decoder(folder, ops)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_value_anywhere_is_read_or_refused(made: Path, ops: Ops, data: st.DataObject) -> None:
    """Whatever a header says, loading ends in a decoder or an error of ours."""
    folder = made.parent / "spoiled"
    if not folder.exists():
        shutil.copytree(made, folder)
    header = json.loads((made / HEADER).read_text())
    place: Any = header
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    numbers = st.integers(-(2**70), 2**70) | st.sampled_from([0, 1, 63, 64, 4096, 2**31, 2**40])
    values = st.none() | st.booleans() | numbers | st.text(max_size=4) | st.just([]) | st.just({})
    place[key] = data.draw(values)
    (folder / HEADER).write_text(json.dumps(header))
    with contextlib.suppress(CheckpointError):
        load_decoder(folder, ops)


def test_a_file_that_is_short_or_missing(folder: Path, ops: Ops) -> None:
    size = (folder / BIN).stat().st_size
    os.truncate(folder / BIN, size - 4096)
    with pytest.raises(CheckpointError, match=f"{size - 4096} bytes, packed.json says {size}"):
        load_decoder(folder, ops)
    (folder / BIN).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_decoder(folder, ops)
    os.mkfifo(folder / BIN)
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_decoder(folder, ops)


def test_a_config_of_another_model(folder: Path, ops: Ops, tiny_checkpoint: Tiny) -> None:
    shutil.copy(tiny_checkpoint("mixtral") / "config.json", folder)
    with pytest.raises(CheckpointError, match=r"pack the model again|packed as|is missing"):
        load_decoder(folder, ops)


def test_bytes_that_changed_are_found(folder: Path) -> None:
    region = read_packed_header(folder).layers[-1].experts
    assert region is not None
    assert verify_packed(folder) > 1
    with (folder / BIN).open("r+b") as opened:
        opened.seek(region.start + region.nbytes + 3)
        byte = opened.read(1)
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte[0] ^ 1]))
    with pytest.raises(CheckpointError, match=r"expert 1 .* is not what was written"):
        verify_packed(folder)


@pytest.mark.parametrize("how", ["written", "replaced", "truncated", "removed"])
def test_a_file_that_changes_while_it_is_open(folder: Path, ops: Ops, how: str) -> None:
    opened, model = PackedCheckpoint.open(folder), PackedModel.open(folder, ops)
    opened.require_unchanged()
    file = folder / BIN
    if how == "written":
        content = file.read_bytes()
        file.write_bytes(content)
        os.utime(file, ns=(0, 1))
    elif how == "replaced":
        shutil.copy2(file, folder / "other")
        (folder / "other").rename(file)
    elif how == "truncated":
        os.truncate(file, 4096)
    else:
        file.unlink()
    for source in (opened, model):
        with pytest.raises(CheckpointError, match=r"changed since|cannot be read"):
            source.require_unchanged()


def test_a_map_cannot_be_written_to(folder: Path) -> None:
    checkpoint = PackedCheckpoint.open(folder)
    before = (folder / BIN).read_bytes()
    maps = Path("/proc/self/maps")
    memory = checkpoint.mapped(BIN)
    line = next(x for x in maps.read_text().splitlines() if str(folder / BIN) in x)
    assert line.split()[1] == "r--s"
    assert bytes(memory.numpy()) == before
