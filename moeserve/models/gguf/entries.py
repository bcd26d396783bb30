"""A GGUF model as a checkpoint takes it: a config, and the tensors of each file by their names."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeserve.errors import CheckpointError
from moeserve.models.checkpoint import DTYPES, Entry, map_file
from moeserve.models.files import open_regular
from moeserve.models.gguf.config import architecture_of, read_gguf_config
from moeserve.models.gguf.header import GgufTensor
from moeserve.models.gguf.metadata import Metadata
from moeserve.models.gguf.names import MOST_PARTS, NamedPart, Naming, named_parts
from moeserve.models.gguf.places import read_headers


@dataclass(frozen=True, slots=True)
class GgufModel:
    """``files`` as ``Checkpoint`` has them."""

    config: dict[str, Any]
    files: dict[Path, dict[str, Entry]]


def open_gguf(first: Path) -> GgufModel:
    """All files of the model whose first is this; CheckpointError where they are none of ours."""
    headers = read_headers(first)
    m = Metadata(headers)
    config = read_gguf_config(m)
    architecture = architecture_of(m)
    heads = m.size("attention.head_count")
    naming = Naming(
        architecture.family(m).names,
        architecture.turned,
        heads,
        m.count("attention.head_count_kv", heads) or heads,
        m.size("expert_count"),
    )
    owner = {name: header.file for header in headers for name in header.tensors}
    maps = {header.file: _map(header.file) for header in headers}
    read = partial(_raw, {name: maps[file] for name, file in owner.items()})
    files: dict[Path, dict[str, Entry]] = {header.file: {} for header in headers}
    seen: set[str] = set()
    for part in named_parts(m, naming):
        if part.name in seen or len(seen) >= MOST_PARTS:
            problem = "is there twice" if part.name in seen else f"is beyond {MOST_PARTS} others"
            raise CheckpointError(f"{first}: tensor {part.name} {problem}; download it again")
        seen.add(part.name)
        file = owner[part.tensor.name]
        files[file][part.name] = _entry(part, file, maps[file], read)
    return GgufModel(config, files)


def _entry(
    part: NamedPart, file: Path, mapping: mmap.mmap, read: Callable[[GgufTensor], Tensor]
) -> Entry:
    make = None if part.make is None else partial(part.make, read)
    return Entry(file, mapping, part.kind, part.shape, part.start, part.end, make)


def _raw(maps: Mapping[str, mmap.mmap], tensor: GgufTensor) -> Tensor:
    """Floats, or bytes of rows, as they lie in the file."""
    dtype = DTYPES[tensor.type.name] if tensor.type.plain else torch.uint8
    count = (tensor.end - tensor.start) // dtype.itemsize
    flat = torch.frombuffer(maps[tensor.name], dtype=dtype, count=count, offset=tensor.start)
    return flat.view(tensor.shape if tensor.type.plain else (*tensor.shape[:-1], tensor.row_bytes))


def _map(file: Path) -> mmap.mmap:
    try:
        with open_regular(file) as opened:
            return map_file(opened)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); download it again") from error
