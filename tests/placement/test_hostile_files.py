"""Files made to harm: each is one error that names it, and takes no more memory than its size lets
expect. Memory is measured in a process of its own, at its highest."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moeserve.engine.replan.live import LivePlan
from moeserve.errors import PlacementError
from moeserve.placement.files import LEAST_BUDGET_BYTES, read_text
from moeserve.placement.formats import runtimes
from moeserve.placement.formats.routing_files import read
from moeserve.placement.plan import Plan, dump, load

# Beyond what the imports take, for files of a few megabytes.
MOST_GROWTH_MIB = 450
READ = """
import resource, sys
from pathlib import Path
from moeserve.errors import PlacementError
from moeserve.placement.formats.routing_files import read
def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
before = peak_mib()
for name in sys.argv[1:]:
    try:
        read(Path(name))
        said = "read"
    except PlacementError as error:
        said = error.message
    print(peak_mib() - before, said.replace("\\n", " "), flush=True)
"""


def npy(header: str, data: bytes = b"") -> bytes:
    """A member of .npz whose header says anything."""
    text = header.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def npz(path: Path, name: str, content: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    raw = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def tensor(shape: tuple[int, int], strides: tuple[int, int]) -> bytes:
    """Of storage 0, as torch.save writes one."""
    storage = b"(" + text("storage") + b"ctorch\nLongStorage\n" + text("0") + text("cpu")
    pairs = [number(a) + number(b) + b"\x86" for a, b in (shape, strides)]
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x04tQK\x00" + b"".join(pairs)


def counts(value: bytes) -> bytes:
    return b"\x80\x02}" + text("logical_count") + value + b"s."


def torch_file(path: Path, skeleton: bytes, method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("dump/data.pkl", skeleton)
        archive.writestr("dump/data/0", bytes(16))


def bomb(path: Path) -> None:
    """A few hundred kilobytes that unpack to 128 MiB of expert ids."""
    shape = "{'descr': '|u1', 'fortran_order': False, 'shape': (262144, 64, 8), }"
    npz(path, "topk_ids.npy", npy(shape, bytes(1 << 27)))


def encrypted(path: Path) -> None:
    npz(path, "topk_ids.npy", npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1, 1, 1), }"))
    content = bytearray(path.read_bytes())
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + at] |= 1
    path.write_bytes(content)


def other_method(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("topk_ids.npy", bytes(1000))


def lying(path: Path) -> None:
    """The header declares 2^40 bytes, and eight follow."""
    shape = "{'descr': '<i8', 'fortran_order': False, 'shape': (137438953472, 1, 1), }"
    npz(path, "topk_ids.npy", npy(shape, bytes(8)))


def far_id(path: Path) -> None:
    np.savez(path, topk_ids=np.array([[[1 << 40]]]), seq_lens=np.array([1]))


def many_experts(path: Path) -> None:
    np.savez(path, topk_ids=np.array([[[1 << 30]]]), seq_lens=np.array([1]))


def objects(path: Path) -> None:
    np.savez(path, topk_ids=np.array([[[print]]], object))


def wrapping_lengths(path: Path) -> None:
    lens = np.array([2**63 - 1, 2**63 - 1, 5], np.int64)
    np.savez(path, topk_ids=np.zeros((3, 1, 1), int), seq_lens=lens)


def domains_of_text(path: Path) -> None:
    np.savez(path, topk_ids=np.zeros((1, 1, 1), int), domain_ids=np.array(["a"]))


def stride_0(path: Path) -> None:
    torch_file(path, counts(tensor((1 << 20, 1 << 12), (0, 0)) + b"\x89}tR"))


def nested_key(path: Path) -> None:
    """A tuple, 300,000 deep, which is to be hashed."""
    torch_file(path, b"\x80\x02})" + b"\x85" * 300_000 + b"Ns.")


def shared_lists(path: Path) -> None:
    """One list, named twice by each of 40 others: 2^40 numbers."""
    skeleton = b"](K\x01K\x02eq\x00"
    for i in range(40):
        skeleton += b"](" + b"h%ch%c" % (i, i) + b"e" + b"q%c" % (i + 1)
    torch_file(path, b"\x80\x02" + skeleton + b"}" + text("logical_count") + b"h\x28s.")


def not_a_list(path: Path) -> None:
    torch_file(path, b"\x80\x02K\x01K\x02a.")


def not_a_dict(path: Path) -> None:
    torch_file(path, b"\x80\x02](K\x01K\x02u.")


def skeleton_bomb(path: Path) -> None:
    torch_file(path, b"\x80\x02](" + b"]" * (1 << 25) + b"e.", zipfile.ZIP_DEFLATED)


def one_record_many_times(path: Path) -> None:
    """A tensor of 8 MiB stands once in the file, and is named 1,000 times."""
    shape = b"K\x01" + number(1 << 18) + b"K\x04\x87" + number(1 << 20) + b"K\x04K\x01\x87"
    storage = (
        b"(" + text("storage") + b"ctorch\nLongStorage\n" + text("0") + text("cpu") + b"K\x04tQ"
    )
    ids = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + shape + b"\x89}tR"
    record = b"}" + text("topk_ids_of_layer") + ids + b"sq\x00"
    skeleton = b"\x80\x02}" + text("records") + b"](" + record + b"h\x00" * 1000 + b"es."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("dump/data.pkl", skeleton)
        archive.writestr("dump/data/0", np.arange(1 << 20).astype("<i8").tobytes())


def header_of_a_gigabyte(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 30) + b"{" + b" " * 1000)


def layers_that_are_none(metadata: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        from safetensors.numpy import save_file

        save_file({"topk_ids": np.zeros((1, 1, 1), np.int32)}, path, {"moe_layers": metadata})

    return write


HOSTILE: list[tuple[str, Callable[[Path], None], str]] = [
    ("a.npz", bomb, "a file of this size may take"),
    ("b.npz", encrypted, "is encrypted"),
    ("c.npz", other_method, "use deflate"),
    ("d.npz", lying, "declares 1099511627776 bytes of numbers, and 8 follow"),
    ("e.npz", far_id, "1 layers of 1099511627777 experts"),
    ("f.npz", many_experts, "1 layers of 1073741825 experts"),
    ("g.npz", objects, "holds objects"),
    ("h.npz", wrapping_lengths, "ragged trace"),
    ("i.npz", domains_of_text, "domain_ids is <U1"),
    ("j.pt", stride_0, "a file of this size may take"),
    ("k.pt", nested_key, "a key is neither text nor number"),
    ("l.pt", shared_lists, "logical_count is no tensor"),
    ("m.pt", not_a_list, "not a readable file written by torch.save"),
    ("n.pt", not_a_dict, "not a readable file written by torch.save"),
    ("o.pt", skeleton_bomb, "data.pkl has 33554438 bytes"),
    ("p.pt", one_record_many_times, "a file of this size may take"),
    ("q.safetensors", header_of_a_gigabyte, "a header of 1073741824 bytes"),
    ("r.safetensors", layers_that_are_none("[" * 100_000), "is no list"),
    ("s.safetensors", layers_that_are_none("[1e400]"), "is no list"),
    ("t.safetensors", layers_that_are_none("[4611686018427387904]"), "at most 1023"),
]


def test_a_hostile_file_is_one_error_and_bounded_memory(tmp_path: Path) -> None:
    paths = []
    for name, write, _ in HOSTILE:
        paths.append(tmp_path / name)
        write(paths[-1])
        assert paths[-1].stat().st_size < LEAST_BUDGET_BYTES >> 3
    done = subprocess.run(
        [sys.executable, "-c", READ, *paths], capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert len(lines) == len(HOSTILE), done.stderr
    for (name, _, says), line in zip(HOSTILE, lines, strict=True):
        grown, _, said = line.partition(" ")
        assert says in said
        assert name in said
        assert len(said) < 500
        assert int(grown) < MOST_GROWTH_MIB, line
    assert not done.stderr


DEEP = "[" * 200_000
DOCUMENTS = [
    ("1" + "0" * 5000, "is not JSON"),
    ('{"logical_count": [[%s, 1]]}' % ("1" + "0" * 400), "count table"),
    ('{"logical_count": [[1e308, 1e308]]}', "more than a number holds"),
    ('{"logical_count": [[[1e308, 1]], [[1e308, 1]]]}', "must be finite"),
    ('{"logical_count": [[Infinity, 1]]}', "must be finite"),
    ('{"logical_count": ' + DEEP, "is not JSON"),
    ('{"logical_count": %s}' % ([[1.0]] * 2000), "2000 layers of 1 experts"),
    ('{"records": [{"topk_ids_of_layer": [[[1099511627776]]]}]}', "experts; at most"),
    ('{"records": [{"topk_ids_of_layer": [[[%s]]]}]}' % ("9" * 400), "expected whole numbers"),
    ('{"records": [{"topk_ids_of_layer": [[[1]], [[]]]}]}', "ragged"),
    ('{"records": [{"topk_ids_of_layer": [[[0.5]]]}]}', "expected whole numbers"),
    ('{"records": [{"topk_ids_of_layer": [[["a"]]]}]}', "expected whole numbers"),
    ('{"%s": 1}' % ("x" * 10_000), "expected records or one of"),
]


@pytest.mark.parametrize(("content", "said"), DOCUMENTS, ids=range(len(DOCUMENTS)))
def test_a_hostile_document_is_one_error(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "counts.json"
    path.write_text(content)
    with pytest.raises(PlacementError, match=said) as caught:
        read(path)
    assert "counts.json" in caught.value.message
    assert len(caught.value.message) < 700


INFINITE = float("inf")
CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"moe_layers": [INFINITE]}, "moe_layers=inf"),
    ({"moe_layers": [2**62]}, "moe_layers=4611686018427387904"),
    ({"moe_layers": [float("nan")]}, "moe_layers=nan"),
    ({"moe_layers": 5}, "must be a list"),
    ({"num_experts": 2**62}, "num_experts=4611686018427387904"),
    ({"num_experts": INFINITE}, "num_experts=inf"),
    ({"num_devices": 10**400}, "num_devices=an integer of more than 128 bits"),
    ({"num_devices": 2**62}, "num_devices=4611686018427387904"),
    ({"num_nodes": -INFINITE}, "num_nodes=-inf"),
    ({"expert_of_slot": [[2**62, 0, 1]]}, "whole numbers"),
    ({"expert_of_slot": [[INFINITE, 0, 1]]}, "whole numbers"),
    ({"expert_of_slot": [[0]] * 2000}, "2000 layers of 1 slots"),
    ({"guide": {"shape": [INFINITE, 1, 1], "uint8": ""}}, "guide's shape=inf"),
    ({"guide": {"shape": [2**62, 2**62, 1], "uint8": ""}}, "guide's shape=46116860184273879"),
    ({"guide": {"shape": [-1, 1, 1], "uint8": "AA=="}}, "guide's shape=-1"),
    ({"guide": {"shape": None, "uint8": "AA=="}}, "malformed plan"),
    ({"guide": []}, "malformed plan"),
    ({"figures": 5}, "malformed plan"),
    ({"dataflow": ["many words"] * 1000}, "malformed plan"),
    ({"version": "v" * 10_000}, "is plan version"),
    ({"k" * 10_000: 1}, "keys differ"),
]


@pytest.mark.parametrize(("change", "said"), CHANGES, ids=range(len(CHANGES)))
def test_a_hostile_plan_is_one_error(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = tmp_path / "plan.json"
    plan = Plan(np.array([[0, 1, 2]], np.int32), 3, 1, 1, (0,))
    path.write_text(json.dumps(json.loads(dump(plan)) | change))
    with pytest.raises(PlacementError, match=said) as caught:
        load(path)
    assert str(path) in caught.value.message
    assert len(caught.value.message) < 500


def test_a_hostile_plan_that_is_read_while_serving_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "plan.json"
    plan = Plan(np.array([[0, 1, 2]], np.int32), 3, 1, 1, (0,))
    proposed: list[Plan] = []
    coordinator: Any = SimpleNamespace(plan=plan, propose=proposed.append)
    live = LivePlan(coordinator, node_R=[0])
    for change, _ in CHANGES:
        path.write_text(json.dumps(json.loads(dump(plan)) | change))
        live.reread(path)
    assert len(caplog.records) == len(CHANGES)
    assert not proposed
    path.write_text(dump(plan))
    live.reread(path)
    assert [dump(found) for found in proposed] == [dump(plan)]


YAML_ROWS = f"a: &a {[1] * 3000}\ninitial_global_assignments:\n"
FOREIGN = [
    ("sglang", '{"physical_to_logical_map": [[Infinity, 0]]}', "whole numbers"),
    ("sglang", '{"physical_to_logical_map": 5}', "no physical_to_logical_map"),
    ("sglang", DEEP, "is not JSON"),
    ("vllm", "[[Infinity, 0]]", "whole numbers"),
    ("vllm", '{"physical_to_logical_map": 5}', "a list of expert ids for each MoE layer"),
    ("vllm", "[[0, 1], 1]", "one list per layer"),
    ("vllm", DEEP, "is not JSON"),
    ("eplb", "", "expected phy2log"),
    ("eplb", "[" * 100_000, "expected phy2log"),
    ("eplb", '{"phy2log": [[0, 1]]}\nnot JSON', "expected phy2log"),
    ("eplb", '{"phy2log": 5}', "expected phy2log"),
    ("eplb", '{"phy2log": [[0, 1e400]]}', "whole numbers"),
    ("ascend", '{"layer_list": [{"layer_id": Infinity, "device_list": []}]}', "not an expert map"),
    ("ascend", '{"layer_list": {"a": 1}}', "not an expert map"),
    ("lightllm", '{"redundancy_expert_num": Infinity}', "not a redundancy config"),
    ("lightllm", '{"redundancy_expert_num": 1, "\u00b2": [0]}', "not a redundancy config"),
    ("tensorrt", YAML_ROWS + "".join(f"  {i}: *a\n" for i in range(2000)), "2000 layers of 3000"),
    ("tensorrt", DEEP[:900], "not a load-balancer file"),
    ("tensorrt", "initial_global_assignments: {.inf: [0, 1]}", "not a load-balancer file"),
    ("tensorrt", "!!python/object/apply:os.system ['true']", "not a load-balancer file"),
]


@pytest.mark.parametrize(("form", "content", "said"), FOREIGN, ids=range(len(FOREIGN)))
def test_a_hostile_plan_of_another_runtime_is_one_error(
    tmp_path: Path, form: str, content: str, said: str
) -> None:
    path = tmp_path / "theirs"
    path.write_text(content)
    with pytest.raises(PlacementError, match=said) as caught:
        runtimes.load(path, form, num_experts=2, num_devices=1)
    assert str(path) in caught.value.message


def test_what_never_ends_is_not_opened(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero"), tmp_path):
        with pytest.raises(PlacementError, match="no regular file"):
            load(path)
    for suffix in (".npz", ".pt", ".safetensors", ".json"):
        os.mkfifo(tmp_path / f"counts{suffix}")
        with pytest.raises(PlacementError, match="no regular file"):
            read(tmp_path / f"counts{suffix}")
    (tmp_path / "long").write_bytes(bytes(11))
    with pytest.raises(PlacementError, match="more than 10 bytes"):
        read_text(tmp_path / "long", 10)


def test_what_numpy_writes_compressed_is_read_whole(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 64, (5000, 4, 1))
    np.savez_compressed(tmp_path / "a.npz", topk_ids=ids.astype(np.int64))
    assert read(tmp_path / "a.npz").tokens_TLK.tolist() == ids.tolist()
