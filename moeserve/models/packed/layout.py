"""``packed.json``: which region of which file holds what, and what the folder was made from.

A region is whole pages of one file and has a digest (xxh3-128) of its bytes. Each layer has a trunk
region, all of it but the routed experts, and right behind it the records of its experts. Inside a
region nothing is placed by a number in the file: leaves lie in their order, each on a line, and
take the bytes that their forms imply. The file is a stranger's: it is bounded, unknown keys are
refused, and every place is checked against the sizes of the files. All failures are
CheckpointErrors.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from moeserve.errors import CheckpointError
from moeserve.kernels.records import PAGE, MatrixForm
from moeserve.models.files import open_regular, read_bounded

HEADER = "packed.json"
PACKED_FILE = re.compile(r"packed-[0-9]{5}\.bin")
VERSION = 1
_STRICT = ConfigDict(extra="forbid", strict=True)
_MOST = 1 << 31
_MOST_BYTES = 1 << 44
_MOST_FILES = 4096


@dataclass(frozen=True, slots=True)
class TensorForm:
    """A plain tensor."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    dtype: Literal["float32", "bfloat16"]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ExpertForm:
    """A record of one expert, such as a gated shared one."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    gate_up: MatrixForm
    down: MatrixForm


Leaf = MatrixForm | TensorForm | ExpertForm


@dataclass(frozen=True, slots=True)
class Region:
    """``nbytes`` of ``file`` from ``start`` on, both whole pages."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    file: str
    start: int
    nbytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class PackedPart:
    """A region and what lies in it, in this order, by name."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    region: Region
    leaves: dict[str, Leaf]


@dataclass(frozen=True, slots=True)
class PackedRecords:
    """Records of one form: expert e begins ``e * nbytes`` behind ``start``."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    file: str
    start: int
    nbytes: int
    form: ExpertForm
    digests: tuple[str, ...]

    @property
    def total(self) -> int:
        """Bytes of all of them."""
        return self.nbytes * len(self.digests)

    def region(self, expert: int) -> Region:
        place = self.start + expert * self.nbytes
        return Region(self.file, place, self.nbytes, self.digests[expert])


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """``experts`` is None where a layer routes nothing."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    trunk: PackedPart
    experts: PackedRecords | None


@dataclass(frozen=True, slots=True)
class PackedOptions:
    """What the weights were loaded with; the fields of ``LoadOptions`` that change them."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    dtype: Literal["auto", "float32", "bfloat16"]
    quantization: Literal["auto", "none", "int8", "int4"]
    quantize_attention: bool


@dataclass(frozen=True, slots=True)
class Origin:
    """The folder that was packed: what ``fingerprint`` and ``compute_id`` read of its weight files,
    and of its index where it has one."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    fingerprint: dict[str, str]
    samples: dict[str, str]


@dataclass(frozen=True, slots=True)
class Header:
    """All of ``packed.json``. ``packing`` is what an op table calls its layout; ``present`` are the
    tensors that a loader found when it looked for alternatives; ``ends`` has embedding, final norm
    and head. The block of multi-token prediction is one more layer beside ``mtp``."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    version: int
    packing: str
    byte_order: str
    options: PackedOptions
    dtype: Literal["float32", "bfloat16"]
    origin: Origin
    present: tuple[str, ...]
    unread: tuple[str, ...]
    files: dict[str, int]
    ends: PackedPart
    layers: tuple[PackedLayer, ...]
    mtp: PackedPart | None = None

    def regions(self) -> Iterator[tuple[str, Region]]:
        """Each with what it is called in errors."""
        yield "embedding and head", self.ends.region
        for number, layer in enumerate(self.layers):
            yield f"layer {number}", layer.trunk.region
            if layer.experts is not None:
                for e in range(len(layer.experts.digests)):
                    yield f"layer {number}, expert {e}", layer.experts.region(e)
        if self.mtp is not None:
            yield "multi-token prediction", self.mtp.region


