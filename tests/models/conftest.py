"""The decoder is tested on every backend that is built: the reference, and the native one."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from moeserve.config.options import LoadOptions
from moeserve.kernels.ops import Ops
from moeserve.kernels.reference.ops import ReferenceOps
from moeserve.kernels.select import choose_ops
from moeserve.models.checkpoint import Checkpoint
from moeserve.models.decoder import Decoder, assemble
from moeserve.models.expert_source import open_experts

ShareOut = Callable[..., None]

BUILT = importlib.util.find_spec("moeserve.kernels.cpu._cpu") is not None


@pytest.fixture(scope="session", params=["reference", "native"] if BUILT else ["reference"])
def ops(request: pytest.FixtureRequest) -> Ops:
    return ReferenceOps() if request.param == "reference" else choose_ops()


def expert_bytes(folder: Path, own: Mapping[int, Sequence[int]], num: int) -> int:
    """What the experts ``own`` take in the files, however they are stored."""
    checkpoint, total = Checkpoint.open(folder), 0
    for name in checkpoint.names:
        found = re.match(r"model\.layers\.(\d+)\..*\.experts\.(?:(\d+)\.)?", name)
        if found is None or int(found[1]) not in own:
            continue
        entry, mine = checkpoint._entries[name], set(own[int(found[1])])
        if found[2] is None:
            total += len(mine) * (entry.end - entry.start) // num
        elif int(found[2]) in mine:
            total += entry.end - entry.start
    return total


def assert_same_experts(
    ops: Ops, own: Mapping[int, Sequence[int]], some: Decoder, whole: Decoder
) -> None:
    """Slot by slot: what an expert makes of rows does not tell who else was loaded."""
    for layer, ids in own.items():
        pair = [d.stack.layers[layer].mlp for d in (some, whole)]
        mine, all_ = (mlp[1].weights.experts for mlp in pair if isinstance(mlp, tuple))
        assert mine.num_experts == len(ids)
        x_TH = torch.randn(3, mine.hidden, generator=torch.Generator().manual_seed(layer))
        ones_T1 = torch.ones(3, 1)
        for slot, expert in enumerate(ids):
            here, there = (torch.full((3, 1), i, dtype=torch.int32) for i in (slot, expert))
            found = ops.moe_ffn(x_TH, mine, here, ones_T1)
            assert torch.equal(found, ops.moe_ffn(x_TH, all_, there, ones_T1)), (layer, expert)


@pytest.fixture
def share_out() -> ShareOut:
    """Two ranks with one expert on both and one twice on a rank: the same experts as in one
    process, and every byte of an expert read once per rank that holds it."""

    def check(folder: Path, ops: Ops, **options: Any) -> None:
        how = LoadOptions(**options)
        checkpoint = Checkpoint.open(folder)
        whole = assemble(checkpoint, ops=ops, options=how)
        layers = whole.spec.moe_layers
        mlp = whole.stack.layers[layers[0]].mlp
        assert isinstance(mlp, tuple)
        num = mlp[0].weights.spec.num_experts
        halves = [[*range(num // 2, -1, -1), 0], [*range(num // 2, num), num - 1]]
        common = checkpoint.bytes_read - expert_bytes(
            folder, dict.fromkeys(layers, range(num)), num
        )
        for half in halves:
            own = {layer: half[layer % 2 :] for layer in layers}
            opened = Checkpoint.open(folder)
            some = assemble(opened, ops=ops, options=how, experts=own)
            assert_same_experts(ops, own, some, whole)
            assert opened.bytes_read == common + expert_bytes(folder, own, num)
            again = open_experts(folder, ops=ops, options=how)
            again.read(layers[-1], own[layers[-1]])
            assert again.bytes_read == expert_bytes(folder, {layers[-1]: own[layers[-1]]}, num)

    return check
