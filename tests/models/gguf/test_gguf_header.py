"""A GGUF file is a stranger's: whatever is wrong with it is a CheckpointError, in little memory."""

from __future__ import annotations

import dataclasses
import os
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeserve.errors import CheckpointError
from moeserve.kernels.reference.ops import ReferenceOps
from moeserve.models.checkpoint import Checkpoint, weight_files
from moeserve.models.decoder import load_decoder
from moeserve.models.gguf import header as of_header
from moeserve.models.gguf.header import read_gguf_header
from moeserve.models.gguf.places import gguf_of

one_file = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def small(writer: Any) -> Any:
    """Two tensors and a key of every kind."""
    values = {
        "general.architecture": "qwen3moe",
        "a.flag": True,
        "a.count": 7,
        "a.number": 0.1,
        "a.names": ["one", "two"],
        "a.numbers": [1, 2, 3],
        "a.none": [],
    }
    tensors = {
        "x.weight": writer.plain(torch.arange(6.0).view(2, 3)),
        "y.weight": writer.random_blocks("Q8_0", (2, 64), 0),
    }
    return writer.GgufFile(values, tensors)


def test_everything_is_read(small: Any, tmp_path: Path) -> None:
    for version in (2, 3):
        small.version = version
        found = read_gguf_header(small.save(tmp_path / "a.gguf"))
        assert found.values == small.values
        assert {n: t.shape for n, t in found.tensors.items()} == {
            "x.weight": (2, 3), "y.weight": (2, 64),
        }  # fmt: skip
        assert found.tensors["y.weight"].end == (tmp_path / "a.gguf").stat().st_size - 24


@given(number=st.decimals(-10_000, 10_000, places=4))
def test_numbers_in_fp32_are_the_decimals_they_were(number: Any) -> None:
    stored = struct.unpack("<f", struct.pack("<f", float(number)))[0]
    found = of_header._as_written(stored)
    assert struct.pack("<f", found) == struct.pack("<f", stored)
    if abs(number) < 100:
        assert found == float(number)


@given(value=st.floats(width=32))
def test_any_number_in_fp32_is_read(value: float) -> None:
    found = of_header._as_written(value)
    assert struct.pack("<f", found) == struct.pack("<f", value)


def wrong(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.gguf") as caught:
        read_gguf_header(path)
    assert "\n" not in caught.value.message
    return caught.value.message


def changed(small: Any, **changes: Any) -> bytes:
    return b"".join(dataclasses.replace(small, **changes).header())


def test_what_is_wrong_is_named(small: Any, writer: Any, tmp_path: Path) -> None:
    path, good = tmp_path / "a.gguf", changed(small)
    assert "begins with b'GGML'" in wrong(path, b"GGML" + good[4:])
    assert "version 4" in wrong(path, changed(small, version=4))
    assert "version 50331648" in wrong(path, good[:4] + good[7:3:-1] + good[8:])
    many = struct.pack("<Q", 1 << 40)
    assert "number of tensors: 1099511627776" in wrong(path, good[:8] + many + good[16:])
    assert "number of keys" in wrong(path, good[:16] + many + good[24:])
    assert "a key has" in wrong(path, good[:24] + many + good[32:])
    names = good.index(writer.text("a.names")) + 8 + len("a.names") + 8
    assert "values of key 'a.names'" in wrong(path, good[:names] + many + good[names + 8 :])
    more = struct.pack("<Q", 1 << 20)
    assert "more than the file" in wrong(path, good[:names] + more + good[names + 8 :])
    inner = names - 4
    nested = good[:inner] + struct.pack("<I", 9) + good[inner + 4 :]
    assert "array of type 9" in wrong(path, nested)
    kind = inner - 4
    assert "a value of type 77" in wrong(path, good[:kind] + struct.pack("<I", 77) + good[inner:])
    flag = good.index(writer.text("a.flag")) + 8 + len("a.flag") + 4
    assert "neither true nor false" in wrong(path, good[:flag] + b"\x02" + good[flag + 1 :])
    twice = changed(small, values=small.values | {"a.counT": 7}).replace(b"a.counT", b"a.count")
    assert "key 'a.count' twice" in wrong(path, twice)
    for alignment in (0, 1, 24, 1 << 21, "32", True):
        values = small.values | {"general.alignment": alignment}
        assert "general.alignment=" in wrong(path, changed(small, values=values))
    broken = good.replace(b"qwen3moe", b"qwen3mo\xff")
    assert "is not UTF-8" in wrong(path, broken)


def test_tensors_lie_in_the_file_and_apart(small: Any, writer: Any, tmp_path: Path) -> None:
    path, good = tmp_path / "a.gguf", changed(small)
    entry = good.index(writer.text("y.weight")) + 8 + len("y.weight")
    sizes, kind, offset = entry + 4, entry + 20, entry + 24

    def put(at: int, code: str, number: int) -> bytes:
        packed = struct.pack(f"<{code}", number)
        return good[:at] + packed + good[at + len(packed) :]

    assert "overlap" in wrong(path, put(offset, "Q", 0))
    assert "no multiple of 32" in wrong(path, put(offset, "Q", 33))
    assert "ends at byte" in wrong(path, put(offset, "Q", 64))
    assert "ends at byte" in wrong(path, put(offset, "Q", (1 << 63) + 32))
    assert "has the shape [2, 63]" in wrong(path, put(sizes, "Q", 63))
    assert "has the shape" in wrong(path, put(sizes, "Q", 1 << 60))
    assert "has the shape [0, 64]" in wrong(path, put(sizes + 8, "Q", 0))
    assert "5 dimensions" in wrong(path, put(entry, "I", 5))
    assert "is of type IQ4_XS, which is not read" in wrong(path, put(kind, "I", 23))
    assert "is of type 99, which is not read" in wrong(path, put(kind, "I", 99))
    assert "tensor 'y.weight' twice" in wrong(path, good.replace(b"x.weight", b"y.weight"))
    assert "ends at byte" in wrong(path, good[:-64])


def test_a_header_is_read_up_to_a_bound(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small.save(tmp_path / "a.gguf")
    nbytes = read_gguf_header(path).nbytes
    monkeypatch.setattr(of_header, "MOST_HEADER_BYTES", nbytes)
    read_gguf_header(path)
    monkeypatch.setattr(of_header, "MOST_HEADER_BYTES", nbytes - 1)
    with pytest.raises(CheckpointError, match=f"a header of more than {nbytes - 1} bytes"):
        read_gguf_header(path)


def refused(read: Callable[..., Any], *args: Any) -> str:
    """What a CheckpointError says; nothing where there is none."""
    try:
        read(*args)
    except CheckpointError as error:
        return error.message
    return ""


@one_file
@given(data=st.data())
def test_no_damage_does_anything_but_a_checkpoint_error(
    data: st.DataObject, small: Any, tmp_path: Path
) -> None:
    content = bytearray(changed(small))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)) | st.just(len(content)))
    path = tmp_path / "a.gguf"
    path.write_bytes(content[:cut])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = [refused(read_gguf_header, path), refused(Checkpoint.open, path)]
    assert all(str(path) in message for message in said if message)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


