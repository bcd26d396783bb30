"""Read a model folder: ``config.json`` and memory-mapped safetensors.

Nothing in the folder is executed and pickle is never read. Every tensor that is asked for is
checked (present, shape, dtype) and its bytes are counted, those of the rows asked for where that is
all; ``unread`` lists what nobody asked for, so that a tensor we do not understand cannot be dropped
in silence. Files must not change while open. Pages
that were read stay resident until ``release``, so that a model need not be in memory twice.
"""

from __future__ import annotations

import json
import mmap
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moeserve.errors import CheckpointError
from moeserve.models.files import open_regular, read_json
from moeserve.safetensors_header import read_header

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Linux has the flag everywhere; Python names it from 3.13 on.
_NORESERVE = 0x4000 if sys.platform == "linux" else 0
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies: bytes ``start`` to ``end`` of a mapped file."""

    file: Path
    mapping: mmap.mmap
    kind: str
    shape: tuple[int, ...]
    start: int
    end: int


class Checkpoint:
    """An open model folder; owns the file mappings and the counters."""

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        generation_config: dict[str, Any],
        files: dict[Path, dict[str, Entry]],
    ) -> None:
        self.path = path
        self.config = config
        self.generation_config = generation_config
        self.bytes_read = 0
        self.total_bytes = sum(file.stat().st_size for file in files)
        self._entries = {name: entry for found in files.values() for name, entry in found.items()}
        self._mappings = tuple({id(e.mapping): e.mapping for e in self._entries.values()}.values())
        self._read: set[str] = set()

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """The folder, its files checked for truncation; tensors are read when asked for."""
        folder = Path(path)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder; give the path of a model folder")
        config = read_json(folder / "config.json", required=True)
        files = {file: _map(file) for file in weight_files(folder)}
        generation = read_json(folder / "generation_config.json", required=False)
        checkpoint = cls(folder, config, generation, files)
        checkpoint._check_index()
        return checkpoint

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._entries)

    @property
    def mapped_bytes(self) -> int:
        """Of the files, what a model made of this runs on: memory that looks free and is not."""
        return 0

    @property
    def in_order(self) -> tuple[str, ...]:
        """Names as their data lies in the files."""
        places = {name: (e.file, e.start) for name, e in self._entries.items()}
        return tuple(sorted(places, key=places.__getitem__))

    def has(self, name: str) -> bool:
        return name in self._entries

    def get(
        self,
        name: str,
        shape: tuple[int, ...] | None = None,
        kinds: tuple[torch.dtype, ...] = FLOATS,
    ) -> Tensor:
        """The tensor, a view of the mapped file; of exactly this shape where one is given."""
        tensor = self._mapped(name, shape, kinds)
        self.bytes_read += tensor.nbytes
        return tensor

    def rows(
        self,
        name: str,
        shape: tuple[int, ...],
        rows: Sequence[int],
        kinds: tuple[torch.dtype, ...] = FLOATS,
    ) -> list[Tensor]:
        """These entries of the first dimension of a tensor of this shape, as views."""
        tensor = self._mapped(name, shape, kinds)
        self.bytes_read += len(set(rows)) * (tensor.nbytes // max(1, len(tensor)))
        return [tensor[row] for row in rows]

    def _mapped(
        self, name: str, shape: tuple[int, ...] | None, kinds: tuple[torch.dtype, ...]
    ) -> Tensor:
        if shape is not None:
            self.require(name, shape)
        entry, kind = self._find(name), self.dtype(name)
        if kind not in kinds:
            expected = " or ".join(_shown(k) for k in kinds)
            remedy = "; quantised weights need a quantization_config in config.json"
            raise CheckpointError(
                f"{entry.file}: tensor {name} has dtype {_shown(kind)}, expected {expected}"
                f"{remedy if kinds == FLOATS else ''}"
            )
        self._read.add(name)
        if entry.start == entry.end:
            return torch.empty(entry.shape, dtype=kind)
        count = (entry.end - entry.start) // kind.itemsize
        flat = torch.frombuffer(entry.mapping, dtype=kind, count=count, offset=entry.start)
        return flat.view(entry.shape)

    def release(self) -> None:
        """Gives back the memory of pages read so far; tensors stay valid and are read again."""
        for mapping in self._mappings:
            mapping.madvise(mmap.MADV_DONTNEED)

    def dtype(self, name: str) -> torch.dtype:
        """From the header."""
        entry = self._find(name)
        if entry.kind not in DTYPES:
            raise CheckpointError(
                f"{entry.file}: tensor {name} has dtype {entry.kind}, expected one of "
                f"{', '.join(DTYPES)}"
            )
        return DTYPES[entry.kind]

    def shape(self, name: str) -> tuple[int, ...]:
        """From the header."""
        return self._find(name).shape

    def nbytes(self, name: str) -> int:
        """From the header."""
        entry = self._find(name)
        return entry.end - entry.start

    def require(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuses a tensor that is missing or of another shape; reads the header only."""
        found = self.shape(name)
        if found != shape:
            raise CheckpointError(
                f"{self._find(name).file}: tensor {name} has shape {list(found)}, "
                f"config.json implies {list(shape)}"
            )

    def unread(self) -> tuple[str, ...]:
        """Tensors that nobody asked for, sorted."""
        return tuple(sorted(self.names - self._read))

    def _find(self, name: str) -> Entry:
        if name not in self._entries:
            raise CheckpointError(f"{self.path}: tensor {name} is missing")
        return self._entries[name]

    def _check_index(self) -> None:
        index = read_json(self.path / INDEX, required=False)
        for name, shard in index.get("weight_map", {}).items():
            if not self.has(name) or self._find(name).file.name != shard:
                raise CheckpointError(
                    f"{self.path / INDEX}: tensor {name} should be in {shard} but is not"
                )


