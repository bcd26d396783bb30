"""A folder of pages on a disk: each is whole or absent, whenever the process is killed.

    FORMAT                     what this folder is; nothing else may be in it
    lock                       held by the process that uses it
    incoming/KEY-NAMESPACE     being written
    pages/K2/KEY-NAMESPACE     whole; K2 are the first two digits of KEY

A page is written under ``incoming``, synced, and renamed; what is left there when a process starts
is deleted. A file begins with a header that has a digest of its own; the page's digest is in it.
Both are checked on every read, so a changed byte, a cut end or a torn write after a loss of power
is found then. Names hold key and namespace in hex: a start lists the folder and opens no file. What
is not ours in it is refused, for pages are deleted here. Calls block: none is for an event loop.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import xxhash

from moeserve.errors import ConfigError, DataLossError
from moeserve.pools.cache.keys import KEY_BYTES, NAMESPACE_BYTES, Namespace, PageKey
from moeserve.pools.cache.pages import DIGEST_BYTES, StoredPage

FORMAT = "moeserve cache of KV pages, version 1\n"

_MAGIC = b"MSKVPG1\n"
_FIELDS = struct.Struct(f"<8s{KEY_BYTES}s{NAMESPACE_BYTES}s{DIGEST_BYTES}sQ")
_DIGEST = struct.Struct("<Q")
HEADER_BYTES = _FIELDS.size + _DIGEST.size
_NAME = re.compile(rf"([0-9a-f]{{{2 * KEY_BYTES}}})-([0-9a-f]{{{2 * NAMESPACE_BYTES}}})")
_OURS = {"FORMAT", "lock", "incoming", "pages"}
_NO_LINK = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class FoundPage:
    """A file as a start finds it: ``nbytes`` are those of the file, ``used`` is when."""

    key: PageKey
    namespace: Namespace
    nbytes: int
    used: float


class PageFolder:
    """Opens the folder for this process alone, and makes it where it is not there. ConfigError for
    a folder of somebody else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if strangers := sorted(set(os.listdir(folder)) - _OURS):
                raise _stranger(folder / strangers[0])
            flags = os.O_WRONLY | os.O_CREAT | _NO_LINK
            self._lock = os.fdopen(os.open(folder / "lock", flags, 0o600), "wb")
            try:
                self._claim()
            except BaseException:
                self._lock.close()
                raise
        except OSError as error:
            raise ConfigError(
                f"the cache folder {str(folder)!r} cannot be used: {error}"
            ) from error

    def close(self) -> None:
        """Another process may use the folder."""
        self._lock.close()

    def scan(self) -> list[FoundPage]:
        """Every page, least recently used first. ConfigError names what is not ours."""
        found = [page for shard in self._shards() for page in self._scan_shard(shard)]
        return sorted(found, key=lambda page: page.used)

    def write(self, page: StoredPage) -> None:
        """OSError where the disk is full or broken; then nothing is left of it."""
        name = _name(page.key, page.namespace)
        incoming = self.folder / "incoming" / name
        final = self._path(page.key, page.namespace)
        try:
            with incoming.open("wb") as file:
                file.write(_header(page))
                file.write(page.body)
                file.flush()
                os.fsync(file.fileno())
            final.parent.mkdir(exist_ok=True)
            incoming.rename(final)
        except OSError:
            with contextlib.suppress(OSError):
                incoming.unlink(missing_ok=True)
            raise

    def read(self, key: PageKey, namespace: Namespace, most: int) -> StoredPage:
        """DataLossError where the file is not what was written, or larger than ``most``; OSError,
        of which FileNotFoundError is one."""
        path = self._path(key, namespace)
        with os.fdopen(os.open(path, os.O_RDONLY | _NO_LINK), "rb") as file:
            page = _read(file, path, most)
        if (page.key, page.namespace) != (key, namespace) or not page.is_whole():
            raise DataLossError(f"{path}: its bytes have changed since they were written")
        with contextlib.suppress(OSError):
            os.utime(path)  # the order of use outlives the process
        return page

    def delete(self, key: PageKey, namespace: Namespace) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._path(key, namespace).unlink()

    def _claim(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"the cache folder {str(self.folder)!r} is used by another process: give each "
                "cache member a folder of its own"
            ) from None
        _mark(self.folder)
        (self.folder / "pages").mkdir(exist_ok=True)
        (self.folder / "incoming").mkdir(exist_ok=True)
        for entry in _entries(self.folder / "incoming"):
            if not _NAME.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
                raise _stranger(entry.path)
            os.unlink(entry.path)

    def _shards(self) -> Iterator[os.DirEntry[str]]:
        for entry in _entries(self.folder / "pages"):
            named = re.fullmatch("[0-9a-f]{2}", entry.name)
            if not named or not entry.is_dir(follow_symlinks=False):
                raise _stranger(entry.path)
            yield entry

    def _scan_shard(self, shard: os.DirEntry[str]) -> Iterator[FoundPage]:
        for entry in _entries(shard.path):
            name = _NAME.fullmatch(entry.name)
            state = entry.stat(follow_symlinks=False)
            if not name or not name[1].startswith(shard.name) or not stat.S_ISREG(state.st_mode):
                raise _stranger(entry.path)
            key, namespace = (bytes.fromhex(text) for text in name.groups())
            yield FoundPage(PageKey(key), Namespace(namespace), state.st_size, state.st_mtime)

    def _path(self, key: PageKey, namespace: Namespace) -> Path:
        name = _name(key, namespace)
        return self.folder / "pages" / name[:2] / name