@pytest.fixture(scope="module")
def whole(
    writer: Any,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[bytes, int]:
    """A model, and how long its header is."""
    path = tmp_path_factory.mktemp("whole") / "model.gguf"
    writer.converted(tiny_checkpoint("qwen2_moe")).save(path)
    return path.read_bytes(), read_gguf_header(path).nbytes


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_to_a_model_does_either(
    data: st.DataObject, whole: tuple[bytes, int], tmp_path: Path
) -> None:
    content, path = bytearray(whole[0]), tmp_path / "model.gguf"
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, whole[1] - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with torch.device("meta"):
        assert "\n" not in refused(load_decoder, path, ReferenceOps())


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_no_value_of_a_key_does(
    family: str, sayable: Callable[[str], Path], writer: Any, tmp_path: Path
) -> None:
    """Neither what no model has, nor what is not even a number."""
    made, path = writer.converted(sayable(family)), tmp_path / "m.gguf"
    good, refusals = dict(made.values), 0
    for key in good:
        for value in (0, (1 << 32) - 1, 3e38, "x"):
            made.values = good | {key: value}
            made.save(path)
            with torch.device("meta"):
                said = refused(load_decoder, path, ReferenceOps())
            assert "\n" not in said
            refusals += bool(said)
    assert refusals > 2 * len(good)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "loop", "nothing"])
def test_only_regular_files_are_opened(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "loop":
            path.symlink_to(path)
    with pytest.raises(CheckpointError, match=r"a\.gguf"):
        Checkpoint.open(path)


def test_a_model_in_several_files(
    sayable: Callable[[str], Path], writer: Any, tmp_path: Path
) -> None:
    file = writer.converted(sayable("deepseek_v3"))
    names = list(file.tensors)
    third = len(names) // 3
    parts = (names[:third], names[third : 2 * third], names[2 * third :])
    first = writer.saved(file, tmp_path / "m.gguf", parts)
    second = tmp_path / "m-00002-of-00003.gguf"

    found = Checkpoint.open(first)

    assert found.names == Checkpoint.open(second).names == Checkpoint.open(tmp_path).names
    assert found.total_bytes == sum(f.stat().st_size for f in tmp_path.iterdir())
    assert len(weight_files(tmp_path)) == 3
    third_file = tmp_path / "m-00003-of-00003.gguf"
    content = third_file.read_bytes()
    third_file.write_bytes(second.read_bytes())
    with pytest.raises(CheckpointError, match="says that it is file 1 of 3"):
        Checkpoint.open(first)
    third_file.unlink()
    with pytest.raises(CheckpointError, match=r"m-00003-of-00003\.gguf: missing"):
        Checkpoint.open(first)
    third_file.write_bytes(content)
    again = writer.GgufFile({"split.no": 2, "split.count": 3}, dict([*file.tensors.items()][:1]))
    again.save(third_file)
    with pytest.raises(CheckpointError, match="is in another file of the model too"):
        Checkpoint.open(first)


def test_a_folder_is_its_only_file(small: Any, tmp_path: Path) -> None:
    assert gguf_of(tmp_path) is None
    one = small.save(tmp_path / "one.gguf")
    assert gguf_of(tmp_path) == gguf_of(one) == one
    small.save(tmp_path / "two.gguf")
    with pytest.raises(CheckpointError, match=r"several models \(one\.gguf, two\.gguf\)"):
        gguf_of(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert gguf_of(tmp_path) is None
