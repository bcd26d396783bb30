"""What a GGUF file says of itself: metadata, and where its tensors lie.

A file is a stranger's. Every count and length is compared with the file and with a bound before
anything is made of it; tensors must lie inside the file, apart from one another. Whatever is wrong
is a CheckpointError that names the file, the value and what to do. Versions 2 and 3, little-endian.
No torch: a tokenizer's process reads it too.

Shapes are given as everywhere here, the last dimension being that in which values lie side by side
(the file has them the other way round).
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

from moeserve.errors import CheckpointError
from moeserve.models.files import open_regular
from moeserve.models.gguf.block_types import TYPES, UNREAD, BlockType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Several times what the largest published files have: a vocabulary of 250 thousand tokens with its
# merges is 12 MB.
MOST_HEADER_BYTES = 64 << 20
MOST_KEYS = 1 << 12
MOST_VALUES = 1 << 22
MOST_STRING_BYTES = 16 << 20
MOST_NAME_BYTES = 1 << 10
MOST_TENSORS = 1 << 16
MOST_DIMENSIONS = 4
MOST_ALIGNMENT = 1 << 20
_DEFAULT_ALIGNMENT = 32
_READ_AHEAD = 1 << 20
_AGAIN = "download it again"
_GREATEST = 3.4028234663852886e38

Value = bool | int | float | str | list[bool] | list[int | float] | list[str]
_STRING, _ARRAY, _BOOL, _FLOAT32 = 8, 9, 7, 6
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", _FLOAT32: "f", _BOOL: "B", 10: "Q", 11: "q",
    12: "d",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Bytes ``start`` to ``end`` of a file."""

    name: str
    type: BlockType
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.type.values * self.type.nbytes


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """``nbytes`` is its own length; data begins behind it."""

    file: Path
    values: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]
    nbytes: int


def read_gguf_header(file: Path) -> GgufHeader:
    """CheckpointError where it is none, or asks for more than any model has."""
    try:
        with open_regular(file) as opened:
            size = opened.seek(0, 2)
            opened.seek(0)
            return _read(_Cursor(file, opened, size))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}); {_AGAIN}") from error