class HeaderView(Checkpoint):
    """Tensors of an open checkpoint without their data, to be checked as if they were read: they
    count as asked for, and no byte of them as read."""

    def __init__(self, of: Checkpoint) -> None:
        super().__init__(of.path, of.config, of.generation_config, {})
        self._entries, self._read = of._entries, of._read

    def _mapped(
        self, name: str, shape: tuple[int, ...] | None, kinds: tuple[torch.dtype, ...]
    ) -> Tensor:
        return super()._mapped(name, shape, kinds).to("meta")


def weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.exists():
        shards = read_json(index, required=True).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise CheckpointError(f"{index}: weight_map is missing or empty")
        return [_shard(index, shard) for shard in dict.fromkeys(map(str, shards.values()))]
    if (folder / _SINGLE).exists():
        return [folder / _SINGLE]
    if (folder / "packed.json").exists():
        raise CheckpointError(
            f"{folder}: its weights are packed, to be served as they are; give the folder that it "
            f"was made from"
        )
    pickles = sorted(f.name for pattern in _PICKLES for f in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder}: only {', '.join(pickles[:3])} found; pickle is never read, "
            f"convert the weights to safetensors"
        )
    raise CheckpointError(f"{folder}: neither {_SINGLE} nor {INDEX} found")


def _shard(index: Path, name: str) -> Path:
    file = index.parent / name
    if Path(name).name != name or name == "..":
        raise CheckpointError(f"{index}: shard {name!r} is not a plain file name")
    if not file.is_file():
        raise CheckpointError(f"{index}: shard {name} is missing; download it again")
    return file


def _map(file: Path) -> dict[str, Entry]:
    """What is in a file, by name. The library checks a header, of bounded length; data is mapped
    here, where pages can be given back."""
    try:
        with open_regular(file) as opened:
            text = read_header(opened)
            with safe_open(file, framework="pt", device="cpu"):
                pass
            header = json.loads(text)
            # Private, since torch wants memory it could write; nobody does, so reserve none.
            mapping = mmap.mmap(
                opened.fileno(),
                0,
                flags=mmap.MAP_PRIVATE | _NORESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: truncated or not safetensors ({error}); download it again"
        ) from error
    first = 8 + len(text)
    header.pop("__metadata__", None)
    return {
        name: Entry(
            file,
            mapping,
            found["dtype"],
            tuple(found["shape"]),
            *(first + offset for offset in found["data_offsets"]),
        )
        for name, found in header.items()
    }


def _shown(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")
