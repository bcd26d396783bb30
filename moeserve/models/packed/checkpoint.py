"""A packed folder as the loader and its callers take a model folder: config, counters, files.

Its tensors are not read one by one; ``memory`` is a region of a mapped file. A file that is
replaced or changed while it is open is refused where it is looked at again (``require_unchanged``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from moeserve.config.options import LoadOptions
from moeserve.errors import CheckpointError
from moeserve.models.checkpoint import Checkpoint
from moeserve.models.files import open_regular, read_json
from moeserve.models.packed.layout import (
    HEADER,
    FileState,
    Header,
    Region,
    is_packed,
    read_packed_header,
    states_of,
)
from moeserve.models.packed.mapping import map_shared


class PackedCheckpoint(Checkpoint):
    """An open packed folder; owns the maps, made as they are asked for, and the counters."""

    def __init__(
        self,
        path: Path,
        config: dict[str, object],
        generation_config: dict[str, object],
        header: Header,
        states: Mapping[str, FileState],
    ) -> None:
        super().__init__(path, config, generation_config, {})
        self.header = header
        self.total_bytes = sum(header.files.values())
        self._states = states
        self._maps: dict[str, Tensor] = {}

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """The header and the sizes of the files are checked; nothing else is read."""
        folder = Path(path)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder; give the path of a model folder")
        config = read_json(folder / "config.json", required=True)
        generation = read_json(folder / "generation_config.json", required=False)
        header = read_packed_header(folder)
        return cls(folder, config, generation, header, states_of(folder, header.files))

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.header.present)

    @property
    def mapped_bytes(self) -> int:
        return self.bytes_read

    @property
    def dtype_held(self) -> torch.dtype:
        """Of floats."""
        return torch.bfloat16 if self.header.dtype == "bfloat16" else torch.float32

    def has(self, name: str) -> bool:
        return name in self.header.present

    def unread(self) -> tuple[str, ...]:
        return ()

    def release(self) -> None:
        """Nothing: what was read is what the model runs on."""

    def memory(self, region: Region) -> Tensor:
        """uint8; it keeps the map, and counts as read."""
        self.bytes_read += region.nbytes
        return self.mapped(region.file)[region.start : region.start + region.nbytes]

    def mapped(self, file: str) -> Tensor:
        """All of a file."""
        if file not in self._maps:
            self._maps[file] = self._map(file)
        return self._maps[file]

    def require_unchanged(self) -> None:
        """CheckpointError where a file is not the one that was opened."""
        now = states_of(self.path, self.header.files)
        changed = sorted(name for name, state in self._states.items() if now[name] != state)
        if changed:
            raise CheckpointError(
                f"{self.path / changed[0]}: changed since it was opened; restart to serve what is "
                f"there now"
            )

    def _map(self, name: str) -> Tensor:
        file = self.path / name
        try:
            with open_regular(file) as opened:
                memory = map_shared(opened)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file}: cannot be mapped ({error})") from error
        if memory.nbytes != self.header.files[name]:
            raise CheckpointError(f"{file}: changed since it was opened; pack it again")
        return memory


def open_checkpoint(path: str | Path) -> Checkpoint:
    """A model folder of either kind."""
    return PackedCheckpoint.open(path) if is_packed(Path(path)) else Checkpoint.open(path)


def packed_options(folder: Path, options: LoadOptions) -> LoadOptions:
    """What a model is really loaded with: of a packed folder, what it was packed with where the
    options leave it open. CheckpointError where they ask for what is not there."""
    if not is_packed(folder):
        return options
    header = read_packed_header(folder)
    return settled(folder, header, options)


def settled(folder: Path, header: Header, options: LoadOptions) -> LoadOptions:
    made = header.options
    wrong = []
    if options.quantization not in ("auto", made.quantization):
        wrong.append(f"--quantization {options.quantization}, packed with {made.quantization}")
    if options.dtype not in ("auto", made.dtype, header.dtype):
        wrong.append(f"--dtype {options.dtype}, packed with {header.dtype}")
    if made.quantize_attention and not options.quantize_attention and made.quantization != "auto":
        wrong.append("--no-quantize-attention, packed with attention rounded")
    if wrong:
        raise CheckpointError(
            f"{folder / HEADER}: {'; '.join(wrong)}: serve it as it is packed, or pack the model "
            f"again with what is wanted"
        )
    return options.model_copy(
        update={
            "quantization": made.quantization,
            "dtype": made.dtype if options.dtype == "auto" else options.dtype,
            "quantize_attention": made.quantize_attention,
        }
    )
