"""KV blocks leave a cache as bytes and enter another: attention over them is the same bits."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from moeserve.errors import InternalError
from moeserve.kernels.cpu.ops import CpuOps
from moeserve.kernels.kv_layout import KvBlockLayout
from moeserve.kernels.matrix import quantize_rows
from moeserve.kernels.ops import AttentionBatch, KvCache, KvShape, Ops
from moeserve.kernels.reference.ops import ReferenceOps

REFERENCE = ReferenceOps()
BLOCKS = 4
DTYPES = (torch.float32, torch.bfloat16, torch.int8)
GQA = KvShape(BLOCKS, 16, 3, 21, 13, torch.bfloat16)
MLA = KvShape(BLOCKS, 16, 1, 37, 22, torch.bfloat16, latent=True)
ALL_VALUE = replace(MLA, value_size=37)  # a latent without a rotated part
SHAPES = [
    replace(shape, dtype=dtype, block_size=size)
    for shape, dtype, size in product((GQA, MLA, ALL_VALUE), DTYPES, (16, 5))
]
# Sizes of which all, or some, is copied in tiles of 16 positions.
SHAPES += [
    replace(shape, dtype=dtype, block_size=size)
    for shape, dtype, size in product(
        (
            replace(GQA, head_size=32, value_size=32),
            replace(GQA, head_size=48, value_size=37),
            replace(GQA, head_size=36, value_size=16),
            replace(MLA, head_size=80, value_size=48),
            replace(MLA, head_size=40, value_size=36),
        ),
        DTYPES[1:],
        (16, 32),
    )
]


def filled(ops: Ops, shape: KvShape, scale: float = 1.0) -> KvCache:
    """Every position written, the same numbers for every table of operations."""
    torch.manual_seed(7)
    cache, rows = ops.new_kv(shape), shape.num_blocks * shape.block_size
    k = torch.randn(rows, shape.kv_heads, shape.head_size) * scale
    v = None if shape.latent else torch.randn(rows, shape.kv_heads, shape.value_size) * scale
    ops.write_kv(cache, k, v, torch.arange(rows))
    return cache


def attended(ops: Ops, cache: KvCache, blocks: list[int]) -> Tensor:
    """The last two tokens of a sequence in these blocks, the last of which is not full."""
    torch.manual_seed(8)
    shape = cache.shape
    q = torch.randn(2, 2 * shape.kv_heads, shape.head_size)
    context = len(blocks) * shape.block_size - 2
    batch = AttentionBatch(
        torch.tensor([0, 2]).int(), torch.tensor([context]).int(), torch.tensor([blocks]).int()
    )
    return ops.paged_attention(q, cache, batch, scale=shape.head_size**-0.5)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_blocks_enter_another_cache_in_other_places(native: CpuOps) -> None:
    """There, and in a cache of the other backend that then exports them again."""
    leave, enter = [2, 0, 3], [1, 6, 4]
    for shape in SHAPES:
        for ops in (native, REFERENCE):
            source = filled(ops, shape)
            data = ops.export_kv(source, torch.tensor(leave))
            for between in (native, REFERENCE):
                relay = between.new_kv(replace(shape, num_blocks=3))
                between.import_kv(relay, torch.arange(3), data)
                again = between.export_kv(relay, torch.arange(3))
                assert torch.equal(again, data), (shape, ops.name, between.name)
                target = filled(ops, replace(shape, num_blocks=7), scale=100.0)
                ops.import_kv(target, torch.tensor(enter), again)
                moved, stayed = attended(ops, target, enter), attended(ops, source, leave)
                assert same_bits(moved, stayed), (shape, ops.name, between.name)


def test_an_import_touches_no_other_block(native: CpuOps) -> None:
    for shape in SHAPES:
        for ops in (native, REFERENCE):
            cache, everywhere = filled(ops, shape), torch.arange(BLOCKS)
            before = ops.export_kv(cache, everywhere)
            ops.import_kv(cache, torch.tensor([2]), before[:1])
            before[2] = before[0]
            assert torch.equal(ops.export_kv(cache, everywhere), before), (shape, ops.name)


def test_backends_export_the_same_bytes(native: CpuOps) -> None:
    for shape in SHAPES:
        ours, theirs = (
            ops.export_kv(filled(ops, shape), torch.tensor([3, 1])) for ops in (native, REFERENCE)
        )
        assert torch.equal(ours, theirs), shape


def test_the_bytes_are_as_the_layout_describes_them(native: CpuOps) -> None:
    torch.manual_seed(9)
    shape = replace(GQA, num_blocks=1, dtype=torch.int8)
    k, v = torch.randn(16, 3, 21), torch.randn(16, 3, 13)
    cache = native.new_kv(shape)
    native.write_kv(cache, k, v, torch.arange(16))
    layout = KvBlockLayout.of(shape)
    keys, values, scales = layout.sections
    assert (keys.start, values.start, scales.start) == (0, 16 * 3 * 21, 16 * 3 * (21 + 13))
    assert layout.nbytes == 16 * 3 * (21 + 13 + 2 * 4)
    sections = layout.split(native.export_kv(cache, torch.tensor([0])))
    for name, x, s in (("keys", k, 0), ("values", v, 1)):
        codes, scale = quantize_rows(x.flatten(0, 1))
        assert torch.equal(sections[name].flatten(0, 2), codes)
        assert torch.equal(sections["scales"][..., s].flatten(), scale)
    whole = KvBlockLayout.of(replace(MLA, dtype=torch.float32))
    assert [s.name for s in whole.sections] == ["keys"]
    assert whole.nbytes == 16 * 37 * 4


def test_rows_too_small_for_a_code_are_zero(native: CpuOps) -> None:
    """127 over a number below 2^-100 may be no number: such rows have scale 0, keys and values."""
    for shape, most in product((GQA, MLA), (1e-45, 1e-38, 2.0**-101)):
        small = replace(shape, dtype=torch.int8)
        ours, theirs = (filled(ops, small, scale=most / 8) for ops in (native, REFERENCE))
        everywhere = torch.arange(BLOCKS)
        data = native.export_kv(ours, everywhere)
        assert torch.equal(data, REFERENCE.export_kv(theirs, everywhere)), (shape, most)
        assert not data.any()
        out = attended(native, ours, [0, 1])
        assert torch.equal(out, torch.zeros_like(out))
        assert torch.equal(out, attended(REFERENCE, theirs, [0, 1]))


def test_bytes_of_another_size_are_refused_and_change_nothing(native: CpuOps) -> None:
    for ops in (native, REFERENCE):
        cache, everywhere = filled(ops, GQA), torch.arange(BLOCKS)
        data, two = ops.export_kv(cache, everywhere), torch.tensor([0, 1])
        size = KvBlockLayout.of(GQA).nbytes
        for wrong in (data, data[:2, :-1], data[:1], data[:2].view(torch.int8), data[:2].flatten()):
            with pytest.raises(InternalError, match=f"are not 2 KV blocks of {size} bytes") as told:
                ops.import_kv(cache, two, wrong)
            assert str(list(wrong.shape)) in told.value.message
        for block in (-1, BLOCKS):
            blocks = torch.tensor([0, block])
            with pytest.raises(InternalError, match=r"import_kv: a block of .* is not in 0\.\.3"):
                ops.import_kv(cache, blocks, data[:2] * 0)
            with pytest.raises(InternalError, match=r"export_kv: a block of .* is not in 0\.\.3"):
                ops.export_kv(cache, blocks)
        assert torch.equal(ops.export_kv(cache, everywhere), data)
        assert ops.export_kv(cache, torch.tensor([], dtype=torch.int64)).shape == (0, size)
