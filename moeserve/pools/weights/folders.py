"""Where weights that came from others lie on this host: whole or absent, one copy for all.

    ROOT/ID         a checkpoint, whole: it gets this name when all of it is there and on the disk
    ROOT/ID.part    one on its way
    ROOT/ID.lock    held (flock) by who uses it, exclusively by the one who fetches

The default root is memory (``/dev/shm``), of this user alone; what nobody uses any more is removed
there, by the last who did, or where that one was killed by the next who comes. A root that was
given is kept, so that the next start finds its weights. ConfigError where it cannot be used,
ExhaustedError where it has no room, DeadlineError where another process fetches for too long.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

from moeserve.errors import ConfigError, DeadlineError, ExhaustedError
from moeserve.pools.weights.manifest import Manifest

_MEMORY = Path("/dev/shm")
_LOOK_S = 0.1
_SPARE = 64 << 20


def temporary_root() -> Path:
    """Of this user."""
    base = _MEMORY if _MEMORY.is_dir() else Path(tempfile.gettempdir())
    return base / f"moeserve-weights-{os.getuid()}"


class WeightFolders:
    """Those of one root; a temporary one where none is given."""

    def __init__(self, root: Path | None) -> None:
        self.temporary = root is None
        self.root = root or temporary_root()
        try:
            self.root.mkdir(mode=0o700, parents=not self.temporary, exist_ok=True)
            found = self.root.lstat()
        except OSError as error:
            raise ConfigError(f"weights_folder={str(self.root)!r}: {error}") from error
        ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
        if self.temporary and (not ours or found.st_mode & 0o077):
            raise ConfigError(
                f"{self.root} is not this user's alone: give another place by --weights-folder"
            )

    @contextlib.asynccontextmanager
    async def fetching(self, model: str, timeout_s: float) -> AsyncIterator[WeightFolder]:
        """The folder of a checkpoint, which no other process fetches meanwhile. Afterwards it is
        used (``WeightFolder.close``) if it is whole, else nothing is left of it."""
        folder = WeightFolder(self, model, await self._lock(model, timeout_s))
        used = False
        try:
            yield folder
            used = folder.is_whole
        finally:
            if used:
                fcntl.flock(folder.lock, fcntl.LOCK_SH)
            else:
                folder.drop()
                folder.close()

    def sweep(self) -> None:
        """Removes what nobody uses, of a temporary root."""
        for lock in self.root.glob("*.lock") if self.temporary else ():
            opened = _try_lock(lock)
            if opened is not None:
                self.remove(lock.stem)
                os.close(opened)

    async def _lock(self, model: str, timeout_s: float) -> int:
        end = time.monotonic() + timeout_s
        lock = self.root / f"{model}.lock"
        while (opened := _try_lock(lock)) is None:
            # Who uses it shares the lock: then it is whole, and may be used by one more.
            shared = _try_lock(lock, fcntl.LOCK_SH)
            if shared is not None and (self.root / model).is_dir():
                return shared
            if shared is not None:
                os.close(shared)
            if time.monotonic() > end:
                raise DeadlineError(
                    f"{self.root}: another process has fetched these weights for {timeout_s:.0f} s"
                )
            await asyncio.sleep(_LOOK_S)
        return opened

    def remove(self, model: str) -> None:
        """All of it; for who has the lock alone."""
        for folder in (self.root / model, self.root / f"{model}.part"):
            shutil.rmtree(folder, ignore_errors=True)
        (self.root / f"{model}.lock").unlink(missing_ok=True)


class WeightFolder:
    """Of one checkpoint; owns the lock that keeps it there."""

    def __init__(self, folders: WeightFolders, model: str, lock: int) -> None:
        self.path = folders.root / model
        self.part = folders.root / f"{model}.part"
        self.lock = lock
        self._folders = folders
        self._closed = False

    @property
    def is_whole(self) -> bool:
        return self.path.is_dir()

    def begin(self, manifest: Manifest) -> Path:
        """An empty folder with every file in its length; for who holds it alone."""
        shutil.rmtree(self.part, ignore_errors=True)
        free = shutil.disk_usage(self._folders.root).free
        if free < manifest.nbytes + _SPARE:
            raise ExhaustedError(
                f"{self._folders.root} has {free >> 20} MiB for weights of "
                f"{manifest.nbytes >> 20} MiB: give a place with more by --weights-folder"
            )
        self.part.mkdir(mode=0o700)
        for file in manifest.files:
            with (self.part / file.name).open("xb") as opened:
                os.truncate(opened.fileno(), file.nbytes)
        return self.part

    def finish(self) -> Path:
        """All has come: from now on it is there, also after a loss of power."""
        for file in self.part.iterdir():
            _sync(file)
        _sync(self.part)
        self.part.rename(self.path)
        _sync(self.path.parent)
        return self.path

    def drop(self) -> None:
        """What was begun and is not whole; for who holds it alone."""
        shutil.rmtree(self.part, ignore_errors=True)

    def close(self) -> None:
        """Not used any more. The last to say so of a temporary one removes it."""
        if self._closed:
            return
        self._closed = True
        if self._folders.temporary:
            with contextlib.suppress(BlockingIOError):  # others use it
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._folders.remove(self.path.name)
        os.close(self.lock)


def _try_lock(file: Path, how: int = fcntl.LOCK_EX) -> int | None:
    """A descriptor that holds the lock; None where another process does."""
    opened = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(opened, how | fcntl.LOCK_NB)
        # Whoever held it before may have removed the file: then this one locks nothing.
        if os.fstat(opened).st_ino == file.stat().st_ino:
            return opened
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(opened)
    return None


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
