"""The pinned wheel says what ``schemas.txt`` says, and its Meta kernels what the twin gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moeserve.kernels.ascend.schemas import FILE, HEAD, read_schemas, schemas_of, version_of_schemas

pytestmark = pytest.mark.long

SCHEMAS = """
import json, torch, torch_npu
print(json.dumps({n: str(getattr(torch.ops.npu, n).default._schema) for n in NAMES}))
"""
# The calls of ``moeserve.kernels.ascend.calls``, on the device whose name is put in: shapes and
# dtypes of what they give. Twins make theirs of zeros.
SHAPES = """
import json, torch
DEVICE = "@"
if DEVICE == "meta":
    import torch_npu
else:
    from moeserve.kernels.ascend import twin
    library = twin.register()
from concurrent.futures import ThreadPoolExecutor
from moeserve.kernels.ascend import calls
from moeserve.kernels.ascend.buffers import AtlasGeneration
from moeserve.kernels.ascend.calls import EpGroup
def new(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype, device=DEVICE)
bf16, i8, i32, i64 = torch.bfloat16, torch.int8, torch.int32, torch.int64
counts = torch.tensor([3, 1, 2]) if DEVICE == "cpu" else new(3, dtype=i64)
def between(rank):
    group = EpGroup("ranks", 2, rank, 3, 4, AtlasGeneration.A3)
    chosen = new(4, 2, dtype=i32)
    if DEVICE == "cpu":
        chosen[:, 1] = 4
    rest = chosen, new(4, 2), new(4, dtype=torch.bool)
    found = []
    for quantised in (True, False):
        went = calls.distribute(new(4, 1024, dtype=bf16), *rest, group, quantised=quantised)
        found += [went.rows_AH, went.count_S, *went.handle[:2]]
        found.append(calls.collect(new(*went.rows_AH.shape, dtype=bf16), went, *rest, group))
    return found
def on_ranks():
    if DEVICE == "meta":
        return between(0)
    with ThreadPoolExecutor(2) as ranks:
        return list(ranks.map(between, range(2)))[0]
made = {
    "between ranks": on_ranks(),
    "rms_norm": [calls.rms_norm(new(6, 64), new(64), 1e-6)],
    "swiglu": [calls.swiglu(new(6, 64))],
    "clipped_swiglu": [calls.clipped_swiglu(new(6, 64))],
    "quant_matmul": [calls.quant_matmul(new(6, 64, dtype=i8), new(64, 32, dtype=i8), new(1))],
    "matmul": [calls.matmul(new(6, 64), new(64, 32))],
    "grouped int8": [
        calls.grouped_matmul(new(6, 64, dtype=i8), new(3, 64, 32, dtype=i8), counts)
    ],
    "grouped bf16": [
        calls.grouped_matmul(new(6, 64, dtype=bf16), new(3, 64, 32, dtype=bf16), counts)
    ],
    "gating": list(
        calls.gating_top_k(
            new(6, 16), 4, bias_E=new(16), groups=4, topk_groups=2, top2=True, sigmoid=True
        )
    ),
    "routing": list(calls.init_routing(new(6, 64, dtype=i8), new(6), new(6, 2, dtype=i32), 3)),
    "gqa": [
        calls.paged_attention(
            new(6, 4, 128, dtype=bf16), new(5, 128, 256, dtype=bf16), new(5, 128, 256, dtype=bf16),
            rope=None, mask_MM=new(2048, 2048, dtype=torch.bool), ends=[5, 6], contexts=[9, 200],
            blocks_SM=new(2, 2, dtype=i32), kv_heads=2, scale=0.1,
        )
    ],
    "mla": [
        calls.paged_attention(
            new(2, 4, 512, dtype=bf16), new(5, 16, 512, dtype=bf16), new(5, 16, 512, dtype=bf16),
            rope=(new(2, 4, 64, dtype=bf16), new(5, 16, 64, dtype=bf16)), mask_MM=None,
            ends=[1, 2], contexts=[9, 20], blocks_SM=new(2, 2, dtype=i32), kv_heads=1, scale=0.1,
        )
    ],
}
print(json.dumps({n: [[str(x.dtype), list(x.shape)] for x in xs] for n, xs in made.items()}))
"""


def test_the_file_is_what_the_wheel_s_strings_say(wheel: Path) -> None:
    lines = [HEAD.format(version=version_of_schemas()), *schemas_of(wheel).values(), ""]
    assert FILE.read_text() == "\n".join(lines)
    assert f"-{version_of_schemas()}-" in wheel.name


def test_the_wheel_s_own_schemas_are_those_of_the_file(run: Callable[[str], str]) -> None:
    script = SCHEMAS.replace("NAMES", json.dumps(list(read_schemas())))
    found = json.loads(run(script).splitlines()[-1])
    wanted = {n: str(torch._C.parse_schema(f"npu::{line}")) for n, line in read_schemas().items()}
    assert found == wanted


def test_meta_kernels_give_the_shapes_of_the_twin(run: Callable[[str], str]) -> None:
    meta = json.loads(run(SHAPES.replace("@", "meta")).splitlines()[-1])
    twins = json.loads(run(SHAPES.replace("@", "cpu")).splitlines()[-1])
    assert meta == twins
