"""Every kernel compiled for a device that need not be here, and what the compiler made of it.

``variants`` are the kernels with the tiles and types that a table uses, for the shapes of a large
model; ``compiled`` has one's registers, shared memory, spills and instructions. For CUDA they are
read from PTX and from what the assembler says of its code, for HIP from the assembly. Nothing runs.

    python -m moeserve.kernels.triton.aot --target cuda:90 [--only attend]

prints a JSON object for each. Not in the interpreter.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moeserve.kernels.ops import ATTENTION_SEGMENT
from moeserve.kernels.records import WeightKind
from moeserve.kernels.triton.attention import QUERIES, STEPS, warps_for
from moeserve.kernels.triton.device import experts, pages, products, route, rows, sums
from moeserve.kernels.triton.experts import row_block, sizes
from moeserve.kernels.triton.packing import KINDS
from moeserve.kernels.triton.tiles import TILES

# Instructions that round as nothing else does: never in a kernel whose bits are promised.
APPROXIMATE = ("ex2.approx", "div.full", "div.approx", "sqrt.approx", "rsqrt.approx", "tf32")
INTEGER_PRODUCTS = {"cuda": r"(mma\.sync|wgmma)\S*\.s32\.s8\.s8", "hip": r"v_mfma_i32_\w+i8"}
LEFT_OUT = {"num_warps", "num_stages"}


@dataclass(frozen=True)
class Variant:
    """A kernel with its arguments' types (a number stands for itself) and its tile."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]
    integer: bool = False


@dataclass(frozen=True)
class Compiled:
    """``integer``: whether it is to multiply codes. ``products`` are the instructions that do,
    ``approximate`` what should not be there."""

    name: str
    target: str
    integer: bool
    shared: int
    registers: int
    spills: int
    products: list[str]
    approximate: list[str]


POINTERS = {
    "x_scale": "*fp32", "scale": "*fp32", "bias": "*fp32", "zero": "*u8", "levels": "*i8",
    "offsets": "*i64", "order": "*i32", "expert": "*i32", "ids": "*i32", "counts": "*i32",
    "slots": "*i64", "position": "*i64", "codes": "*i8", "best": "*i32", "blocks": "*i32",
    "tiles": "*i32", "ends": "*i32", "first": "*i32",
}  # fmt: skip
FLOATS = ("eps", "bound")


def variant(
    name: str,
    kernel: Any,
    given: dict[str, Any],
    constants: dict[str, Any],
    *,
    integer: bool = False,
) -> Variant:
    """``given`` are types or None; the others are fp32 pointers, numbers where they are lower-case
    words of ``NUMBERS``."""
    options = {k: v for k, v in constants.items() if k in LEFT_OUT}
    fixed = {k: v for k, v in constants.items() if k not in LEFT_OUT}
    types: dict[str, str] = {}
    for argument in kernel.arg_names:
        if argument in fixed:
            types[argument] = "constexpr"
        elif argument in given and given[argument] is None:
            types[argument], fixed[argument] = "constexpr", None
        else:
            types[argument] = given.get(argument) or type_of(argument)
    return Variant(name, kernel, types, fixed, options, integer)


NUMBERS = set(
    "rows size heads pairs x_row x_head inner hidden chosen experts N K groups width most_slots "
    "kv_heads group d_size r_size v_size page table segments base_row window".split()
)


def type_of(argument: str) -> str:
    if argument in NUMBERS:
        return "i32"
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


def product_variants() -> Iterator[Variant]:
    for kind, tiles in TILES.items():
        given, codes = weights(kind), kind in (WeightKind.INT8, WeightKind.INT4)
        for _, tile in tiles:
            name = f"{kind}-{tile.rows}x{tile.out}x{tile.into}"
            base = {"KIND": KINDS[kind], "GROUP": 128}
            linear = {**given, "offsets": None}
            yield variant(
                f"linear-{name}", products.linear_kernel, linear, base | sizes(tile), integer=codes
            )
            up = base | sizes(tile) | {"CLAMPED": False}
            yield variant(f"up-{name}", experts.up_kernel, given, up, integer=codes)
            down = base | sizes(tile)
            yield variant(f"down-{name}", experts.down_kernel, given, down, integer=codes)


def attention_variants() -> Iterator[Variant]:
    shapes = {"gqa": (8, 128, 0, 128, False), "mla": (128, 512, 64, 512, True)}
    for dtype, most in QUERIES.items():
        kind = {"float32": "*fp32", "bfloat16": "*bf16", "int8": "*i8"}[str(dtype)[6:]]
        scale = "*fp32" if kind == "*i8" else None
        for name, (group, d, r, v, latent) in shapes.items():
            heads = min(group, most)
            given = {
                "k": kind, "k_scale": scale, "v": kind, "v_scale": scale, "scale": "fp32",
                "r": kind if r else None, "r_scale": scale if r else None,
            }  # fmt: skip
            constants = {
                "KIND": list(QUERIES).index(dtype), "LATENT": latent, "SHARED": heads < most,
                "BM": most, "HEADS": heads, "D": d, "R": r, "V": v, "SEGMENT": ATTENTION_SEGMENT,
                "STEP": STEPS[dtype], "num_warps": warps_for(dtype, v), "num_stages": 2,
            }  # fmt: skip
            label = f"attend-{name}-{kind[1:]}"
            yield variant(label, pages.attend_kernel, given, constants, integer=kind == "*i8")
        write = {"cache": kind, "scales": scale, "scale": "fp32"}
        kinds = {"KIND": list(QUERIES).index(dtype), "BLOCK": 128}
        yield variant(f"write-{kind[1:]}", pages.write_kernel, write, kinds)
    merge = {"V": 512, "SEGMENT": ATTENTION_SEGMENT}
    yield variant("merge", pages.merge_kernel, {"sinks": None, "out": "*fp32"}, merge)


