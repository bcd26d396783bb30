"""Frames one after the other through memory that two processes share, without a message for each.

A message says beforehand which frames come (``pb.Flow``). From then on two words of the memory's
header count: frames that the source has ``filled``, and those that whoever fetches has ``freed``,
since the memory was made. Frame ``n`` lies in slot ``n % slots``, with the digests of its runs, 16
bytes each, at the slot's end; the source fills it when frame ``n - slots`` is freed. Each side
writes one word, looks at the other for ``LOOK_S`` at most, on its mover's thread, and then lets
others have their turn; so neither waits for the other while it has something to do. What the words
say is not believed: data has its digests, and a frame is counted by the side that has it.

A word is written by one side with calls before it that take and leave a lock (the interpreter's),
so what it says is there is seen before it; where it were not, digests would say so.

Letters: X bytes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moeserve.core import BlockId
from moeserve.kernels.kv_layout import KvBlockLayout
from moeserve.kernels.kv_runs import DIGEST_BYTES
from moeserve.pb import kv_pb2 as pb
from moeserve.pools.kv.exporter import Frame, FrameParts, KvExporter
from moeserve.pools.kv.limits import FetchLimits
from moeserve.pools.kv.memory import MemoryOutlet
from moeserve.pools.kv.mover import Mover
from moeserve.pools.kv.runs import ALIGNMENT, count_runs
from moeserve.pools.kv.source_messages import FrameWriter

# How long a mover's thread looks for what the other side has done, and how often; then others have
# a turn, and it rests.
LOOK_S, PAUSE_S, REST_S = 0.002, 0.00005, 0.001
# Looks without a pause.
EAGER = 20
# Frames of one turn.
TURN = 8
# Runs of a frame that are shorter than a block, for which there is room.
PARTIAL_RUNS = 8
# Fewer are sent one by one.
FEWEST = 2


def reaches(word: Callable[[], int], least: int) -> bool:
    """Whether it is so much within ``LOOK_S``."""
    for _ in range(EAGER):
        if word() >= least:
            return True
    end = time.monotonic() + LOOK_S
    while word() < least:
        if time.monotonic() > end:
            return False
        time.sleep(PAUSE_S)
    return True


def flow_bytes(layouts: Sequence[KvBlockLayout], slot_bytes: int) -> int:
    """So many bytes of runs leave room in a slot for their digests; all, where slots are small."""
    least, most = min(x.nbytes for x in layouts), max(x.nbytes for x in layouts) + ALIGNMENT
    found = slot_bytes * least // (least + DIGEST_BYTES) - PARTIAL_RUNS * DIGEST_BYTES
    return found if found >= most else slot_bytes


def flow_of(frames: Sequence[Frame], first: int, *, last: bool) -> pb.FromSource:
    said = [
        pb.Spans(spans=[pb.Span(layer=s.layer, start=s.start, stop=s.stop) for s in frame])
        for frame in frames
    ]
    return pb.FromSource(flow=pb.Flow(first=first, frames=said, last=last))


@dataclass(slots=True)
class _Batch:
    """Frames from the number ``first`` on, of which so many are done."""

    first: int
    frames: Sequence[Frame]
    done: int = 0
    parts: FrameParts | None = None


class FlowSource:
    """Of one call, which ``gone`` says is over; a source's side."""

    def __init__(
        self,
        outlet: MemoryOutlet,
        exporter: KvExporter,
        mover: Mover,
        writer: FrameWriter,
        limits: FetchLimits,
        gone: Callable[[], bool],
    ) -> None:
        self._outlet = outlet
        self._exporter = exporter
        self._mover = mover
        self._writer = writer
        self._limits = limits
        self._gone = gone

    def takes(self, frames: Sequence[Frame], run_size: int) -> bool:
        """Whether they can be sent so, and it is worth it."""
        if len(frames) < FEWEST:
            return False
        most = self._outlet.slot_bytes
        return all(
            self._exporter.size_of(frame)
            + DIGEST_BYTES * sum(count_runs(stretch, run_size) for stretch in frame)
            <= most
            for frame in frames
        )

    async def send(self, blocks: Sequence[BlockId], frames: Sequence[Frame], *, last: bool) -> None:
        """All of them, unless the call is over; with beats between them. TimeoutError where whoever
        fetches frees nothing."""
        first = await self._outlet.begin_flow(len(frames))
        await self._writer.send(flow_of(frames, first, last=last))
        since, beat = time.monotonic(), time.monotonic() + self._limits.beat_s
        for begin in range(0, len(frames), TURN):
            batch = _Batch(first + begin, frames[begin : begin + TURN])
            while batch.done < len(batch.frames) and not self._gone():
                now = time.monotonic()
                if now > beat:
                    beat = now + self._limits.beat_s
                    await self._writer.send(pb.FromSource(beat=pb.Beat()))
                if await self._mover.run(self._fill, blocks, batch):
                    since = time.monotonic()
                elif now - since > self._limits.stalled_s:
                    raise TimeoutError
                else:
                    await asyncio.sleep(REST_S)

    def _fill(self, blocks: Sequence[BlockId], batch: _Batch) -> int:
        """As many as there is room for now, one after the other."""
        outlet, before = self._outlet, batch.done
        if batch.parts is None:
            batch.parts = self._exporter.parts(blocks, batch.frames)
        for n in range(before, len(batch.frames)):
            frame = batch.first + n
            if not reaches(outlet.freed_frames, frame + 1 - outlet.slots):
                break
            slot_X = outlet.slot_of(frame)
            digests_X = batch.parts.export(n, slot_X).view(-1)
            slot_X[len(slot_X) - len(digests_X) :] = digests_X
            outlet.fill(frame + 1)
            batch.done += 1
        return batch.done - before
