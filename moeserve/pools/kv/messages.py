"""What the two sides of a KV transfer read of one another: frames in order, each a message.

DataLossError where a frame is not whole, InvalidRequestError where it is none of ours.
"""

from __future__ import annotations

from moeserve.engine.ranks.messages import parse
from moeserve.pb import kv_pb2 as pb
from moeserve.pools.kv.frames import Side, unseal


class Reader:
    """Reads what whoever fetches says."""

    def __init__(self) -> None:
        self._number = 0

    def read(self, frame: bytes) -> tuple[pb.ToSource, memoryview]:
        head, data = unseal(Side.RECEIVER, self._number, frame)
        self._number += 1
        return parse(pb.ToSource, head), data


class SourceReader:
    """Reads what a source says."""

    def __init__(self) -> None:
        self._number = 0

    def read(self, frame: bytes) -> tuple[pb.FromSource, memoryview]:
        head, data = unseal(Side.SOURCE, self._number, frame)
        self._number += 1
        return parse(pb.FromSource, head), data
