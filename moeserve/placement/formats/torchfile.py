"""Read tensors out of a ``torch.save`` file without torch and without running anything.

The file is a zip of raw storages and one pickled skeleton. The skeleton's opcodes are read one by
one (``pickletools`` only parses); just those that build plain containers and tensors are known,
and the only callables are the two that stand for a tensor and an ordered dict. Anything else is
refused, so a hostile file can at worst be rejected.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeserve.errors import PlacementError
from moeserve.placement.files import shown
from moeserve.placement.formats.archive import Archive, open_archive

_DTYPES = {
    "DoubleStorage": "<f8", "FloatStorage": "<f4", "HalfStorage": "<f2", "LongStorage": "<i8",
    "IntStorage": "<i4", "ShortStorage": "<i2", "CharStorage": "|i1", "ByteStorage": "|u1",
    "BoolStorage": "|b1",
}  # fmt: skip
# Bytes of the skeleton, each of which may become some sixty in memory.
_MOST_SKELETON = 16 << 20


@dataclass(frozen=True, slots=True)
class _Name:
    """A global of the file: a name, never an object."""

    module: str
    name: str


_MARK = _Name("", "mark")


def read(path: Path) -> Any:
    """Containers, numbers, strings, and numpy arrays for tensors."""
    with open_archive(path, "file written by torch.save") as archive:
        members = {name.split("/", 1)[-1]: name for name in archive.names}
        if "data.pkl" not in members:
            raise PlacementError(f"{path}: not a file written by torch.save")
        skeleton = archive.content(members["data.pkl"], _MOST_SKELETON)
        return _Reader(path, archive, members).run(skeleton)


class _Reader:
    """``members`` are the archive's by their names within the dump."""

    def __init__(self, path: Path, archive: Archive, members: Mapping[str, str]) -> None:
        self._path, self._archive, self._members = path, archive, members
        self._storages: dict[str, bytes] = {}
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, skeleton: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(skeleton):
            if opcode.name == "STOP":
                return self._stack.pop()
            self._step(opcode.name, argument)
        raise PlacementError(f"{self._path}: skeleton ends too early")

    def _step(self, name: str, argument: Any) -> None:
        push, pop = self._stack.append, self._stack.pop
        match name:
            case "PROTO" | "FRAME":
                pass
            case "NONE":
                push(None)
            case "NEWTRUE" | "NEWFALSE":
                push(name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                push(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE":
                push(argument)
            case "MARK":
                push(_MARK)
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                push({"EMPTY_DICT": {}, "EMPTY_LIST": [], "EMPTY_TUPLE": ()}[name])
            case "TUPLE":
                push(tuple(self._marked()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                items = self._stack[-count:]
                del self._stack[-count:]
                push(tuple(items))
            case "APPEND" | "APPENDS":
                items = self._marked() if name == "APPENDS" else [pop()]
                self._stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                items = self._marked() if name == "SETITEMS" else [pop(-2), pop()]
                if not all(type(key) in (str, int) for key in items[::2]):
                    raise PlacementError(f"{self._path}: refused: a key is neither text nor number")
                self._stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = self._stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = self._stack[-1]
            case "BINGET" | "LONG_BINGET":
                push(self._memo[argument])
            case "GLOBAL":
                push(_Name(*argument.split(" ")))
            case "STACK_GLOBAL":
                attribute, module = pop(), pop()
                push(_Name(module, attribute))
            case "BINPERSID":
                push(self._typed_storage(pop()))
            case "REDUCE":
                arguments, callee = pop(), pop()
                push(self._call(callee, arguments))
            case _:
                raise PlacementError(f"{self._path}: refused: opcode {name} is not plain data")

    def _marked(self) -> list[Any]:
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:
            at -= 1
        items = self._stack[at + 1 :]
        del self._stack[at:]
        return items

    def _typed_storage(self, identity: Any) -> Any:
        kind, storage_type, key = identity[:3]
        if kind != "storage" or storage_type.module != "torch":
            raise PlacementError(f"{self._path}: refused: unknown persistent id {kind!r}")
        if storage_type.name not in _DTYPES:
            raise PlacementError(f"{self._path}: {storage_type.name} is not a supported type")
        if type(key) is not str:
            raise PlacementError(f"{self._path}: refused: the name of a storage is no text")
        if key not in self._storages:
            self._storages[key] = self._archive.content(self._members[f"data/{key}"])
        return np.frombuffer(self._storages[key], _DTYPES[storage_type.name])

    def _call(self, callee: Any, arguments: Any) -> Any:
        if callee == _Name("collections", "OrderedDict") and not arguments:
            return {}
        if callee == _Name("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor(*arguments[:4])
        raise PlacementError(f"{self._path}: refused to call {shown(callee)}")

    def _tensor(self, storage: Any, offset: int, size: Any, stride: Any) -> Any:
        if not all(type(n) is int for n in (offset, *size, *stride)):
            raise PlacementError(f"{self._path}: the shape of a tensor is no numbers")
        # A stride of 0 makes a tensor of any size out of one number.
        self._archive.budget.charge(math.prod(size) * storage.itemsize, "a tensor")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if min((offset, *size, *stride), default=0) < 0 or (0 not in size and last >= len(storage)):
            raise PlacementError(f"{self._path}: a tensor reaches beyond its storage")
        steps = tuple(step * storage.itemsize for step in stride)
        view = np.lib.stride_tricks.as_strided(storage[offset:], tuple(size), steps)
        return np.array(view)
