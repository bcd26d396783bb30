"""One call to a source, from the side that fetches: what comes is checked and imported as it comes.

On the event loop's thread; bytes are checked and imported on the mover's, while the next messages
are awaited: ``MOST_TAKEN`` and one more are here at a time.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import grpc

from moeserve.core import Event, Request
from moeserve.engine.ranks.messages import read_news
from moeserve.engine.sequence import History, KvSource
from moeserve.errors import InvalidRequestError, UnavailableError
from moeserve.kernels.kv_layout import KvBlockLayout
from moeserve.pb import kv_pb2 as pb
from moeserve.pools.kv.counters import KvCounters
from moeserve.pools.kv.digests import DIGEST_BYTES, Data
from moeserve.pools.kv.flow import REST_S, TURN, reaches
from moeserve.pools.kv.frames import Side, seal
from moeserve.pools.kv.importer import KvImporter
from moeserve.pools.kv.limits import FetchLimits
from moeserve.pools.kv.memory import SlotMemory, SlotViews
from moeserve.pools.kv.messages import SourceReader
from moeserve.pools.kv.mover import Mover, look_at_error
from moeserve.pools.kv.runs import Stretch, count_runs, stretch_bytes

# Messages that wait to be imported, or are.
MOST_TAKEN = 2
# So little is imported at once: to wake the mover's thread takes longer.
IMPORTED_AT_ONCE = 128 << 10


class SourceLostError(UnavailableError):
    """A source from which nothing more is to be had; ``kind`` is what is counted: ``unreachable``,
    ``late``, ``refused``, ``wrong``."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class FetchOrder:
    """What is asked for: the KV of all tokens of a request, into ``importer``.

    ``on_event`` gets what the source's engine makes of the request. ``on_handed`` gets the tokens
    of a request that ran at the source, all that it made, and of how many of its tokens the KV is
    to come; it makes room for them. ``on_made`` gets the tokens that it has made meanwhile, before
    that. Each ends the fetch with False. ``on_whole`` is called when all has come, before the
    source is told so.
    """

    source: KvSource
    request: Request
    history: History
    importer: KvImporter
    on_event: Callable[[Event], bool]
    on_handed: Callable[[tuple[int, ...], int], Awaitable[bool]]
    on_made: Callable[[tuple[int, ...]], Awaitable[bool]]
    on_whole: Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Taken:
    """Runs that are being imported: which are to come again, and the slot that they lie in."""

    found: asyncio.Future[list[Stretch]]
    slot: int | None


