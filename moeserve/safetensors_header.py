"""The header of a safetensors file, for those who write one piece by piece.

A file is this header and then the bytes of its tensors, in the order given and without gaps.
Knows no tensors: types go by the names that the format has for them (``F32``, ``BF16``, ``I8``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of the file; ``kind`` is the format's name of its type."""

    name: str
    kind: str
    shape: tuple[int, ...]
    nbytes: int


def safetensors_header(tensors: Sequence[StoredTensor], metadata: Mapping[str, str]) -> bytes:
    """The length of the JSON in eight bytes, then the JSON, padded so that data is aligned to 8."""
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for tensor in tensors:
        offsets = [at, at + tensor.nbytes]
        table[tensor.name] = {
            "dtype": tensor.kind, "shape": list(tensor.shape), "data_offsets": offsets,
        }  # fmt: skip
        at += tensor.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