class _Cursor:
    """Where reading is in the file, and as much of it as was needed so far."""

    def __init__(self, file: Path, opened: BinaryIO, size: int) -> None:
        self.file = file
        self.size = size
        self.at = 0
        self.data = bytearray()
        self._opened = opened

    def take(self, nbytes: int) -> int:
        """Goes on by so many bytes, which are in ``data`` from the number returned on."""
        begin, end = self.at, self.at + nbytes
        if end > len(self.data):
            if end > min(self.size, MOST_HEADER_BYTES):
                where = f"byte {end} of {self.size}"
                if end <= self.size:
                    raise self.wrong(
                        f"has a header of more than {MOST_HEADER_BYTES} bytes ({where})"
                    )
                raise self.wrong(f"ends within its header ({where})")
            more = min(self.size, MOST_HEADER_BYTES, max(end, 2 * len(self.data), _READ_AHEAD))
            self.data += self._opened.read(more - len(self.data))
            if end > len(self.data):
                raise self.wrong(f"became shorter while it was read (byte {end} of {self.size})")
        self.at = end
        return begin

    def numbers(self, code: str, count: int = 1) -> tuple[int | float, ...]:
        form = f"<{count}{code}"
        found: tuple[int | float, ...] = struct.unpack_from(
            form, self.data, self.take(struct.calcsize(form))
        )
        return found

    def whole(self, code: str) -> int:
        return int(self.numbers(code)[0])

    def text(self, what: str, most: int = MOST_STRING_BYTES) -> str:
        length = self.whole("Q")
        if length > most:
            raise self.wrong(f"{what} has {length} bytes, at most {most} are read")
        begin = self.take(length)
        try:
            return self.data[begin : begin + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.wrong(f"{what} is not UTF-8") from error

    def count(self, what: str, most: int) -> int:
        found = self.whole("Q")
        if found > most:
            raise self.wrong(f"{what}: {found}, at most {most} are read")
        return found

    def wrong(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: {problem}: not a GGUF file we can read; {_AGAIN}")


def _read(cursor: _Cursor) -> GgufHeader:
    begin = cursor.take(4)
    if cursor.data[begin : begin + 4] != MAGIC:
        raise cursor.wrong(f"begins with {bytes(cursor.data[:4])!r} and not with {MAGIC!r}")
    version = cursor.whole("I")
    if version not in VERSIONS:
        raise cursor.wrong(f"is of version {version}, and {VERSIONS} in this byte order are known")
    tensors = cursor.count("number of tensors", MOST_TENSORS)
    keys = cursor.count("number of keys", MOST_KEYS)
    values: dict[str, Value] = {}
    left = MOST_VALUES
    for _ in range(keys):
        key = cursor.text("a key", MOST_NAME_BYTES)
        if key in values:
            raise cursor.wrong(f"has the key {key!r} twice")
        values[key] = value = _value(cursor, key, left)
        left -= len(value) if isinstance(value, list) else 1
    alignment = values.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not _is_alignment(alignment):
        raise cursor.wrong(
            f"general.alignment={alignment!r} is no power of two in 8..{MOST_ALIGNMENT}"
        )
    listed = [_listed(cursor) for _ in range(tensors)]
    data = -(-cursor.at // alignment) * alignment
    placed = [_placed(cursor, data, alignment, *entry) for entry in listed]
    _check_apart(cursor, placed)
    return GgufHeader(cursor.file, values, {t.name: t for t in placed}, cursor.at)


def _is_alignment(value: int) -> bool:
    return 8 <= value <= MOST_ALIGNMENT and value & (value - 1) == 0


def _value(cursor: _Cursor, key: str, left: int) -> Value:
    kind = cursor.whole("I")
    if kind == _STRING:
        return cursor.text(f"key {key!r}")
    if kind in _SCALARS:
        found = _scalars(cursor, key, kind, 1)[0]
        return _as_written(found) if kind == _FLOAT32 else found
    if kind != _ARRAY:
        raise cursor.wrong(f"key {key!r} has a value of type {kind}")
    inner = cursor.whole("I")
    count = cursor.count(f"values of key {key!r}", left)
    if inner == _STRING:
        return _texts(cursor, key, count)
    if inner in _SCALARS:
        return _scalars(cursor, key, inner, count)
    raise cursor.wrong(f"key {key!r} has an array of type {inner}, and only plain values are read")


def _scalars(cursor: _Cursor, key: str, kind: int, count: int) -> list[bool] | list[int | float]:
    found = cursor.numbers(_SCALARS[kind], count)
    if kind == _BOOL:
        if not set(found) <= {0, 1}:
            raise cursor.wrong(f"key {key!r} is neither true nor false")
        return [value == 1 for value in found]
    return list(found)


def _as_written(value: float) -> float:
    """The shortest decimal number that fp32 rounds to ``value``: what a config had before it was
    stored so."""
    for digits in range(1, 9):
        short = float(f"{value:.{digits}g}")
        # Rounded up, the greatest are none of fp32.
        if abs(short) <= _GREATEST and struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value


def _texts(cursor: _Cursor, key: str, count: int) -> list[str]:
    if 8 * count > cursor.size - cursor.at:
        raise cursor.wrong(f"key {key!r} has {count} values, more than the file")
    return [cursor.text(f"a value of key {key!r}", MOST_NAME_BYTES << 6) for _ in range(count)]


def _listed(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type and offset of a tensor."""
    name = cursor.text("a tensor's name", MOST_NAME_BYTES)
    dimensions = cursor.whole("I")
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        raise cursor.wrong(f"tensor {name!r} has {dimensions} dimensions")
    sizes = cursor.numbers("Q", dimensions)
    return name, tuple(int(n) for n in reversed(sizes)), cursor.whole("I"), cursor.whole("Q")


def _placed(
    cursor: _Cursor, data: int, alignment: int, name: str, shape: tuple[int, ...], kind: int,
    offset: int,
) -> GgufTensor:  # fmt: skip
    if kind not in TYPES:
        known = ", ".join(t.name for t in TYPES.values())
        raise CheckpointError(
            f"{cursor.file}: tensor {name!r} is of type {UNREAD.get(kind, kind)}, which is not "
            f"read; use a file in one of {known}"
        )
    found = TYPES[kind]
    values = prod(shape)
    if values == 0 or values > cursor.size * 8 or shape[-1] % found.values:
        raise cursor.wrong(
            f"tensor {name!r} has the shape {list(shape)}, which {found.name} cannot have"
        )
    if offset % alignment:
        raise cursor.wrong(f"tensor {name!r} lies at {offset}, no multiple of {alignment}")
    start = data + offset
    end = start + values // found.values * found.nbytes
    if end > cursor.size:
        raise cursor.wrong(f"tensor {name!r} ends at byte {end}, and the file has {cursor.size}")
    return GgufTensor(name, found, shape, start, end)


def _check_apart(cursor: _Cursor, tensors: list[GgufTensor]) -> None:
    if len({t.name for t in tensors}) < len(tensors):
        twice = sorted(t.name for t in tensors)
        name = next(a for a, b in itertools.pairwise(twice) if a == b)
        raise cursor.wrong(f"has the tensor {name!r} twice")
    in_order = sorted(tensors, key=lambda t: t.start)
    for one, other in itertools.pairwise(in_order):
        if other.start < one.end:
            raise cursor.wrong(f"tensors {one.name!r} and {other.name!r} overlap")