class ReceiverCall:
    """Reads and writes ``call``, which whoever made it ends. ``memory`` and ``registered`` were
    offered to the source, which has no more use for them when the call ``ended_well``."""

    def __init__(
        self,
        order: FetchOrder,
        call: Any,
        layouts: Sequence[KvBlockLayout],
        mover: Mover,
        counters: KvCounters,
        limits: FetchLimits,
        memory: SlotMemory | None,
        registered: SlotViews | None = None,
    ) -> None:
        self.ended_well = False
        self._memory = memory
        self._registered = registered
        self._slots: tuple[str, SlotViews] | None = None  # what the source writes to
        self._order = order
        self._importer = order.importer
        self._call = call
        self._layouts = layouts
        self._mover = mover
        self._counters = counters
        self._limits = limits
        self._reader = SourceReader()
        self._written = 0
        self._run_size = 0
        self._position_bytes = max(layout.nbytes // layout.block_size for layout in layouts)
        self._stopped = self._ended = self._enough = False
        self._heard = time.monotonic()
        self._taking: deque[_Taken] = deque()
        self._reading: asyncio.Task[tuple[pb.FromSource, Data]]

    async def run(self, wanted: pb.ToSource) -> None:
        """Until all is imported. SourceLostError where the source is late; errors of gRPC, and of
        ``messages`` and ``importer``, as they are."""
        await self._send(wanted)
        begun = await self._read(self._limits.first_s)
        if begun[0].WhichOneof("what") != "begun" or not 0 < begun[0].begun.run_size < 1 << 20:
            raise InvalidRequestError(f"a first message that says {begun[0].WhichOneof('what')}")
        self._run_size = begun[0].begun.run_size
        if begun[0].begun.memory and self._memory is not None:
            self._slots = "memory", self._memory
        elif begun[0].begun.registered and self._registered is not None:
            self._slots = "mooncake", self._registered
        await self._stop_when_near()
        self._reading = self._read_on()
        try:
            while not (self._ended and self._importer.complete) and not self._enough:
                await self._finish_until(self._reading)
                message, data = await self._reading
                self._reading = self._read_on()
                await self._hear(message, data)
            self.ended_well = not self._enough
            if not self._enough:
                self._order.on_whole()
            await self._send(pb.ToSource(done=pb.Done()))
        finally:
            # A read that is cancelled cancels the call, and with it whatever else waits there.
            self._reading.add_done_callback(look_at_error)
            self._reading.cancel()

    def _read_on(self) -> asyncio.Task[tuple[pb.FromSource, Data]]:
        return asyncio.create_task(self._read(self._limits.progress_s))

    async def _finish_until(self, reading: asyncio.Future[Any]) -> None:
        """What is imported is answered until there is a message, and room for what it brings."""
        while self._taking:
            found, full = self._taking[0].found, len(self._taking) >= MOST_TAKEN
            if not found.done() and (full or not reading.done()):
                waits = {found} if full else {found, reading}
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if found.done():
                await self._finish()
            elif reading.done() and not full:
                return

    async def _hear(self, message: pb.FromSource, data: Data) -> None:
        what = message.WhichOneof("what")
        if what == "beat":
            idle = time.monotonic() - self._heard
            if idle > self._limits.queued_s:
                raise self._late(f"has made nothing for {idle:.0f} s")
            return
        self._heard = time.monotonic()
        if what == "spans":
            await self._take(message.spans, data)
            return
        await self._finish_all()
        match what:
            case "flow" if not self._ended:
                await self._take_flow(message.flow)
            case "news":
                self._enough = not self._order.on_event(read_news(message.news))
            case "made" if self._stopped:
                self._enough = not await self._order.on_made(tuple(message.made.outputs))
            case "handed" if self._stopped:
                handed = message.handed
                outputs = tuple(handed.outputs)
                self._enough = not await self._order.on_handed(outputs, handed.computed)
                if handed.HasField("spans") and not self._enough:
                    await self._take(handed.spans, data)
            case "ended" if not self._ended:
                self._end()
            case _:
                raise InvalidRequestError(f"a message that says {what}, which is not due")

    async def _take(self, spans: pb.Spans, data: Data) -> None:
        """Imports them; behind the last ones, what has to come again is waited for."""
        small = sum(span.stop - span.start for span in spans.spans) * self._position_bytes
        if small <= IMPORTED_AT_ONCE and not self._taking:
            found = asyncio.get_running_loop().create_future()
            found.set_result(self._import(spans, data))
        else:
            found = self._mover.start(self._import, spans, data)
        self._taking.append(_Taken(found, spans.slot if spans.HasField("slot") else None))
        if spans.last and self._ended:
            raise InvalidRequestError("its end twice")
        if spans.last or self._ended:
            await self._finish_all()
            self._end()

    async def _take_flow(self, flow: pb.Flow) -> None:
        """Its frames, as the source fills them."""
        memory, frames, at = self._memory, flow.frames, 0
        if memory is None or flow.first != memory.frames:
            raise InvalidRequestError(f"frames from {flow.first} on in memory that has none")
        while at < len(frames):
            wrong, done = await self._mover.run(self._import_flow, memory, frames[at : at + TURN])
            for stretch in wrong:
                await self._ask_again(stretch)
            if done:
                at, self._heard = at + done, time.monotonic()
            elif time.monotonic() - self._heard > self._limits.progress_s:
                raise self._late(f"has filled nothing for {self._limits.progress_s:.0f} s")
            elif self._reading.done() and memory.filled_frames() <= memory.frames:
                message, _ = await self._reading  # raises, where the call has failed
                if message.WhichOneof("what") != "beat":
                    raise InvalidRequestError(f"{at} of {len(frames)} frames that were announced")
                self._reading = self._read_on()
            else:
                await asyncio.sleep(REST_S)
        if flow.last:
            self._end()
        await self._stop_when_near()

    def _import_flow(
        self, memory: SlotMemory, frames: Sequence[pb.Spans]
    ) -> tuple[list[Stretch], int]:
        """On the mover's thread: runs that are to come again, and how many frames were there."""
        wrong: list[Stretch] = []
        for done, frame in enumerate(frames):
            if not reaches(memory.filled_frames, memory.frames + 1):
                return wrong, done
            stretches, size = self._stretches(frame)
            slot = memory.slot(memory.frames % memory.slots)
            counts = [DIGEST_BYTES * count_runs(s, self._run_size) for s in stretches]
            begin = len(slot) - sum(counts)
            if not stretches or size > begin:
                raise InvalidRequestError(f"a frame of {size} bytes and {sum(counts)} of digests")
            ends = accumulate(counts, initial=begin)
            digests = [bytes(slot[start:end]) for start, end in pairwise(ends)]
            wrong += self._importer.take(stretches, digests, self._run_size, slot[:size], "memory")
            memory.free_frame()
        return wrong, len(frames)

    def _stretches(self, spans: pb.Spans) -> tuple[list[Stretch], int]:
        """And how many bytes they have."""
        stretches = [Stretch(span.layer, span.start, span.stop) for span in spans.spans]
        size = 0
        for one in stretches:
            if not (one.layer < len(self._layouts) and one.start < one.stop):
                raise InvalidRequestError(f"runs of layer {one.layer}, {one.start}..{one.stop}")
            size += stretch_bytes(self._layouts[one.layer], one)
        return stretches, size

    async def _ask_again(self, stretch: Stretch) -> None:
        self._counters.add("retries")
        count = stretch.stop - stretch.start
        again = pb.Again(layer=stretch.layer, start=stretch.start, count=count)
        await self._send(pb.ToSource(again=again))

    def _end(self) -> None:
        self._ended = True
        if not (self._importer.complete or self._importer.awaits_again):
            raise InvalidRequestError(f"its end, with {self._importer.left} positions left out")

    async def _finish_all(self) -> None:
        while self._taking:
            await self._finish()

    async def _finish(self) -> None:
        """The first that was taken is imported, and the source told so."""
        taken = self._taking.popleft()
        wrong = await asyncio.shield(taken.found)
        if taken.slot is not None:
            await self._send(pb.ToSource(freed=pb.Freed(slot=taken.slot)))
        for stretch in wrong:
            await self._ask_again(stretch)
        if not self._taking:  # nobody else looks at what has come
            await self._stop_when_near()

    def _import(self, spans: pb.Spans, data: Data) -> list[Stretch]:
        """On the mover's thread; the runs that are to come again."""
        view, transport = memoryview(data), "grpc"
        if spans.HasField("slot"):
            if self._slots is None or data:
                raise InvalidRequestError(f"slot {spans.slot} of a memory that is not there")
            transport, slots = self._slots
            view = slots.slot(spans.slot)
        stretches, size = self._stretches(spans)
        if not stretches or (size != len(view) if transport == "grpc" else size > len(view)):
            raise InvalidRequestError(f"{len(view)} bytes of runs that have {size}")
        digests = [span.digests for span in spans.spans]
        return self._importer.take(stretches, digests, self._run_size, view[:size], transport)

    async def _stop_when_near(self) -> None:
        """What runs at the source is taken out there as soon as little is left to come."""
        near = self._importer.left < self._run_size
        if self._order.source.running and near and not self._stopped:
            self._stopped = True
            await self._send(pb.ToSource(stop=pb.Stop()))

    async def _read(self, wait_s: float) -> tuple[pb.FromSource, Data]:
        try:
            async with asyncio.timeout(wait_s):
                frame = await self._call.read()
        except TimeoutError as error:
            raise self._late(f"has said nothing for {wait_s:.0f} s") from error
        if frame is grpc.aio.EOF:
            # A call that failed ends so too, and then says why.
            code = await asyncio.wait_for(self._call.code(), wait_s)
            if code is not grpc.StatusCode.OK:
                await self._call  # raises
            raise InvalidRequestError("its end before all was there")
        return self._reader.read(frame)

    async def _send(self, message: pb.ToSource) -> None:
        frame = seal(Side.RECEIVER, self._written, message.SerializeToString())
        self._written += 1
        try:
            async with asyncio.timeout(self._limits.progress_s):
                await self._call.write(frame)
        except TimeoutError as error:
            raise self._late("takes nothing") from error
        except asyncio.InvalidStateError:
            # The call has ended, and reading says why.
            return

    def _late(self, what: str) -> SourceLostError:
        return SourceLostError(f"{self._order.source.address} {what}", "late")