@dataclass(frozen=True, slots=True)
class FileState:
    """Of a file while it is open: another one means that it was changed or replaced."""

    nbytes: int
    changed_ns: int
    number: int

    @staticmethod
    def of(status: os.stat_result) -> FileState:
        return FileState(status.st_size, status.st_mtime_ns, status.st_ino)


_HEADERS: TypeAdapter[Header] = TypeAdapter(Header)


def is_packed(folder: Path) -> bool:
    return (folder / HEADER).is_file()


def write_header(folder: Path, header: Header) -> None:
    (folder / HEADER).write_bytes(_HEADERS.dump_json(header, indent=1) + b"\n")


def read_packed_header(folder: Path) -> Header:
    """Checked in itself and against the sizes of the files beside it."""
    file = folder / HEADER
    try:
        header = _HEADERS.validate_json(read_bounded(file))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise _wrong(file, f"{place}: {first['msg']}") from error
    if header.version != VERSION:
        raise _wrong(file, f"version {header.version}, this program reads {VERSION}")
    _require_sound(file, header)
    _require_files(folder, header.files)
    return header


def require_runnable(folder: Path, header: Header, packing: str) -> None:
    """Refuses bytes that the kernels of this process do not understand."""
    ours = (packing, sys.byteorder)
    if (header.packing, header.byte_order) != ours:
        raise CheckpointError(
            f"{folder}: its weights are packed for {header.packing} ({header.byte_order}-endian), "
            f"this process has {packing} ({sys.byteorder}-endian); serve the folder that was "
            "packed, or pack it here: moeserve quantize --packed (--for-device cuda for a CUDA "
            "device)"
        )


def states_of(folder: Path, files: Mapping[str, int]) -> dict[str, FileState]:
    found = {}
    for name in files:
        try:
            with open_regular(folder / name) as opened:
                found[name] = FileState.of(os.fstat(opened.fileno()))
        except OSError as error:
            raise CheckpointError(f"{folder / name}: cannot be read ({error})") from error
    return found


def _require_files(folder: Path, files: Mapping[str, int]) -> None:
    for name, state in states_of(folder, files).items():
        if state.nbytes != files[name]:
            raise CheckpointError(
                f"{folder / name}: {state.nbytes} bytes, {HEADER} says {files[name]}; it is "
                f"truncated or of another model: pack it again"
            )


def _require_sound(file: Path, header: Header) -> None:
    if not 0 < len(header.files) <= _MOST_FILES:
        raise _wrong(file, f"{len(header.files)} files")
    for name, nbytes in header.files.items():
        if not PACKED_FILE.fullmatch(name) or not 0 < nbytes <= _MOST_BYTES:
            raise _wrong(file, f"a file {name[:80]!r} of {nbytes} bytes")
    for what, region in header.regions():
        whole = region.start % PAGE == region.nbytes % PAGE == 0 and region.start >= 0
        if not whole or not 0 < region.nbytes <= header.files.get(region.file, 0) - region.start:
            raise _wrong(file, f"{what} does not lie in {region.file[:80]!r}")
    for form in _forms(header):
        if not _is_sound(form):
            raise _wrong(file, f"no matrix is as {form}")


def _forms(header: Header) -> Iterator[MatrixForm]:
    parts = [header.ends, *(layer.trunk for layer in header.layers)]
    parts += [] if header.mtp is None else [header.mtp]
    for part in parts:
        for leaf in part.leaves.values():
            if isinstance(leaf, MatrixForm):
                yield leaf
            elif isinstance(leaf, ExpertForm):
                yield from (leaf.gate_up, leaf.down)
    for layer in header.layers:
        if layer.experts is not None:
            yield from (layer.experts.form.gate_up, layer.experts.form.down)


def _is_sound(form: MatrixForm) -> bool:
    sizes = (form.out_features, form.in_features, 1 if form.count is None else form.count)
    levels = form.levels is None or (
        len(form.levels) == 16 and all(-128 <= level <= 127 for level in form.levels)
    )
    zero = form.zero is None or 0 <= form.zero <= 15
    return all(0 < size <= _MOST for size in sizes) and 0 <= form.group <= _MOST and levels and zero


def _wrong(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{file}: not readable: {what}; pack the model again")
