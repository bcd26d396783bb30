"""The header of a safetensors file: written piece by piece, and read within a bound.

A file is this header and then the bytes of its tensors, in the order given and without gaps.
Knows no tensors: types go by the names that the format has for them (``F32``, ``BF16``, ``I8``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

# A tensor takes about 120 bytes of it: several times what the largest published files have. The
# format's own library allows 100 MB, of which it and Python would make gigabytes.
MOST_HEADER_BYTES = 16 << 20


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


def read_header(opened: BinaryIO) -> bytes:
    """The JSON of a file's header, from its beginning on; ValueError where it is too long, or the
    file too short. Its length is looked at before it is read."""
    first = opened.read(8)
    length = int.from_bytes(first, "little")
    if len(first) < 8:
        raise ValueError("no header")
    if length > MOST_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes, at most {MOST_HEADER_BYTES} are read")
    text = opened.read(length)
    if len(text) < length:
        raise ValueError("a header that ends early")
    return text
