"""What a source says of the KV that it sends, and how.

On the event loop's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from moeserve.errors import UnavailableError
from moeserve.pb import kv_pb2 as pb
from moeserve.pools.kv.frames import FramePlace, Side, seal
from moeserve.pools.kv.runs import Stretch

Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")


class FrameWriter:
    """A source's side of a call."""

    def __init__(self, context: Context, stalled_s: float) -> None:
        self._context = context
        self._stalled_s = stalled_s
        self._number = 0

    async def send(self, message: pb.FromSource, place: FramePlace | None = None) -> None:
        """With the data of ``place``. UnavailableError where it is not taken in time."""
        head, number = message.SerializeToString(), self._number
        if place is None:
            frame = seal(Side.SOURCE, number, head)
        else:
            frame = place.seal(Side.SOURCE, number, head)
        self._number += 1
        try:
            async with asyncio.timeout(self._stalled_s):
                await self._context.write(frame)
        except TimeoutError as error:
            raise UnavailableError(
                f"whoever fetches has taken nothing for {self._stalled_s:.0f} s"
            ) from error


@dataclass(frozen=True, slots=True)
class Ending:
    """What a message says beside its spans: that the request has left (``handed``), that no other
    position follows (``last``)."""

    handed: pb.Handed | None = None
    last: bool = False


MORE = Ending()


def spans_of(
    frame: Sequence[Stretch],
    digests: Sequence[bytes],
    slot: int | None,
    ending: Ending = MORE,
) -> pb.FromSource:
    made = [
        pb.Span(layer=s.layer, start=s.start, stop=s.stop, digests=digest)
        for s, digest in zip(frame, digests, strict=True)
    ]
    spans = pb.Spans(spans=made, slot=slot, last=ending.last)
    if ending.handed is None:
        return pb.FromSource(spans=spans)
    handed = pb.Handed(spans=spans)
    handed.MergeFrom(ending.handed)
    return pb.FromSource(handed=handed)


def with_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Each, and whether it is the last."""
    some = iter(items)
    for before in some:
        for item in some:
            yield before, False
            before = item
        yield before, True
