"""Runs of many caches leave and enter in one call: what the kernels do is what is done block by
block and run by run."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

import pytest
import torch
import xxhash
from torch import Tensor

from moeserve.errors import InternalError
from moeserve.kernels.cpu.ops import CpuOps
from moeserve.kernels.kv_layout import KvBlockLayout
from moeserve.kernels.kv_runs import run_bytes
from moeserve.kernels.ops import KvCache, KvRuns, KvShape, Ops
from moeserve.kernels.reference.ops import ReferenceOps

REFERENCE = ReferenceOps()
BLOCKS, TABLE = 7, (5, 0, 3, 6)
KINDS = [
    (torch.float32, 3, 5, 4, False),
    (torch.bfloat16, 2, 32, 48, False),
    (torch.int8, 2, 21, 13, False),
    (torch.int8, 1, 80, 48, True),
    (torch.bfloat16, 1, 37, 37, True),
]


def caches_of(ops: Ops, size: int, seed: int) -> list[KvCache]:
    """Every position written, the same numbers for every table of operations."""
    torch.manual_seed(seed)
    found = []
    for dtype, heads, head, value, latent in KINDS:
        cache = ops.new_kv(KvShape(BLOCKS, size, heads, head, value, dtype, latent))
        rows = BLOCKS * size
        v = None if latent else torch.randn(rows, heads, value)
        ops.write_kv(cache, torch.randn(rows, heads, head), v, torch.arange(rows))
        found.append(cache)
    return found


def drawn_runs(caches: list[KvCache], size: int, count: int) -> tuple[KvRuns, int]:
    """Of any cache and bounds, none over another, with gaps; and what they take."""
    draw, rows, at = random.Random(size), [], 0
    for i in range(count):
        layer = i % len(caches)
        start = draw.randrange(len(TABLE) * size) if i % 3 else size * draw.randrange(len(TABLE))
        n = min(draw.choice((1, 2, size, 2 * size, 19)), len(TABLE) * size - start)
        rows.append((layer, start, n, at))
        at += run_bytes(KvBlockLayout.of(caches[layer].shape), n) + draw.randrange(3)
    heads = torch.randint(256, (count, 84), dtype=torch.uint8)
    return KvRuns(torch.tensor(rows), heads), at


def everything(ops: Ops, caches: list[KvCache]) -> list[Tensor]:
    return [ops.export_kv(cache, torch.arange(BLOCKS)) for cache in caches]


def test_runs_leave_and_enter_as_block_by_block(native: CpuOps) -> None:
    for size in (16, 32, 5):
        ours, theirs = caches_of(native, size, 1), caches_of(REFERENCE, size, 1)
        runs, total = drawn_runs(ours, size, 40)
        table = torch.tensor(TABLE)
        out, want = torch.zeros(total, dtype=torch.uint8), torch.zeros(total, dtype=torch.uint8)
        digests = native.export_runs(ours, table, runs, out)
        assert torch.equal(digests, REFERENCE.export_runs(theirs, table, runs, want))
        assert torch.equal(out, want), size
        wrong = [3, 11, 39]
        for r in wrong:
            out[runs.runs_R4[r, 3]] ^= 1
        ours, theirs = caches_of(native, size, 2), caches_of(REFERENCE, size, 2)
        right = native.import_runs(ours, table, runs, digests, out)
        assert right.dtype is torch.bool
        assert (~right).nonzero()[:, 0].tolist() == wrong
        assert torch.equal(right, REFERENCE.import_runs(theirs, table, runs, digests, out))
        pairs = zip(everything(native, ours), everything(REFERENCE, theirs), strict=True)
        assert all(torch.equal(mine, other) for mine, other in pairs), size


@pytest.mark.parametrize("head", [17, 40, 63, 64, 84, 128, 256])
def test_digests_are_those_of_the_package(native: CpuOps, head: int) -> None:
    """Of every length that is computed in another way."""
    cache = native.new_kv(KvShape(2, 1024, 1, 2, 1, torch.bfloat16, latent=True))
    native.write_kv(cache, torch.randn(2048, 1, 2), None, torch.arange(2048))
    lengths = [*range(1, 70), *range(250, 270), 511, 512, 513, 1024, 2048]
    rows = [(0, 2048 - n, n, 0) for n in lengths]
    out = torch.empty(4 * 2048, dtype=torch.uint8)
    for row in rows:
        runs = KvRuns(torch.tensor([row]), torch.randint(256, (1, head), dtype=torch.uint8))
        found = native.export_runs([cache], torch.arange(2), runs, out)
        whole = runs.heads_RH.numpy().tobytes() + out[: 4 * row[2]].numpy().tobytes()
        assert found.numpy().tobytes() == xxhash.xxh3_128_digest(whole), row


def test_what_is_not_there_is_refused_and_changes_nothing(native: CpuOps) -> None:
    for ops in (native, REFERENCE):
        caches, table = caches_of(ops, 16, 1), torch.tensor(TABLE)
        before = everything(ops, caches)
        size = run_bytes(KvBlockLayout.of(caches[0].shape), 4)
        good = (0, 0, 4, 0)
        data = torch.zeros(2 * size, dtype=torch.uint8)
        digests = torch.zeros(2, 16, dtype=torch.uint8)
        for bad in (
            (-1, 0, 4, 0), (5, 0, 4, 0), (0, -1, 4, 0), (0, 61, 4, 0), (0, 0, 0, 0),
            (0, 0, -1, 0), (0, 0, 4, -1), (0, 0, 4, size + 1), (0, 1 << 62, 1 << 62, 0),
        ):  # fmt: skip
            runs = KvRuns(torch.tensor([good, bad]), torch.zeros(2, 20, dtype=torch.uint8))
            with pytest.raises(InternalError, match="there is no such cache, block or place"):
                ops.import_runs(caches, table, runs, digests, data)
            with pytest.raises(InternalError, match="there is no such cache, block or place"):
                ops.export_runs(caches, table, runs, data)
        runs = KvRuns(torch.tensor([good]), torch.zeros(1, 20, dtype=torch.uint8))
        for block in (-1, BLOCKS):
            with pytest.raises(InternalError, match=r"a block of .* is not in 0\.\.6"):
                ops.export_runs(caches, torch.tensor([block, 0]), runs, data)
        assert not data.any()
        for a, b in zip(before, everything(ops, caches), strict=True):
            assert torch.equal(a, b)


def test_runs_of_another_shape_are_none() -> None:
    runs, heads = torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 20, dtype=torch.uint8)
    for bad in (
        (runs.int(), heads), (runs, heads.char()), (runs[:1], heads), (runs[:, :3], heads),
        (runs, heads[:, :16]), (runs, torch.zeros(2, 257, dtype=torch.uint8)),
        (runs.T.contiguous().T, heads),
    ):  # fmt: skip
        with pytest.raises(InternalError, match="expected int64"):
            KvRuns(*bad)


def test_positions_of_a_sequence_in_pieces_of_any_size(native: CpuOps) -> None:
    """What enters in pieces that end within blocks is what enters whole."""
    for (kind, size), piece in product([(1, 16), (2, 16), (3, 16), (2, 5)], (1, 3, 7, 16)):
        dtype, heads, head, value, latent = KINDS[kind]
        shape = KvShape(BLOCKS, size, heads, head, value, dtype, latent)
        length = len(TABLE) * size - 2
        source, layout = caches_of(native, size, 1)[kind], KvBlockLayout.of(shape)
        rows, at = [], 0
        for start in range(0, length, piece):
            n = min(piece, length - start)
            rows.append((0, start, n, at))
            at += run_bytes(layout, n)
        runs = KvRuns(torch.tensor(rows), torch.ones(len(rows), 20, dtype=torch.uint8))
        out, table = torch.zeros(at, dtype=torch.uint8), torch.tensor(TABLE)
        digests = native.export_runs([source], table, runs, out)
        target = native.new_kv(replace(shape, num_blocks=4))
        here = torch.tensor([2, 1, 3, 0])
        assert native.import_runs([target], here, runs, digests, out).all()
        one = KvRuns(torch.tensor([(0, 0, length, 0)]), runs.heads_RH[:1])
        first, second = (torch.zeros(at, dtype=torch.uint8) for _ in range(2))
        native.export_runs([source], table, one, first)
        native.export_runs([target], here, one, second)
        assert torch.equal(first, second), (kind, size, piece)
