"""Members of a zip file, read within a memory budget.

The directory of a zip says how large its members are, and the header of an array what shape it has;
both are checked against each other and against the budget before anything is unpacked. Members that
are encrypted, or packed by other means than deflate, are refused. Errors are PlacementError.
"""

from __future__ import annotations

import contextlib
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeserve.errors import PlacementError
from moeserve.placement.files import MALFORMED, MemoryBudget, reason, require_regular

MOST_MEMBERS = 1 << 16
_ENCRYPTED = 1
_BROKEN = (
    *MALFORMED, OSError, EOFError, RuntimeError, NotImplementedError, MemoryError,
    zipfile.BadZipFile, zlib.error, struct.error, SyntaxError,
)  # fmt: skip


@contextlib.contextmanager
def open_archive(path: Path, kind: str) -> Iterator[Archive]:
    """``kind`` is what the file should be; whatever goes wrong inside says that it is none."""
    size = require_regular(path)
    try:
        with zipfile.ZipFile(path) as opened:
            yield Archive(path, opened, MemoryBudget(path, size))
    except PlacementError:
        raise
    except _BROKEN as cause:
        raise PlacementError(f"{path} is not a readable {kind}: {reason(cause)}") from cause


class Archive:
    """``budget`` is charged for every member that is read."""

    def __init__(self, path: Path, opened: zipfile.ZipFile, budget: MemoryBudget) -> None:
        self.budget = budget
        self._path = path
        self._opened = opened
        self._members = {member.filename: member for member in opened.infolist()}
        if len(self._members) > MOST_MEMBERS:
            raise PlacementError(f"{path} has {len(self._members)} members, at most {MOST_MEMBERS}")

    @property
    def names(self) -> list[str]:
        return list(self._members)

    def content(self, name: str, most: int | None = None) -> bytes:
        """All of a member, of ``most`` bytes at most."""
        member = self._checked(name)
        if most is not None and member.file_size > most:
            raise PlacementError(
                f"{self._path}: {name} has {member.file_size} bytes, at most {most}"
            )
        self.budget.charge(member.file_size, name)
        return self._opened.read(member)

    def array(self, name: str) -> NDArray[Any]:
        """A member in numpy's format, as ``numpy.savez`` writes it."""
        member = self._checked(name)
        with self._opened.open(member) as stream:
            start = np.lib.format.read_magic(stream)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[start]
            shape, _, dtype = read_header(stream)
            if dtype.hasobject:
                raise PlacementError(f"{self._path}: {name} holds objects, not numbers")
            nbytes = math.prod(shape) * dtype.itemsize
            if stream.tell() + nbytes != member.file_size:
                raise PlacementError(
                    f"{self._path}: {name} declares {nbytes} bytes of numbers, and "
                    f"{member.file_size - stream.tell()} follow"
                )
            self.budget.charge(nbytes, name)
        with self._opened.open(member) as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)

    def _checked(self, name: str) -> zipfile.ZipInfo:
        member = self._members[name]
        if member.flag_bits & _ENCRYPTED:
            raise PlacementError(f"{self._path}: {name} is encrypted: store it without a password")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise PlacementError(
                f"{self._path}: {name} is packed by method {member.compress_type}: use deflate"
            )
        return member
