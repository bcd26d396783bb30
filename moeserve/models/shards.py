"""Write safetensors one tensor at a time: sizes are planned first, so headers come before data.

Memory holds one piece of what ``Tensors.make`` yields and no more. Shards are filled in order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from moeserve.models.checkpoint import DTYPES
from moeserve.safetensors_header import StoredTensor, safetensors_header

_KINDS = {dtype: kind for kind, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor that is yet to be made."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def stored(self) -> StoredTensor:
        return StoredTensor(self.name, _KINDS[self.dtype], self.shape, self.nbytes)


@dataclass(frozen=True, slots=True)
class Tensors:
    """Tensors made together, such as codes and their scales.

    ``make`` yields pieces; one after the other, their bytes are those of ``planned``.
    """

    planned: tuple[PlannedTensor, ...]
    make: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.planned)


def write_shards(
    folder: Path, parts: Sequence[Tensors], most_bytes: int, written: Callable[[int], None]
) -> None:
    """``model.safetensors``, or several of at most ``most_bytes`` (or one part) and an index.

    ``written`` is called with the bytes of every part as it is done.
    """
    shards = list(_shards(parts, most_bytes))
    index: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        _write(folder / name, shard, written)
        index |= {planned.name: name for part in shard for planned in part.planned}
    if len(shards) > 1:
        total = {"total_size": sum(part.nbytes for part in parts)}
        text = json.dumps({"metadata": total, "weight_map": index}, indent=2)
        (folder / "model.safetensors.index.json").write_text(text, "utf-8")


def _shards(parts: Sequence[Tensors], most_bytes: int) -> Iterator[list[Tensors]]:
    shard: list[Tensors] = []
    size = 0
    for part in parts:
        if shard and size + part.nbytes > most_bytes:
            yield shard
            shard, size = [], 0
        shard.append(part)
        size += part.nbytes
    yield shard


def _write(file: Path, parts: Sequence[Tensors], written: Callable[[int], None]) -> None:
    with file.open("wb") as out:
        tensors = [planned.stored for part in parts for planned in part.planned]
        out.write(safetensors_header(tensors, {"format": "pt"}))
        for part in parts:
            start = out.tell()
            for piece in part.make():
                if piece.numel():
                    out.write(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            assert out.tell() - start == part.nbytes, part.planned
            written(part.nbytes)
