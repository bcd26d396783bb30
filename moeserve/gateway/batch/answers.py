"""The output of a batch: JSON lines, appended as answers come, as OpenAI's batch API has them.

    {"id": "batch_req_...", "custom_id": "a-1", "response": {"status_code": 200, "request_id": ...,
     "body": {...}}, "error": null}

A line is written as a whole or not at all, so far as the process lives to see to it; what a process
that was killed left of its last line is cut off when the file is opened again. ``id`` is the digest
of the input's line: what is in the file already is found by it, and so is a line that was changed.
Nothing else about a batch is kept anywhere.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from moeserve.errors import ConfigError, DataLossError, ExhaustedError
from moeserve.gateway.batch.lines import DIGEST_BYTES, Refused

PREFIX = "batch_req_"
# How long what was written may be lost to a power cut.
SYNC_S = 1.0
# The longest answer that is read again: all log-probabilities of the longest prompts are less.
MOST_LINE_BYTES = 256 << 20
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_BEGINNING = f'{{"id": "{PREFIX}'.encode()


@dataclass(slots=True)
class Found:
    """What a file has already: of each answer's input line the digest, and how many failed."""

    digests: set[bytes] = field(default_factory=set)
    failed: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """What the application answered to a request, ``body`` being JSON on one line."""

    status: int
    request_id: str
    body: bytes


def answer_line(digest: bytes, custom_id: str, answer: Answer) -> bytes:
    head = {"id": PREFIX + digest.hex(), "custom_id": custom_id}
    said = {"status_code": answer.status, "request_id": answer.request_id}
    return b'%b, "response": %b, "body": %b}, "error": null}\n' % (
        json.dumps(head)[:-1].encode(),
        json.dumps(said)[:-1].encode(),
        answer.body,
    )


def refusal_line(digest: bytes, custom_id: str | None, refused: Refused) -> bytes:
    """A request that was not run."""
    error = {"code": refused.code, "message": refused.message}
    whole = {"id": PREFIX + digest.hex(), "custom_id": custom_id, "response": None, "error": error}
    return json.dumps(whole).encode() + b"\n"


class AnswerFile:
    """Owns a file of answers, which no other run may have at the same time; for any thread.

    As it opens it reads what is there (``found``). ConfigError where that is no file of answers:
    then nothing of it is changed.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._file = _open(path)
        try:
            self.found, self._size = _read(path, self._file)
            if self._size != os.fstat(self._file.fileno()).st_size:
                os.ftruncate(self._file.fileno(), self._size)
            os.lseek(self._file.fileno(), self._size, os.SEEK_SET)
        except BaseException:
            self._file.close()
            raise
        self._synced_at, self._unsynced = clock(), True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def append(self, line: bytes) -> None:
        """ExhaustedError where the disk is full, DataLossError where it fails; the file then ends
        with the line before."""
        with self._lock, self._explained():
            try:
                _write(self._file.fileno(), line)
            except OSError:
                os.ftruncate(self._file.fileno(), self._size)
                os.lseek(self._file.fileno(), self._size, os.SEEK_SET)
                raise
            self._size += len(line)
            self._unsynced = True
        self.sync_if_due()

    def sync_if_due(self) -> None:
        """What was written longer than ``SYNC_S`` ago is on the disk then."""
        with self._lock, self._explained():
            if self._unsynced and self._clock() - self._synced_at >= SYNC_S:
                self._sync()

    def close(self) -> None:
        """All that was written is on the disk then; may be called again."""
        with self._lock:
            if self._file.closed:
                return
            try:
                with self._explained():
                    if self._unsynced:
                        self._sync()
            finally:
                self._file.close()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced_at, self._unsynced = self._clock(), False

    @contextlib.contextmanager
    def _explained(self) -> Any:
        try:
            yield
        except OSError as error:
            what = f"{self.path}: {error.strerror}; what was answered by now is there"
            if error.errno in _FULL:
                raise ExhaustedError(
                    f"{what}: make room, and give the same command again to go on"
                ) from error
            raise DataLossError(f"{what}: give the same command again to go on") from error


def _open(path: Path) -> IO[bytes]:
    """For reading and writing, made where it is not there; ConfigError where that cannot be."""
    try:
        new = not path.exists()
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b", 0)
        if new:
            _sync_folder(path.parent)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ConfigError(
            f"{path}: another run writes it: wait for that, or give another file"
        ) from error
    return file


def _sync_folder(folder: Path) -> None:
    """The name of a new file is on the disk, too."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read(path: Path, file: IO[bytes]) -> tuple[Found, int]:
    """What is there, and how many bytes of it are whole lines."""
    found, size, number = Found(), 0, 0
    with os.fdopen(os.dup(file.fileno()), "rb") as lines:
        lines.seek(0)
        while line := lines.readline(MOST_LINE_BYTES):
            number += 1
            if not line.endswith(b"\n"):
                if len(line) == MOST_LINE_BYTES or not _may_begin(line):
                    raise _foreign(path, number)
                break
            _note(path, number, line, found)
            size += len(line)
    return found, size


def _note(path: Path, number: int, line: bytes, found: Found) -> None:
    try:
        said = json.loads(line)
        name = str(said["id"])
        digest = bytes.fromhex(name.removeprefix(PREFIX))
        ours = name.startswith(PREFIX) and len(digest) == DIGEST_BYTES
        good = said["error"] is None and said["response"]["status_code"] == 200
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _foreign(path, number) from error
    if not ours:
        raise _foreign(path, number)
    found.digests.add(digest)
    found.failed += not good


def _may_begin(torn: bytes) -> bool:
    """Whether a line of ours can begin so."""
    return torn.startswith(_BEGINNING) or _BEGINNING.startswith(torn)


def _foreign(path: Path, number: int) -> ConfigError:
    return ConfigError(
        f"{path}: line {number} is no answer of a batch, so nothing is written there: give "
        "another file, or take that line out"
    )


def _write(handle: int, line: bytes) -> None:
    rest = memoryview(line)
    while rest:
        rest = rest[os.write(handle, rest) :]