def row_variants() -> Iterator[Variant]:
    many, block = row_block(7168)
    span = {"ROWS": many, "BLOCK": block}
    yield variant("quantize", rows.quantize_kernel, {}, span)
    none = {"codes": None, "scale": None}
    yield variant("norm", rows.norm_kernel, none, span | {"QUANTIZED": False})
    yield variant("glu", rows.glu_kernel, {}, {"CLAMPED": False, "BLOCK": 1024})
    turned = {"INTERLEAVED": True, "GATHERED": False, "BLOCK": 64}
    yield variant("rope", rows.rope_kernel, {"position": None}, turned)
    yield variant("units", rows.units_kernel, {}, {"GRID_BITS": 11, "BLOCK": 4096})
    yield variant("best", rows.best_kernel, {}, {"BLOCK": 4096})
    spec = {
        "SCORING": 1, "NORMALISE": True, "TOP_K": 8, "KEPT": 4, "TOP2": True, "GROUPS": 8,
        "WIDTH": 32, "CHOSEN": 8,
    }  # fmt: skip
    yield variant("route", route.route_kernel, {"scale": "fp32"}, spec)
    yield variant("count", experts.count_kernel, {"pairs": "i32"}, {"BLOCK": 1024})
    order = {"BM": 16, "EXPERTS": 256, "BLOCK": 1024}
    yield variant("order", experts.order_kernel, {"pairs": "i32", "experts": "i32"}, order)
    yield variant("chain", sums.chain_kernel, {}, {"BLOCK": 1024})
    for limbs in (1, 2):
        exact = {"LIMBS": limbs, "WHOLE": True, "BLOCK": 1024}
        yield variant(f"exact-{limbs}", sums.exact_kernel, {}, exact)
        yield variant(f"gather-{limbs}", sums.gather_kernel, {"sums": "*i32"}, exact)


def variants() -> Iterator[Variant]:
    yield from product_variants()
    yield from attention_variants()
    yield from row_variants()


def target_of(name: str) -> GPUTarget:
    """Of ``cuda:90`` or ``hip:gfx942``."""
    backend, arch = name.split(":")
    return GPUTarget(
        backend, int(arch) if backend == "cuda" else arch, 32 if backend == "cuda" else 64
    )


def compiled(which: Variant, target: str) -> Compiled:
    aligned = [["tt.divisibility", 16]]
    places = list(which.types)
    attrs = {
        (i,): aligned
        for i, name in enumerate(places)
        if which.types[name].startswith("*") or name in ("K", "N", "inner", "hidden", "size")
    }
    source = ASTSource(which.kernel, which.types, constants_of(which), attrs)
    options = {**which.options, "enable_fp_fusion": False}
    found = triton.compile(source, target=target_of(target), options=options)
    backend = target.split(":")[0]
    text = found.asm["ptx"] if backend == "cuda" else found.asm["amdgcn"]
    registers, spills = (of_cubin if backend == "cuda" else of_amdgcn)(found.asm)
    return Compiled(
        which.name,
        target,
        which.integer,
        int(found.metadata.shared),
        registers,
        spills,
        sorted({m.group(0) for m in re.finditer(INTEGER_PRODUCTS[backend], text)}),
        [word for word in APPROXIMATE if backend == "cuda" and word in text],
    )


def constants_of(which: Variant) -> dict[tuple[int, ...], Any]:
    places = list(which.types)
    return {(places.index(name),): value for name, value in which.constants.items()}


def of_cubin(asm: dict[str, Any]) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack: what did not fit them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        said = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=60
        ).stdout
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", said))
    return int(numbers["REG"]), int(numbers["STACK"]) + int(numbers.get("LOCAL", 0))


def of_amdgcn(asm: dict[str, Any]) -> tuple[int, int]:
    text = asm["amdgcn"]
    registers = re.search(r"\.vgpr_count:\s+(\d+)", text)
    spills = re.search(r"\.vgpr_spill_count:\s+(\d+)", text)
    return int(registers[1]) if registers else 0, int(spills[1]) if spills else 0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True, help="cuda:90, hip:gfx942, ...")
    parser.add_argument("--only", default="", help="names that begin so")
    given = parser.parse_args(arguments)
    for which in variants():
        if which.name.startswith(given.only):
            print(json.dumps(asdict(compiled(which, given.target))), flush=True)


if __name__ == "__main__":
    main()
