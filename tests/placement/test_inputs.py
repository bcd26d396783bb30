"""Routing is read from every format, and what is wrong with a file is said by name."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from moeserve.errors import PlacementError
from moeserve.placement.formats.routing_files import read, read_all
from moeserve.placement.routing import Routing, split, workload_of_tokens

IDS = np.array([[[0, 1], [2, 3]], [[1, 2], [3, 0]], [[3, 1], [0, 1]]], np.int16)


def test_a_trace_is_read_from_npz(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    np.savez(path, topk_ids=IDS.astype(np.uint8), seq_lens=np.array([1, 2]))
    routing = read(path)
    assert routing.tokens_TLK.tolist() == IDS.tolist()
    assert routing.seq_lens_C.tolist() == [1, 2]
    assert routing.workloads[0].load_LE.tolist() == [[1, 3, 1, 1], [2, 1, 1, 2]]


def test_a_recording_names_its_experts_and_layers(tmp_path: Path) -> None:
    path = tmp_path / "trace.safetensors"
    arrays = {"topk_ids": IDS, "seq_lens": np.array([3], np.int32),
              "domain_ids": np.array([0], np.int32)}  # fmt: skip
    save_file(arrays, path, {"num_experts": "8", "moe_layers": "[1, 2]", "domains": '["chat"]'})
    routing = read(path)
    assert routing.num_experts == 8
    assert routing.moe_layers == (1, 2)


@pytest.mark.parametrize("name", ["logical_count", "expert_load"])
def test_counts_are_read_without_their_dense_layers(tmp_path: Path, name: str) -> None:
    path = tmp_path / "counts.json"
    path.write_text(json.dumps({name: [[0, 0], [1, 3], [2, 2]]}))
    routing = read(path)
    assert routing.moe_layers == (1, 2)
    assert routing.workloads[0].load_LE.tolist() == [[1, 3], [2, 2]]


def test_counts_of_several_steps_are_added(tmp_path: Path) -> None:
    path = tmp_path / "counts.json"
    path.write_text(json.dumps([[[1, 3]], [[2, 2]]]))
    assert read(path).workloads[0].load_LE.tolist() == [[3, 5]]


def test_files_of_one_model_agree_on_its_experts(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", topk_ids=IDS, seq_lens=np.array([3]))
    np.savez(tmp_path / "b.npz", topk_ids=IDS + 4, seq_lens=np.array([3]))
    routing = read_all([f"{tmp_path}/a.npz:weight=3", f"{tmp_path}/b.npz"])
    assert routing.num_experts == 8
    assert [w.weight for w in routing.workloads] == [3.0, 1.0]
    assert routing.mix_W.tolist() == [0.75, 0.25]
    assert routing.mixed_LE.sum(axis=1) == pytest.approx([1.0, 1.0])


def torch_file(path: Path, skeleton: bytes, storages: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("dump/data.pkl", skeleton)
        for key, raw in storages.items():
            archive.writestr(f"dump/data/{key}", raw)
    return path


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def count_dump() -> bytes:
    """The skeleton of ``{"logical_count": tensor of shape [2, 2]}`` as torch.save writes it."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
    storage += b"K\x04tQ"
    shape, strides = b"K\x02K\x02\x86", b"K\x02K\x01\x86"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n((" + storage[1:] + b"K\x00" + shape + strides
    return b"\x80\x02}(" + text("logical_count") + tensor + b"\x89}tRu."


def test_a_recorder_dump_is_read_without_running_it(tmp_path: Path) -> None:
    raw = struct.pack("<4f", 1, 3, 2, 2)
    path = torch_file(tmp_path / "dump.pt", count_dump(), {"0": raw})
    assert read(path).workloads[0].load_LE.tolist() == [[1, 3], [2, 2]]


def test_a_dump_written_by_torch_itself_is_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    ids = torch.tensor(IDS.transpose(1, 0, 2).astype(np.int64))
    padded = torch.cat([ids, torch.full((2, 1, 2), -1)], dim=1)
    torch.save({"records": [{"topk_ids_of_layer": padded}] * 2}, tmp_path / "dump.pt")
    routing = read(tmp_path / "dump.pt")
    assert routing.seq_lens_C.tolist() == [3, 3]
    assert routing.tokens_TLK.tolist() == [*IDS.tolist(), *IDS.tolist()]


@pytest.mark.parametrize(
    "skeleton",
    [
        b"\x80\x02cos\nsystem\n" + text("true") + b"\x85R.",
        b"\x80\x02cbuiltins\neval\n" + text("1") + b"\x85R.",
        b"\x80\x02(i__main__\nThing\n.",
        count_dump().replace(b"K\x02K\x02\x86", b"K\x09K\x02\x86"),
        b"\x80\x02}",
        b"",
        b"\x80\x02R.",
    ],
)
def test_a_hostile_dump_is_refused(tmp_path: Path, skeleton: bytes) -> None:
    path = torch_file(tmp_path / "dump.pt", skeleton, {"0": b"\0" * 16})
    with pytest.raises(PlacementError, match=r"dump\.pt"):
        read(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"logical_count": [[1, NaN]]}', "must be finite"),
        ('{"logical_count": [[1, -2]]}', "negative"),
        ('{"logical_count": [[1, 2], [3]]}', "ragged"),
        ('{"logical_count": [[0, 0]]}', "all counts are zero"),
        ('{"logical_count": "many"}', "non-numeric"),
        ('{"something": 1}', "expected records or one of"),
        ("{", "is not JSON"),
        ("3", "expected an object"),
        ('{"records": []}', "records is empty"),
        ('{"records": [{"global_physical_count": 1}]}', "per_token"),
    ],
)
def test_a_bad_count_file_is_refused(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(PlacementError, match=said):
        read(path)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"topk_ids": IDS, "seq_lens": np.array([1, 1])}, "ragged trace"),
        ({"topk_ids": IDS[0], "seq_lens": np.array([1])}, r"expected \[tokens, layers, k\]"),
        ({"topk_ids": IDS.astype(float), "seq_lens": np.array([3])}, "expected integers"),
        ({"topk_ids": IDS * 0, "seq_lens": np.array([3])}, "chose one expert twice"),
        ({"topk_ids": IDS - 5, "seq_lens": np.array([3])}, "unknown expert"),
        ({"elsewhere": IDS}, "expected topk_ids"),
    ],
)
def test_a_bad_trace_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray], said: str) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(PlacementError, match=said):
        read(path)


@pytest.mark.parametrize("name", ["t.npz", "t.safetensors", "t.pt", "t.json", "t.csv", "none.npz"])
def test_a_corrupt_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    if name != "none.npz":
        (tmp_path / name).write_bytes(b"PK\x03\x04 not what it says \xff")
    with pytest.raises(PlacementError, match=name):
        read(tmp_path / name)


def test_an_unknown_expert_is_named() -> None:
    with pytest.raises(PlacementError, match="unknown expert 3; the model has 3"):
        workload_of_tokens("t", IDS, None, num_experts=3)


def test_whole_sequences_are_held_out() -> None:
    ids = np.tile(IDS, (4, 1, 1))
    lens = np.array([3, 3, 3, 3])
    whole = Routing((workload_of_tokens("t", ids, lens),), (0, 1))
    fitted, held = split(whole, 0.25)
    assert held is not None
    assert fitted.seq_lens_C.tolist() == [3, 3, 3]
    assert held.tokens_TLK.tolist() == IDS.tolist()
    assert split(whole, 0.0)[1] is None
