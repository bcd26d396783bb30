"""Messages of a KV transfer as bytes: a head, which is protobuf, and KV behind it.

::

    "KvF2"  number u32  length of the head u32  length of the data u64  digest 16 B  head  data

Little-endian. The digest (XXH3-128) is over everything before it, who speaks, and the head; the
data has digests of its own, run by run, in the head. Frames of each side are numbered from 0, so
one that is lost, comes twice, or out of order, does not pass either.

DataLossError where a frame is not whole.
"""

from __future__ import annotations

import ctypes
import struct
from enum import IntEnum

import numpy as np
import torch
import xxhash
from torch import Tensor

from moeserve.errors import DataLossError
from moeserve.pools.kv.digests import DIGEST_BYTES, Data

_PREFIX = struct.Struct("<4sIIQ")
_MAGIC = b"KvF2"
PREFIX_BYTES = _PREFIX.size + DIGEST_BYTES


class Side(IntEnum):
    """Who speaks."""

    RECEIVER = 1
    SOURCE = 2


def seal(side: Side, number: int, head: bytes, data: Data = b"") -> bytes:
    prefix = _PREFIX.pack(_MAGIC, number, len(head), len(data))
    return b"".join((prefix, _digest(side, prefix, head), head, data))


class FramePlace:
    """Memory of one frame, whose data is written to ``data_X`` (uint8 [``data_size``]) before its
    head, of ``head_size`` bytes, is known: so data is not copied into a message."""

    def __init__(self, head_size: int, data_size: int) -> None:
        # Bytes that nobody has seen yet may be written to, as extensions of the interpreter do.
        make = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t)(
            ("PyBytes_FromStringAndSize", ctypes.pythonapi)
        )
        self._front = PREFIX_BYTES + head_size
        self._size = data_size
        self._frame: bytes = make(None, self._front + data_size)
        self._start = np.frombuffer(self._frame, np.uint8).ctypes.data
        place = (ctypes.c_ubyte * data_size).from_address(self._start + self._front)
        self.data_X: Tensor = torch.frombuffer(place, dtype=torch.uint8)

    def seal(self, side: Side, number: int, head: bytes) -> bytes:
        """The frame, once; nothing is written to ``data_X`` any more."""
        assert PREFIX_BYTES + len(head) == self._front, f"a head of {len(head)} bytes"
        prefix = _PREFIX.pack(_MAGIC, number, len(head), self._size)
        front = prefix + _digest(side, prefix, head) + head
        ctypes.memmove(self._start, front, len(front))
        return self._frame


def unseal(side: Side, number: int, frame: bytes) -> tuple[bytes, memoryview]:
    """Head and data of the frame of that number, which ``side`` made."""
    if len(frame) < PREFIX_BYTES:
        raise DataLossError(f"a frame of {len(frame)} bytes: it has {PREFIX_BYTES} at least")
    magic, found, head_size, data_size = _PREFIX.unpack_from(frame)
    if magic != _MAGIC or PREFIX_BYTES + head_size + data_size != len(frame):
        raise DataLossError(f"{len(frame)} bytes are no frame: {frame[:20].hex()}")
    if found != number:
        raise DataLossError(f"frame {found} came where {number} was due")
    digest = frame[_PREFIX.size : PREFIX_BYTES]
    head = frame[PREFIX_BYTES : PREFIX_BYTES + head_size]
    if digest != _digest(side, frame[: _PREFIX.size], head):
        raise DataLossError(f"frame {number} did not arrive whole: its digest is another")
    return head, memoryview(frame)[PREFIX_BYTES + head_size :]


def _digest(side: Side, prefix: bytes, head: bytes) -> bytes:
    found = xxhash.xxh3_128(bytes((side,)))
    found.update(prefix)
    found.update(head)
    return found.digest()
