"""Every kernel compiled for a device that need not be here, and what the compiler made of it.

``compiled`` has of one of the ``variants`` its registers, shared memory, spills and instructions:
for CUDA read from PTX and from the assembler's code, for HIP from the assembly. ``faults`` says
what must not be. Nothing runs.

    python -m moeserve.kernels.triton.aot --target cuda:90 [--only attend]

prints a JSON object for each kernel, and ends with an error where one has a fault. Not in the
interpreter.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moeserve.kernels.triton.tiles import MOST_WARPS
from moeserve.kernels.triton.variants import Variant, variants

# Instructions that round as nothing else does: never in a kernel whose bits are promised.
APPROXIMATE = ("ex2.approx", "div.full", "div.approx", "sqrt.approx", "rsqrt.approx", "tf32")
INTEGER_PRODUCTS = {"cuda": r"(mma\.sync|wgmma)\S*\.s32\.s8\.s8", "hip": r"v_mfma_i32_\w+i8"}


@dataclass(frozen=True)
class Limits:
    """``shared`` bytes that a program may have. ``slow`` says why products of codes have no unit of
    their own there, though they are right; empty where they have one."""

    shared: int
    slow: str = ""


TARGETS = {
    "cuda:80": Limits(163 << 10),
    "cuda:90": Limits(227 << 10),
    "cuda:100": Limits(227 << 10, "Triton has no int8 for tcgen05: mma.sync takes its place"),
    "hip:gfx942": Limits(64 << 10),
}


@dataclass(frozen=True)
class Compiled:
    """``integer``: whether it is to multiply codes. ``products`` are the instructions that do,
    ``approximate`` what should not be there; ``spills`` are bytes of a thread. ``note`` says what
    is slow."""

    name: str
    target: str
    integer: bool
    shared: int
    registers: int
    spills: int
    products: list[str]
    approximate: list[str]
    note: str = ""

    @property
    def faults(self) -> list[str]:
        limit = TARGETS[self.target].shared
        return [
            *([f"{self.spills} bytes spilt"] if self.spills else []),
            *([f"shared {self.shared} of {limit}"] if self.shared > limit else []),
            *([f"approximate: {self.approximate}"] if self.approximate else []),
            *(["products of codes" if self.products else "no integer products"])
            * (bool(self.products) != self.integer),
        ]


def target_of(name: str) -> GPUTarget:
    """Of ``cuda:90`` or ``hip:gfx942``."""
    backend, arch = name.split(":")
    return GPUTarget(
        backend, int(arch) if backend == "cuda" else arch, 32 if backend == "cuda" else 64
    )


def compile_for(which: Variant, target: str) -> Any:
    """What Triton makes of it, as a launch with its numbers would."""
    backend, places = target.split(":")[0], list(which.types)
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(places)
        if which.types[name].startswith("*") or which.numbers.get(name, 1) % 16 == 0
    }
    constants = {(places.index(name),): value for name, value in which.constants.items()}
    source = ASTSource(which.kernel, which.types, constants, attrs)
    options = {**which.options, "enable_fp_fusion": False}
    if "num_warps" in options:
        options["num_warps"] = min(options["num_warps"], MOST_WARPS[backend])
    return triton.compile(source, target=target_of(target), options=options)


def compiled(which: Variant, target: str) -> Compiled:
    found, backend = compile_for(which, target), target.split(":")[0]
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
        TARGETS[target].slow if which.integer else "",
    )


def of_cubin(asm: dict[str, Any]) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack where it loads or stores any: a call of a
    division leaves some unused."""
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", asked("--dump-resource-usage", asm)))
    code = asked("-sass", asm)
    stack = int(numbers["STACK"]) + int(numbers.get("LOCAL", 0))
    return int(numbers["REG"]), stack if re.search(r"\b(STL|LDL)\b", code) else 0


def asked(what: str, asm: dict[str, Any]) -> str:
    """Of the code, by the tool that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [str(tool), what, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout


def of_amdgcn(asm: dict[str, Any]) -> tuple[int, int]:
    numbers = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", asm["amdgcn"]))
    return int(numbers.get("vgpr_count", 0)), 4 * int(numbers.get("vgpr_spill_count", 0))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True, choices=TARGETS)
    parser.add_argument("--only", default="", help="names that begin so")
    given = parser.parse_args(arguments)
    faulty = []
    for which in variants(given.target.split(":")[0]):
        if which.name.startswith(given.only):
            found = compiled(which, given.target)
            faulty += [f"{found.name}: {fault}" for fault in found.faults]
            print(json.dumps(asdict(found) | {"faults": found.faults}), flush=True)
    if faulty:
        raise SystemExit(f"{given.target}: " + "; ".join(faulty))


if __name__ == "__main__":
    main()
