"""Notes: bytes under keys, as ranks leave them while they start; and the store that torch asks.

Bounded, so that no rank gone wrong can fill the memory of who keeps them: so many keys, so many
bytes in one value, and so many in all. Beyond that ConfigError names the bound, and nothing is
changed. Every operation is one step that others see whole; none of them waits. ``NoteStore`` makes
a ``torch.distributed.Store`` of them, wherever they lie, which process groups of torch use as well.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import DistNetworkError, Store  # type: ignore[attr-defined]

from moeserve.comm.group import backing_off
from moeserve.errors import ConfigError
from moeserve.pb import notes_pb2 as pb

# Between looks for a note that is awaited.
FIRST_LOOK_S, SLOWEST_LOOK_S = 0.002, 0.1


@dataclass(frozen=True, slots=True)
class NoteBounds:
    """In bytes, but ``most_keys``. Of 1,024 ranks each leaves some twenty notes, and the longest
    value (what all of them have gathered) takes 100 KB."""

    most_keys: int = 1 << 17
    most_key_bytes: int = 1 << 10
    most_value_bytes: int = 16 << 20
    most_bytes: int = 256 << 20


class Notes:
    """Owns the values; any thread may ask."""

    def __init__(self, bounds: NoteBounds | None = None) -> None:
        self._bounds = bounds or NoteBounds()
        self._values: dict[str, bytes] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: str) -> bytes | None:
        """None where there is none."""
        with self._lock:
            return self._values.get(key)

    def has_all(self, keys: Sequence[str]) -> bool:
        with self._lock:
            return all(key in self._values for key in keys)

    def set(self, key: str, value: bytes) -> None:
        with self._lock:
            self._put(key, value)

    def append(self, key: str, value: bytes) -> None:
        """To what is there, or to nothing."""
        with self._lock:
            self._put(key, self._values.get(key, b"") + value)

    def add(self, key: str, amount: int) -> int:
        """To a number, which is 0 where there was none; the sum. ConfigError where the value is no
        number."""
        with self._lock:
            before = self._values.get(key, b"0")
            try:
                after = int(before) + amount
            except ValueError as error:
                raise ConfigError(f"note {key[:80]!r} is {before[:20]!r}, no number") from error
            self._put(key, b"%d" % after)
            return after

    def compare_set(self, key: str, expected: bytes, value: bytes) -> bytes:
        """Set where the value is ``expected``, or where there is none and nothing is expected; what
        is there afterwards, or ``expected`` where nothing is."""
        with self._lock:
            before = self._values.get(key)
            if before == expected or (before is None and not expected):
                self._put(key, value)
            return self._values.get(key, expected)

    def _put(self, key: str, value: bytes) -> None:
        bounds, before = self._bounds, self._values.get(key)
        if before is None and len(self._values) >= bounds.most_keys:
            raise _beyond(key, f"{bounds.most_keys} notes")
        if (size := len(key.encode())) > bounds.most_key_bytes:
            raise _beyond(key, f"{bounds.most_key_bytes} bytes of a key")
        if len(value) > bounds.most_value_bytes:
            raise _beyond(key, f"{bounds.most_value_bytes} bytes of a note")
        total = self._bytes + len(value) - len(before or b"") + (size if before is None else 0)
        if total > bounds.most_bytes:
            raise _beyond(key, f"{bounds.most_bytes} bytes of all notes")
        self._values[key] = value
        self._bytes = total


def _beyond(key: str, bound: str) -> ConfigError:
    return ConfigError(
        f"note {key[:80]!r} is beyond {bound}: a rank writes what none should; start anew"
    )


class NoteStore(Store):
    """What torch asks of a store, by operations that do not wait (``_ask``)."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__()
        self._timeout_s = timeout_s

    def _ask(self, method: str, request: pb.NoteRequest) -> pb.NoteReply:
        raise NotImplementedError

    def set(self, key: str, value: str | bytes) -> None:
        self._ask("Set", pb.NoteRequest(key=key, value=_bytes_of(value)))

    def get(self, key: str) -> bytes:
        """DistNetworkError where none comes in time."""
        return self._await("Get", pb.NoteRequest(key=key), self._timeout_s).value

    def append(self, key: str, value: str | bytes) -> None:
        self._ask("Append", pb.NoteRequest(key=key, value=_bytes_of(value)))

    def add(self, key: str, amount: int) -> int:
        return self._ask("Add", pb.NoteRequest(key=key, amount=amount)).number

    def check(self, keys: Sequence[str]) -> bool:
        return self._ask("Check", pb.NoteRequest(more_keys=keys)).found

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        timeout_s = self._timeout_s if timeout is None else timeout.total_seconds()
        self._await("Check", pb.NoteRequest(more_keys=keys), timeout_s)

    def compare_set(self, key: str, expected: str | bytes, value: str | bytes) -> bytes:
        request = pb.NoteRequest(key=key, expected=_bytes_of(expected), value=_bytes_of(value))
        return self._ask("CompareSet", request).value

    def _await(self, method: str, request: pb.NoteRequest, timeout_s: float) -> pb.NoteReply:
        until = time.monotonic() + timeout_s
        pauses = backing_off(FIRST_LOOK_S, SLOWEST_LOOK_S)
        while not (reply := self._ask(method, request)).found:
            if time.monotonic() > until:
                names = [*([request.key] if request.key else []), *request.more_keys][:4]
                raise DistNetworkError(f"no note under {names} within {timeout_s:g} s")
            time.sleep(next(pauses))
        return reply


def note_methods(notes: Notes) -> Mapping[str, Callable[[pb.NoteRequest], pb.NoteReply]]:
    """What may be asked of notes, by the name of its call."""

    def get(request: pb.NoteRequest) -> pb.NoteReply:
        value = notes.get(request.key)
        return pb.NoteReply(found=value is not None, value=value or b"")

    def put(request: pb.NoteRequest) -> pb.NoteReply:
        notes.set(request.key, request.value)
        return pb.NoteReply(found=True)

    def append(request: pb.NoteRequest) -> pb.NoteReply:
        notes.append(request.key, request.value)
        return pb.NoteReply(found=True)

    def add(request: pb.NoteRequest) -> pb.NoteReply:
        return pb.NoteReply(found=True, number=notes.add(request.key, request.amount))

    def check(request: pb.NoteRequest) -> pb.NoteReply:
        return pb.NoteReply(found=notes.has_all(request.more_keys))

    def compare_set(request: pb.NoteRequest) -> pb.NoteReply:
        value = notes.compare_set(request.key, request.expected, request.value)
        return pb.NoteReply(found=True, value=value)

    return {
        "Get": get,
        "Set": put,
        "Append": append,
        "Add": add,
        "Check": check,
        "CompareSet": compare_set,
    }


def _bytes_of(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
