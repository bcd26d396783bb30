"""What a compiled kernel asks of a multiprocessor, read from its code (SASS of Hopper).

Code is cut into loops by its backward branches; an instruction counts in the innermost loop that
holds it. ``Work`` is of one warp: issue slots of its scheduler, by the throughputs of the CUDA
programming guide (table of arithmetic instructions, compute capability 9.0: 128 fp32 additions or
multiplications a clock and multiprocessor, 64 of integers and conversions, 32 shuffles, 16 special
functions; 32 lanes of loads and stores), and the multiplications of its tensor instructions. Code
behind the last ``EXIT`` (slow paths of divisions) is left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

FLOAT = ("FADD", "FMUL", "FFMA", "FSETP", "FSEL", "FMNMX", "FCHK")
SLOTS = {"SHFL": 4.0, "MUFU": 8.0, "LD": 4.0, "ST": 4.0, "RED": 4.0, "ATOM": 4.0}
TENSOR = re.compile(r"(?:[HI]GMMA\.(\d+)x(\d+)x(\d+)|[HI]MMA\.(16)(8)(16|32))")
LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


@dataclass(frozen=True)
class Work:
    """Of one warp: slots, and multiplications of tensor instructions; ``group`` where these are of
    four warps together (wgmma)."""

    slots: float = 0.0
    products: float = 0.0
    group: bool = False


@dataclass(frozen=True)
class Profile:
    """``straight`` is done once, ``loops`` as often as they turn."""

    straight: Work
    loops: tuple[Work, ...]

    @property
    def group(self) -> bool:
        return any(work.group for work in (self.straight, *self.loops))

    def slots(self, products: float) -> float:
        """Of a warp that is to do so many multiplications: loops with tensor instructions turn
        alike, others once."""
        turning = [loop for loop in self.loops if loop.products]
        left = max(0.0, products - self.straight.products)
        total = self.straight.slots + sum(loop.slots for loop in self.loops if not loop.products)
        return total + sum(left / len(turning) / loop.products * loop.slots for loop in turning)


def profile(sass: str) -> Profile:
    """Of the one kernel in what ``cuobjdump -sass`` says."""
    lines = [(int(at, 16), code, rest) for at, code, rest in LINE.findall(sass)]
    ends = [i for i, (_, code, _) in enumerate(lines) if code == "EXIT"]
    lines = lines[: ends[-1] + 1] if ends else lines
    spans = []
    for at, code, rest in lines:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if code.startswith("BRA") and target and int(target[1], 16) < at:
            spans.append((int(target[1], 16), at))
    spans = sorted(set(spans), key=lambda span: span[1] - span[0])
    found: dict[int, list[str]] = {}
    for at, code, _ in lines:
        inner = next((i for i, (low, high) in enumerate(spans) if low <= at <= high), -1)
        found.setdefault(inner, []).append(code)
    loops = tuple(work_of(found[i]) for i in range(len(spans)) if i in found)
    return Profile(work_of(found.get(-1, ())), loops)


def work_of(codes: Sequence[str]) -> Work:
    slots, products, group = 0.0, 0.0, False
    for code in codes:
        slots += slots_of(code)
        if tensor := TENSOR.match(code):
            m, n, k = (int(size) for size in tensor.groups() if size)
            grouped = "GMMA" in code
            products += m * n * k / (4 if grouped else 1)
            group = group or grouped
    return Work(slots, products, group)


def slots_of(code: str) -> float:
    name = code.split(".")[0]
    if name in FLOAT or TENSOR.match(code) or name in ("NOP", "BAR", "BRA", "EXIT"):
        return 1.0
    known = next((slots for start, slots in SLOTS.items() if name.startswith(start)), None)
    return 2.0 if known is None else known
