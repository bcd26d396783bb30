"""Messages between a process and its worker: a JSON head and a payload of bytes.

A frame is the length of both in eight bytes, then both. Bounded, so that neither side can make the
other keep what it likes. The standard library only.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

LENGTHS = struct.Struct("<II")
MOST_HEAD = 1 << 20
MOST_PAYLOAD = 1 << 27

Head = Mapping[str, Any]


def packed(head: Head, payload: bytes = b"") -> bytes:
    """One frame. ValueError where it is larger than frames may be."""
    text = json.dumps(head, ensure_ascii=False).encode()
    return LENGTHS.pack(*_bounded(len(text), len(payload))) + text + payload


def lengths_of(begun: bytes) -> tuple[int, int]:
    """Bytes of head and payload, from the first eight; ValueError where it is too large."""
    return _bounded(*LENGTHS.unpack(begun))


def head_of(text: bytes) -> dict[str, Any]:
    head: dict[str, Any] = json.loads(text)
    return head


def read_frame(stream: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """The next one; None where the other side has closed, also within a frame."""
    begun = stream.read(LENGTHS.size)
    if len(begun) < LENGTHS.size:
        return None
    head, payload = lengths_of(begun)
    text = stream.read(head)
    content = stream.read(payload)
    return (head_of(text), content) if len(text) + len(content) == head + payload else None


def _bounded(head: int, payload: int) -> tuple[int, int]:
    if head > MOST_HEAD or payload > MOST_PAYLOAD:
        raise ValueError(f"a frame of {head} and {payload} bytes is too large")
    return head, payload
