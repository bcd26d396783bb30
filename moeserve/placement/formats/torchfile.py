"""Read tensors out of a ``torch.save`` file without torch and without running anything.

The file is a zip of raw storages and one pickled skeleton. The skeleton's opcodes are read one by
one (``pickletools`` only parses); just those that build plain containers and tensors are known,
and the only callables are the two that stand for a tensor and an ordered dict. Anything else is
refused, so a hostile file can at worst be rejected.
"""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeserve.errors import PlacementError

_DTYPES = {
    "DoubleStorage": "<f8", "FloatStorage": "<f4", "HalfStorage": "<f2", "LongStorage": "<i8",
    "IntStorage": "<i4", "ShortStorage": "<i2", "CharStorage": "|i1", "ByteStorage": "|u1",
    "BoolStorage": "|b1",
}  # fmt: skip
_LIMIT = 4 << 30  # bytes of one storage


@dataclass(frozen=True, slots=True)
class _Name:
    """A global of the file: a name, never an object."""

    module: str
    name: str


_MARK = _Name("", "mark")


def read(path: Path) -> Any:
    """Containers, numbers, strings, and numpy arrays for tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.split("/", 1)[-1]: name for name in archive.namelist()}
            if "data.pkl" not in members:
                raise PlacementError(f"{path}: not a file written by torch.save")
            skeleton = archive.read(members["data.pkl"])
            return _Reader(path, lambda key: _storage(path, archive, members, key)).run(skeleton)
    except OSError as cause:
        raise PlacementError(f"cannot read {path}: {cause.strerror}") from cause
    except (zipfile.BadZipFile, ValueError, IndexError, KeyError, TypeError, EOFError) as cause:
        raise PlacementError(f"{path}: corrupt or not written by torch.save: {cause}") from cause


def _storage(path: Path, archive: zipfile.ZipFile, members: dict[str, str], key: str) -> bytes:
    info = archive.getinfo(members[f"data/{key}"])
    if info.file_size > _LIMIT:
        raise PlacementError(f"{path}: storage {key} has {info.file_size} bytes, limit {_LIMIT}")
    return archive.read(info)


class _Reader:
    def __init__(self, path: Path, storage: Callable[[str], bytes]) -> None:
        self._path, self._storage = path, storage
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
        return np.frombuffer(self._storage(str(key)), _DTYPES[storage_type.name])

    def _call(self, callee: Any, arguments: Any) -> Any:
        if callee == _Name("collections", "OrderedDict") and not arguments:
            return {}
        if callee == _Name("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor(*arguments[:4])
        raise PlacementError(f"{self._path}: refused to call {callee}")

    def _tensor(self, storage: Any, offset: int, size: Any, stride: Any) -> Any:
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if min((offset, *size, *stride), default=0) < 0 or (0 not in size and last >= len(storage)):
            raise PlacementError(f"{self._path}: a tensor reaches beyond its storage")
        steps = tuple(step * storage.itemsize for step in stride)
        view = np.lib.stride_tricks.as_strided(storage[offset:], tuple(size), steps)
        return np.array(view)
