"""Every kernel with the tiles and types that a table launches it with, for the shapes of a large
model, so that it can be compiled where it does not run (``aot``).

Numbers are those of DeepSeek-V3 (of GQA: 64 heads over 8), for how a number divides is what a
launch specialises on: 1 becomes a constant, and of a multiple of 16 the compiler is told so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from moeserve.kernels.ops import ATTENTION_SEGMENT
from moeserve.kernels.records import WeightKind
from moeserve.kernels.triton.attention import STEPS
from moeserve.kernels.triton.device import experts, pages, products, route, rows, sample, sums
from moeserve.kernels.triton.experts import row_block, sizes
from moeserve.kernels.triton.packing import KINDS
from moeserve.kernels.triton.sampling import BLOCK as SAMPLED_AT_ONCE
from moeserve.kernels.triton.tiles import TILES, Tile, query_tile

LEFT_OUT = {"num_warps", "num_stages"}
POINTERS = {
    "x_scale": "*fp32", "scale": "*fp32", "bias": "*fp32", "zero": "*u8", "levels": "*i8",
    "offsets": "*i64", "order": "*i32", "expert": "*i32", "ids": "*i32", "counts": "*i32",
    "slots": "*i64", "position": "*i64", "codes": "*i8", "best": "*i32", "blocks": "*i32",
    "tiles": "*i32", "ends": "*i32", "first": "*i32",
}  # fmt: skip
NUMBERS = {
    "rows": 256, "size": 7168, "heads": 128, "pairs": 2048, "x_row": 24576, "x_head": 192,
    "inner": 2048, "hidden": 7168, "chosen": 8, "experts": 32, "N": 7168, "groups": 8,
    "width": 32, "most_slots": 1 << 20, "v_size": 512, "table": 72, "segments": 8, "base_row": 0,
    "window": 0,
}  # fmt: skip
FLOATS = ("eps", "bound")
DTYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int8: "*i8"}
PAGE = 64


@dataclass(frozen=True)
class AttentionShape:
    """Query and KV heads; features of keys (of a latent: its value part, and the rest) and of
    values."""

    name: str
    heads: int
    kv_heads: int
    d_size: int
    r_size: int
    v_size: int
    latent: bool


SHAPES = (
    AttentionShape("gqa", 64, 8, 128, 0, 128, False),
    AttentionShape("mla", 128, 1, 512, 64, 512, True),
)


@dataclass(frozen=True)
class Variant:
    """A kernel with its arguments' types (``i32`` of the value in ``numbers``) and its tile.
    ``integer``: whether it is to multiply codes."""

    name: str
    kernel: Any
    types: dict[str, str]
    numbers: dict[str, int]
    constants: dict[str, Any]
    options: dict[str, int]
    integer: bool = False


def variant(
    name: str,
    kernel: Any,
    given: dict[str, Any],
    constants: dict[str, Any],
    *,
    integer: bool = False,
) -> Variant:
    """``given`` are types, numbers or None; of the others ``NUMBERS`` are known, and the rest are
    pointers."""
    options = {k: v for k, v in constants.items() if k in LEFT_OUT}
    fixed = {k: v for k, v in constants.items() if k not in LEFT_OUT}
    types: dict[str, str] = {}
    numbers: dict[str, int] = {}
    for place, argument in enumerate(kernel.arg_names):
        value = given.get(argument, NUMBERS.get(argument))
        plain = kernel.params[place].do_not_specialize
        if argument in fixed:
            types[argument] = "constexpr"
        elif (argument in given and value is None) or (value == 1 and not plain):
            types[argument], fixed[argument] = "constexpr", value
        elif isinstance(value, int):
            types[argument], numbers[argument] = "i32", 1 if plain else value
        else:
            types[argument] = value or type_of(argument)
    return Variant(name, kernel, types, numbers, fixed, options, integer)


def type_of(argument: str) -> str:
    return "fp32" if argument in FLOATS else POINTERS.get(argument, "*fp32")


def weights(kind: WeightKind) -> dict[str, str | None]:
    codes = kind in (WeightKind.INT8, WeightKind.INT4)
    data = {WeightKind.FP32: "*fp32", WeightKind.BF16: "*bf16", WeightKind.INT8: "*i8"}
    return {
        "x": "*i8" if codes else "*fp32",
        "x_scale": "*fp32" if codes else None,
        "w": data.get(kind, "*u8"),
        "scale": "*fp32" if codes else None,
        "zero": "*u8" if kind is WeightKind.INT4 else None,
        "levels": None,
        "bias": None,
    }


def product(which: str, kind: WeightKind, tile: Tile) -> Variant:
    """``which`` is linear, up or down."""
    kernel, given = getattr(PRODUCTS[which], f"{which}_kernel"), dict[str, Any](weights(kind))
    base = {"KIND": KINDS[kind], "GROUP": 128, "K": 7168} | sizes(tile)
    if which == "linear":
        given |= {"offsets": None, "heads": 1}
    elif which == "up":
        base["CLAMPED"] = False
    else:
        base["K"] = NUMBERS["inner"]
    name = f"{which}-{kind}-{tile.rows}x{tile.out}x{tile.into}"
    integer = kind in (WeightKind.INT8, WeightKind.INT4)
    return variant(name, kernel, given, base, integer=integer)


PRODUCTS = {"linear": products, "up": experts, "down": experts}


def product_variants() -> Iterator[Variant]:
    for kind, tiles in TILES.items():
        for _, tile in tiles:
            for which in PRODUCTS:
                yield product(which, kind, tile)


def attention(shape: AttentionShape, dtype: torch.dtype, backend: str) -> Variant:
    kind, tile = DTYPES[dtype], query_tile(dtype, shape.latent, backend)
    scale = "*fp32" if kind == "*i8" else None
    group = shape.heads // shape.kv_heads
    each = min(group, tile.queries)
    given = {
        "k": kind, "k_scale": scale, "v": kind, "v_scale": scale, "scale": "fp32",
        "r": kind if shape.r_size else None, "r_scale": scale if shape.r_size else None,
    }  # fmt: skip
    constants = {
        "heads": shape.heads, "kv_heads": shape.kv_heads, "group": group,
        "d_size": shape.d_size, "r_size": shape.r_size, "v_size": shape.v_size, "page": PAGE,
        "KIND": list(DTYPES).index(dtype), "LATENT": shape.latent, "SHARED": each < tile.queries,
        "BM": tile.queries, "HEADS": each, "D": shape.d_size, "R": shape.r_size,
        "V": shape.v_size, "SEGMENT": ATTENTION_SEGMENT, "STEP": STEPS[dtype],
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    name = f"attend-{shape.name}-{kind[1:]}"
    return variant(name, pages.attend_kernel, given, constants, integer=kind == "*i8")


def merge(shape: AttentionShape) -> Variant:
    given = {"sinks": None, "out": "*fp32", "heads": shape.heads, "v_size": shape.v_size}
    constants = {"V": shape.v_size, "SEGMENT": ATTENTION_SEGMENT}
    return variant(f"merge-{shape.name}", pages.merge_kernel, given, constants)


def attention_variants(backend: str) -> Iterator[Variant]:
    for dtype, kind in DTYPES.items():
        for shape in SHAPES:
            yield attention(shape, dtype, backend)
        scales = "*fp32" if kind == "*i8" else None
        write = {"cache": kind, "scales": scales, "heads": 1, "size": 512, "scale": "fp32"}
        kinds = {"KIND": list(DTYPES).index(dtype), "BLOCK": 512}
        yield variant(f"write-{kind[1:]}", pages.write_kernel, write, kinds)
    for shape in SHAPES:
        yield merge(shape)


def row_variants() -> Iterator[Variant]:
    many, block = row_block(7168)
    span = {"ROWS": many, "BLOCK": block}
    yield variant("quantize", rows.quantize_kernel, {}, span)
    none = {"codes": None, "scale": None}
    yield variant("norm", rows.norm_kernel, none, span | {"QUANTIZED": False})
    yield variant("norm-codes", rows.norm_kernel, {"out": None}, span | {"QUANTIZED": True})
    yield variant("glu", rows.glu_kernel, {}, {"CLAMPED": False, "BLOCK": 1024})
    turned = {"INTERLEAVED": True, "GATHERED": False, "BLOCK": 64}
    ropes = {"position": None, "size": 64, "pairs": 32}
    yield variant("rope", rows.rope_kernel, ropes, turned)
    yield variant("units", rows.units_kernel, {}, {"GRID_BITS": 11, "BLOCK": 4096})
    yield variant("best", rows.best_kernel, {"size": 129280}, {"BLOCK": 4096})
    sampled = {"x": "*fp64", "ids": "*i64", "asked": "*fp64", "edges": "*fp64"}
    sampled |= {"tokens": "*i32", "spread": "*fp64"}
    for name in ("cut", "draw", "spread"):
        kernel, size = getattr(sample, f"{name}_kernel"), {"size": 129280}
        yield variant(name, kernel, sampled | size, {"BLOCK": SAMPLED_AT_ONCE})
    spec = {
        "SCORING": 1, "NORMALISE": True, "TOP_K": 8, "KEPT": 4, "TOP2": True, "GROUPS": 8,
        "WIDTH": 32, "CHOSEN": 8,
    }  # fmt: skip
    yield variant("route", route.route_kernel, {"scale": "fp32"}, spec)
    yield variant("count", experts.count_kernel, {}, {"BLOCK": 1024})
    order = {"BM": 16, "EXPERTS": 32, "BLOCK": 1024}
    yield variant("order", experts.order_kernel, {}, order)
    yield variant("chain", sums.chain_kernel, {}, {"BLOCK": 1024})
    for limbs in (1, 2):
        exact = {"LIMBS": limbs, "WHOLE": True, "BLOCK": 1024}
        yield variant(f"exact-{limbs}", sums.exact_kernel, {}, exact)
        yield variant(f"gather-{limbs}", sums.gather_kernel, {"sums": "*i32"}, exact)


def variants(backend: str) -> Iterator[Variant]:
    """For ``cuda`` or ``hip``."""
    yield from product_variants()
    yield from attention_variants(backend)
    yield from row_variants()
