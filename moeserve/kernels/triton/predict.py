"""How long kernels would take on an H200: predictions, for there was none to measure on.

A kernel takes the longest of three, and ``LAUNCH_S`` beside: its bytes at the bandwidth that was
read once; its tensor multiplications at the stated peak (``mma.sync`` at the share of it that was
measured on an H100, arXiv 2402.13499); and the issue slots of all its warps, from the instructions
of its compiled code (``instructions``) for tensor kernels. Programs are dealt to multiprocessors in
whole. What is not known here: latencies, bank conflicts, how far loads hide behind products,
clocks under load. So a prediction is what nothing forbids, not what is promised.

Letters: see ``ops``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import ceil

import torch

from moeserve.kernels.ops import ATTENTION_SEGMENT
from moeserve.kernels.records import WeightKind
from moeserve.kernels.triton import aot, variants
from moeserve.kernels.triton.instructions import Profile, profile
from moeserve.kernels.triton.tiles import Tile, query_tile, tile_of

TARGET = "cuda:90"
BANDWIDTH, CLOCK, SMS, SCHEDULERS = 4.3e12, 1.755e9, 132, 4
# Multiplications of a multiprocessor and clock, by codes or not.
TENSOR = {True: 4096.0, False: 2048.0}
MMA_SYNC = 0.62
LAUNCH_S = 2e-6  # from one kernel of a graph to the next: assumed
ITEM = {WeightKind.INT8: 1, WeightKind.BF16: 2, WeightKind.FP32: 4}


@dataclass(frozen=True)
class Taken:
    """Seconds of kernels in turn: by what binds each, and in all; ``bytes`` and launches."""

    seconds: float
    memory_s: float
    tensor_s: float
    issue_s: float
    nbytes: float
    launches: int

    @property
    def by(self) -> str:
        parts = {
            "memory": self.memory_s, "tensor": self.tensor_s, "issue": self.issue_s,
            "launches": self.launches * LAUNCH_S,
        }  # fmt: skip
        return max(parts, key=lambda name: parts[name])


def together(parts: Iterable[Taken], times: int = 1) -> Taken:
    rows = [(t.seconds, t.memory_s, t.tensor_s, t.issue_s, t.nbytes, t.launches) for t in parts]
    return Taken(*(times * sum(column) for column in zip(*rows, strict=True)))


@dataclass(frozen=True)
class Tensored:
    """A compiled kernel with tensor instructions."""

    profile: Profile
    warps: int
    codes: bool


@cache
def product(which: str, kind: WeightKind, tile: Tile) -> Tensored:
    return compiled(variants.product(which, kind, tile))


@cache
def attending(shape: variants.AttentionShape, dtype: torch.dtype) -> Tensored:
    """Without the second, guarded walk over values that are not finite."""
    found = variants.attention(shape, dtype, "cuda")
    return compiled(replace(found, constants=found.constants | {"SHARED": False}))


def compiled(which: variants.Variant) -> Tensored:
    found = profile(aot.asked("-sass", aot.compile_for(which, TARGET).asm))
    return Tensored(found, which.options["num_warps"], which.integer)


def tensor_kernel(kernel: Tensored, programs: float, products: float, nbytes: float) -> Taken:
    """Of so many programs with so many multiplications each."""
    rounds, warps = ceil(programs / SMS), kernel.warps
    rate = TENSOR[kernel.codes] * (1.0 if kernel.profile.group else MMA_SYNC)
    tensor = rounds * products / rate / CLOCK
    issue = rounds * kernel.profile.slots(products / warps) * warps / SCHEDULERS / CLOCK
    return one(nbytes, tensor, issue)


def one(nbytes: float, tensor_s: float = 0.0, issue_s: float = 0.0) -> Taken:
    """Of a kernel; without more, of one that only moves bytes."""
    memory = nbytes / BANDWIDTH
    longest = max(memory, tensor_s, issue_s)
    return Taken(longest + LAUNCH_S, memory, tensor_s, issue_s, nbytes, 1)


def linear(kind: WeightKind, rows: int, out: int, into: int) -> Taken:
    """With the quantisation before it, where weights are codes."""
    tile = tile_of(kind, rows)
    programs = -(-rows // tile.rows) * -(-out // tile.out)
    codes = kind is WeightKind.INT8
    nbytes = out * into * ITEM[kind] + rows * (into * (1 if codes else 4) + 4 * out)
    kernel = product("linear", kind, tile)
    taken = tensor_kernel(kernel, programs, tile.rows * tile.out * into, nbytes)
    return together([quantize(rows, into), taken] if codes else [taken])


def quantize(rows: float, size: int) -> Taken:
    return one(rows * size * 5)


def experts(tokens: int, num: int, chosen: int, hidden: int, inner: int) -> Taken:
    """INT8 ``moe_ffn`` with the exact combine; tokens choose evenly."""
    pairs = tokens * chosen
    touched = num * (1 - (1 - chosen / num) ** tokens)
    tile = tile_of(WeightKind.INT8, -(-pairs // num))
    tiles = touched if pairs <= num else pairs / tile.rows + touched / 2
    tiles = max(tiles, touched)
    up = product("up", WeightKind.INT8, tile)
    down = product("down", WeightKind.INT8, tile)
    per_up, per_down = -(-inner // tile.out), -(-hidden // tile.out)
    return together(
        [
            one(tokens * hidden * 4),  # units
            quantize(tokens, hidden),
            one(pairs * 4 * num / 16),  # count
            one(pairs * 4 * num / 16),  # order
            tensor_kernel(
                up, tiles * per_up, 2 * tile.rows * tile.out * hidden,
                touched * 2 * inner * hidden + pairs * (hidden + 4 * inner),
            ),
            quantize(pairs, inner),
            tensor_kernel(
                down, tiles * per_down, tile.rows * tile.out * inner,
                touched * inner * hidden + pairs * (inner + 4 * hidden),
            ),
            one(pairs * hidden * 4 + tokens * hidden * 4),  # combine
        ]
    )  # fmt: skip


def attention(
    shape: variants.AttentionShape, batch: int, context: int, dtype: torch.dtype
) -> Taken:
    """A decode of so many sequences: each tile over each segment, then the segments merged."""
    tile, segments = query_tile(dtype, shape.latent), -(-context // ATTENTION_SEGMENT)
    group = shape.heads // shape.kv_heads
    tiles = batch * shape.kv_heads * -(-group // min(group, tile.queries))
    width = shape.d_size + shape.r_size
    each = tile.queries * min(context, ATTENTION_SEGMENT) * (width + shape.v_size)
    stored = width if shape.latent else width + shape.v_size
    cached = batch * context * shape.kv_heads * stored * dtype.itemsize
    partial = batch * shape.heads * segments * (shape.v_size + 2) * 4
    queries = batch * shape.heads * width * 4
    nbytes = cached + partial + queries
    attend = tensor_kernel(attending(shape, dtype), tiles * segments, each, nbytes)
    return together([attend, one(partial + batch * shape.heads * shape.v_size * 4)])


@dataclass(frozen=True)
class ModelShape:
    """Of a model whose layers are alike; experts in INT8, the rest in bf16, as is its KV."""

    name: str
    layers: int
    hidden: int
    attention: variants.AttentionShape
    experts: int
    chosen: int
    inner: int
    shared: int
    vocab: int


MODELS = (
    ModelShape(
        "OLMoE-1B-7B", 16, 2048,
        variants.AttentionShape("gqa", 16, 16, 128, 0, 128, False), 64, 8, 1024, 0, 50304,
    ),
    ModelShape(
        "GLM-4.5-Air (106 B)", 46, 4096,
        variants.AttentionShape("gqa", 96, 8, 128, 0, 128, False), 128, 8, 1408, 1408, 151552,
    ),
)  # fmt: skip


def step(model: ModelShape, batch: int, context: int) -> Taken:
    """A decode step, replayed."""
    a, hidden = model.attention, model.hidden
    rows, bf16 = batch * hidden * 4, WeightKind.BF16
    queries, keys = a.heads * a.d_size, a.kv_heads * a.d_size
    small: Sequence[Taken] = [
        *[one(2 * rows)] * 2,  # norms
        *[one(batch * queries * 8)] * 3,  # splits, rotation of queries
        *[one(batch * keys * 8)] * 5,  # splits and rotation of keys, both written
        *[one(rows * 3)] * 4,  # adds
        one(batch * model.experts * 4),  # routing
        *[one(batch * 512)] * 5,  # gathers of cos and sin, masks
    ]
    layer = [
        *small,
        linear(bf16, batch, queries + 2 * keys, hidden),
        attention(a, batch, context, torch.bfloat16),
        linear(bf16, batch, hidden, queries),
        linear(bf16, batch, model.experts, hidden),
        experts(batch, model.experts, model.chosen, hidden, model.inner),
    ]
    if model.shared:
        layer += [
            linear(WeightKind.INT8, batch, 2 * model.shared, hidden),
            one(batch * model.shared * 12),
            linear(WeightKind.INT8, batch, hidden, model.shared),
        ]
    ends = [one(rows), one(2 * rows), linear(bf16, batch, model.vocab, hidden)]
    best = one(batch * model.vocab * 4)
    return together([together(layer, model.layers), *ends, best])
