"""The types that tensors of a GGUF file may have, by the number that stands in it.

A row is whole blocks; a block is ``values`` features in ``nbytes`` bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BlockType:
    """``name`` as llama.cpp has it."""

    name: str
    values: int
    nbytes: int

    @property
    def plain(self) -> bool:
        """Whether it is floats, one by one."""
        return self.values == 1


TYPES: Mapping[int, BlockType] = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    30: BlockType("BF16", 1, 2),
    39: BlockType("MXFP4", 32, 17),
}
BY_NAME: Mapping[str, BlockType] = {kind.name: kind for kind in TYPES.values()}
QUANTISED: tuple[str, ...] = tuple(kind.name for kind in TYPES.values() if not kind.plain)
# Those that exist and are not read, to be called by their names.
UNREAD: Mapping[int, str] = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16",
    26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4",
}  # fmt: skip


def suffix_of(name: str) -> str:
    """Under which blocks of this type stand beside a module's name, as ``weight`` does."""
    return f"gguf_{name.lower()}"


SUFFIXES: Mapping[str, str] = {suffix_of(name): name for name in QUANTISED}