def is_full(error: OSError) -> bool:
    """Whether the disk, or what this user may have of it, is used up."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _mark(folder: Path) -> None:
    """Writes the mark into a new folder, before anything else; refuses one without it."""
    mark = folder / "FORMAT"
    try:
        with os.fdopen(os.open(mark, os.O_RDONLY | _NO_LINK), "rb") as file:
            text = file.read(len(FORMAT) + 1)
    except FileNotFoundError:
        for name in {"pages", "incoming"} & set(os.listdir(folder)):
            raise _stranger(folder / name) from None
        text = b""
    if text == FORMAT.encode():
        return
    if not FORMAT.encode().startswith(text):  # a process that was killed may leave a beginning
        raise ConfigError(
            f"{mark} is of another version: expected {FORMAT.strip()!r}; name an empty folder"
        )
    mark.write_text(FORMAT, encoding="utf-8")


def _entries(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    with os.scandir(os.fspath(folder)) as found:
        return list(found)


def _stranger(path: str | os.PathLike[str]) -> ConfigError:
    return ConfigError(
        f"{os.fspath(path)!r} is no file of a cache of KV pages: name a folder that holds nothing "
        "else, for pages are deleted there"
    )


def _name(key: PageKey, namespace: Namespace) -> str:
    return f"{key.hex()}-{namespace.hex()}"


def _header(page: StoredPage) -> bytes:
    fields = _FIELDS.pack(_MAGIC, page.key, page.namespace, page.digest, page.nbytes)
    return fields + _DIGEST.pack(xxhash.xxh3_64_intdigest(fields))


def _read(file: BinaryIO, path: Path, most: int) -> StoredPage:
    state = os.fstat(file.fileno())
    if not stat.S_ISREG(state.st_mode) or not HEADER_BYTES <= state.st_size <= most:
        raise DataLossError(f"{path}: {state.st_size} bytes are no page")
    header = file.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        raise DataLossError(f"{path}: cut off in its header")
    fields = header[: _FIELDS.size]
    magic, key, namespace, digest, nbytes = _FIELDS.unpack(fields)
    if header[_FIELDS.size :] != _DIGEST.pack(xxhash.xxh3_64_intdigest(fields)) or magic != _MAGIC:
        raise DataLossError(f"{path}: its header has changed since it was written")
    if nbytes != state.st_size - HEADER_BYTES:
        raise DataLossError(f"{path}: {state.st_size - HEADER_BYTES} of {nbytes} bytes are left")
    body = file.read(nbytes)
    return StoredPage(PageKey(key), Namespace(namespace), digest, body)
