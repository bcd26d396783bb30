"""One call of a source: what is computed leaves as it is computed, until all has left.

On the event loop's thread; caches are read on the mover's. What this rank holds for the call is let
go of when the call ends, for whatever reason: behind whatever still reads it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from itertools import chain

from moeserve.engine.ranks.messages import write_news
from moeserve.engine.sequence import HeldKv, StepKv
from moeserve.errors import InvalidRequestError, MoeserveError, UnavailableError
from moeserve.pb import kv_pb2 as pb
from moeserve.pools.kv.counters import KvCounters
from moeserve.pools.kv.digests import DIGEST_BYTES
from moeserve.pools.kv.exporter import KvExporter
from moeserve.pools.kv.flow import FlowSource
from moeserve.pools.kv.house import KvHouse
from moeserve.pools.kv.limits import FetchLimits
from moeserve.pools.kv.memory import MemoryOutlet
from moeserve.pools.kv.messages import Reader
from moeserve.pools.kv.mover import Mover
from moeserve.pools.kv.order import MOST_MISSING
from moeserve.pools.kv.outlet import FrameRoom, Outlet
from moeserve.pools.kv.runs import Stretch, count_runs, fill_frames, plan_stretches
from moeserve.pools.kv.source_messages import MORE, Ending, FrameWriter, spans_of, with_last
from moeserve.pools.kv.supply import KvSupply, RunningSupply

# Frames that are filled or wait to be sent, while the one before them is sent.
MOST_MADE = 2
# Of what a request makes while its KV leaves.
MOST_ROUNDS = 8
# So little is filled at once: to wake the mover's thread takes longer.
FILLED_AT_ONCE = 128 << 10


@dataclass(frozen=True, slots=True)
class _Making:
    """A frame that is filled, with digests of its runs."""

    frame: tuple[Stretch, ...]
    room: FrameRoom
    filled: asyncio.Future[list[bytes]]
    ending: Ending


class SourceCall:
    """``have .. length - 1`` are the positions that are wanted of what ``supply`` has."""

    def __init__(
        self,
        house: KvHouse,
        supply: KvSupply,
        exporter: KvExporter,
        outlet: Outlet,
        writer: FrameWriter,
        mover: Mover,
        counters: KvCounters,
        limits: FetchLimits,
        have: int,
    ) -> None:
        self._house = house
        self._supply = supply
        self._exporter = exporter
        self._outlet = outlet
        self._writer = writer
        self._mover = mover
        self._counters = counters
        self._limits = limits
        self._have = self._until = have
        self._sent_L = [have] * len(house.layouts)
        self._looked: HeldKv | None = None
        self._wake = asyncio.Event()
        self._again: deque[Stretch] = deque()
        self._left = False
        self._broken: BaseException | None = None
        self._flow: FlowSource | None = None
        if isinstance(outlet, MemoryOutlet):
            gone = lambda: self._left or self._broken is not None  # noqa: E731
            self._flow = FlowSource(outlet, exporter, mover, writer, limits, gone)

    def tell(self) -> None:
        """There is something to look at. On the event loop's thread."""
        self._wake.set()

    async def run(self, requests: AsyncIterator[bytes], reader: Reader) -> None:
        """Until whoever fetches has all, or leaves."""
        reading = asyncio.create_task(self._read(requests, reader))
        try:
            await self._mover.run(self._supply.begin)
            await self._writer.send(
                pb.FromSource(
                    begun=pb.Begun(
                        run_size=self._house.block_size,
                        memory=self._outlet.name == "memory",
                        registered=self._outlet.name == "mooncake",
                    )
                )
            )
            while not self._supply.over and not self._left:
                await self._send_computed()
                await self._send_layers()
                await self._rest()
            if isinstance(self._supply, RunningSupply):
                await self._catch_up(self._supply)
            if not self._left:
                await self._send_rest()
        except TimeoutError as error:
            raise UnavailableError(
                f"whoever fetches has freed nothing for {self._limits.stalled_s:.0f} s"
            ) from error
        finally:
            reading.cancel()
            self._mover.later(self._supply.close)
            self._mover.later(self._outlet.close)

    async def _rest(self) -> None:
        """Until there is something new; whoever fetches hears from this side in any case."""
        await self._send_news()
        if self._supply.over:
            return
        try:
            await asyncio.wait_for(self._wake.wait(), self._limits.beat_s)
        except TimeoutError:
            beat = pb.Beat(waiting=self._sent == self._have)
            await self._writer.send(pb.FromSource(beat=beat))
        self._wake.clear()
        if self._broken is not None:
            raise self._broken

    async def _send_news(self) -> None:
        for event in self._supply.take_news():
            message = pb.FromSource()
            write_news(message.news, event)
            await self._writer.send(message)

    async def _send_computed(self) -> None:
        """Whole blocks that are new, as long as more are to come."""
        try:
            held = await self._mover.run(self._look)
            if held is not None:
                known, size = len(self._exporter.digests), self._house.block_size
                await self._send_until(held, min(held.computed, known) // size * size)
                await self._send_again(held)
        finally:
            self._mover.later(self._let_go)

    async def _catch_up(self, supply: RunningSupply) -> None:
        """The request goes on while what it made during a round leaves in the next one, until less
        than a run is left for its end, or for ``MOST_ROUNDS``."""
        for _ in range(MOST_ROUNDS):
            if self._left:
                return
            if made := await self._mover.run(supply.made):
                await self._writer.send(pb.FromSource(made=pb.Made(outputs=made)))
                self._exporter.digests.extend(made)
                supply.known += made
            sent = self._sent
            await self._send_computed()
            if self._sent == sent:
                return
            self._counters.add("rounds")

    async def _send_layers(self) -> None:
        """What a step that runs now computes leaves layer by layer, until there is something else
        to look at: after the step at the latest."""
        try:
            within = await self._mover.run(self._look_within)
            known, size = len(self._exporter.digests), self._house.block_size
            stop = 0 if within is None else min(within.stop, known) // size * size
            if within is None or stop <= min(self._sent_L):
                return
            began, done, layers = time.monotonic(), 0, len(self._sent_L)
            while done < layers and not self._left and not self._wake.is_set():
                before, done = done, self._house.layers_done(within.step)
                if done > before:
                    await self._send_until(within.held, stop, done, within.step)
                    began = time.monotonic()
                elif time.monotonic() - began > self._limits.beat_s:
                    return
                else:
                    await asyncio.sleep(self._limits.layers_s)
        finally:
            self._mover.later(self._let_go)

    def _look_within(self) -> StepKv | None:
        assert self._looked is None, "it is looked at once at a time"
        within = self._supply.look_within()
        self._looked = None if within is None else within.held
        return within

    def _look(self) -> HeldKv | None:
        """On the mover's thread, which lets go of it even if nobody waits for this any more."""
        assert self._looked is None, "it is looked at once at a time"
        self._looked = self._supply.look()
        return self._looked

    def _let_go(self) -> None:
        held, self._looked = self._looked, None
        if held is not None:
            self._house.give_back(held)

    async def _send_rest(self) -> None:
        """All that is left, and what has to come again, until whoever fetches leaves."""
        taken = await self._take_rest()
        if taken is None:
            return
        held, handed = taken
        await self._send_news()
        length = len(self._exporter.digests) if handed is None else held.computed
        assert self._sent <= length <= held.computed, (self._sent, length, held)
        if min(self._sent_L) < length:
            await self._send_until(held, length, ending=Ending(handed, last=True))
        else:
            if handed is not None:
                await self._writer.send(pb.FromSource(handed=handed))
            await self._writer.send(pb.FromSource(ended=pb.Ended()))
        await self._send_again(held)
        while not self._left:
            await asyncio.wait_for(self._wake.wait(), self._limits.stalled_s)
            self._wake.clear()
            if self._broken is not None:
                raise self._broken
            await self._send_again(held)

    async def _take_rest(self) -> tuple[HeldKv, pb.Handed | None] | None:
        """What is computed, and what is said of a request that has run here until now. None where
        nobody wants it any more, and it runs on."""
        supply = self._supply
        if not isinstance(supply, RunningSupply):
            return (await self._mover.run(supply.rest))[0], None
        await self._mover.run(supply.leave)
        with contextlib.suppress(TimeoutError):  # it has no steps: it leaves all the same
            async with asyncio.timeout(self._limits.beat_s):
                while not (supply.out or self._left):
                    await self._wake.wait()
                    self._wake.clear()
                    if self._broken is not None:
                        raise self._broken
        if self._left and not supply.out:
            return None
        held, outputs = supply.rest() if supply.out else await self._mover.run(supply.rest)
        self._counters.add("handed")
        self._counters.add("last_positions", held.computed - self._sent)
        self._exporter.digests.extend(outputs[len(supply.known) :])
        return held, pb.Handed(outputs=outputs, computed=held.computed)

    @property
    def _sent(self) -> int:
        """Of all layers."""
        return min(self._sent_L)

    async def _send_until(
        self,
        held: HeldKv,
        stop: int,
        layers: int | None = None,
        step: int | None = None,
        ending: Ending = MORE,
    ) -> None:
        """Of the first so many layers, which a step has done that may still run. The first message
        says what ``ending`` has handed, and the last one that it is the last."""
        layouts, size = self._house.layouts, self._house.block_size
        starts = self._sent_L[:layers]
        self._until = max(self._until, stop)
        stretches = plan_stretches(starts, stop, size, self._limits.window)
        making: deque[_Making] = deque()
        frames = list(fill_frames(layouts, stretches, size, self._outlet.frame_bytes))
        if step is None and await self._send_flow(held, frames, ending):
            return
        try:
            handed = ending.handed
            for frame, last in with_last(frames):
                while len(making) >= MOST_MADE or (making and self._outlet.full):
                    await self._finish(making, step)
                while making and self._again:
                    await self._finish(making, step)
                await self._send_again(held)
                if self._left:
                    return
                said = Ending(handed, last and ending.last)
                making.append(await self._begin(held, frame, said, alone=not making))
                handed = None
            while making:
                await self._finish(making, step)
        finally:
            for one in making:
                self._outlet.give(one.room)

    async def _send_flow(
        self, held: HeldKv, frames: Sequence[tuple[Stretch, ...]], ending: Ending
    ) -> bool:
        """All of them, where it can be done so."""
        flow, size = self._flow, self._house.block_size
        if flow is None or ending.handed is not None or not flow.takes(frames, size):
            return False
        await flow.send(held.blocks, frames, last=ending.last)
        for stretch in chain.from_iterable(frames):
            self._count_sent(stretch)
        self._counters.add_to(
            "sent_bytes", self._outlet.name, sum(map(self._exporter.size_of, frames))
        )
        return True

    def _count_sent(self, stretch: Stretch) -> None:
        self._sent_L[stretch.layer] = max(self._sent_L[stretch.layer], stretch.stop)
        self._counters.add("sent_runs", count_runs(stretch, self._house.block_size))

    async def _send_again(self, held: HeldKv) -> None:
        """What was asked for, less what was preempted since and is not computed again."""
        for _ in range(len(self._again)):
            stretch = self._again.popleft()
            if stretch.stop <= held.computed:
                await self._finish(deque([await self._begin(held, (stretch,))]))
            else:
                self._again.append(stretch)

    async def _begin(
        self,
        held: HeldKv,
        frame: tuple[Stretch, ...],
        ending: Ending = MORE,
        *,
        alone: bool = True,
    ) -> _Making:
        """Room for it, which is then filled; ``alone``, if no other frame is filled meanwhile."""
        block = self._house.block_size
        size = self._exporter.size_of(frame)
        empty = [bytes(DIGEST_BYTES * count_runs(s, block)) for s in frame]
        head_size = spans_of(frame, empty, None, ending).ByteSize()
        room = await self._outlet.take(head_size, size)
        if alone and size <= FILLED_AT_ONCE:
            filled = asyncio.get_running_loop().create_future()
            filled.set_result(self._exporter.fill(held.blocks, frame, room.data_X))
        else:
            filled = self._mover.start(self._exporter.fill, held.blocks, frame, room.data_X)
        return _Making(frame, room, filled, ending)

    async def _finish(self, making: deque[_Making], step: int | None = None) -> None:
        """The first of them is sent as soon as it is filled."""
        one = making.popleft()
        try:
            digests = await asyncio.shield(one.filled)
            if step is not None and self._house.layers_done(step) < len(self._sent_L):
                self._counters.add("sent_within", len(one.room.data_X))
            await self._outlet.deliver(one.room)
            message = spans_of(one.frame, digests, one.room.slot, one.ending)
            await self._writer.send(message, one.room.place)
        finally:
            self._outlet.give(one.room)
        for stretch in one.frame:
            self._count_sent(stretch)
        self._counters.add_to("sent_bytes", self._outlet.name, len(one.room.data_X))

    async def _read(self, requests: AsyncIterator[bytes], reader: Reader) -> None:
        """What whoever fetches says behind its first message."""
        try:
            async for frame in requests:
                message = reader.read(frame)[0]
                self._hear(message)
                if message.WhichOneof("what") != "freed":  # the outlet hears that
                    self._wake.set()
            self._left = True
        except MoeserveError as error:
            self._broken = error
        finally:
            self._wake.set()

    def _hear(self, message: pb.ToSource) -> None:
        match message.WhichOneof("what"):
            case "again":
                self._again.append(self._stretch(message.again))
            case "stop":
                if not isinstance(self._supply, RunningSupply):
                    raise InvalidRequestError("only what runs can be stopped")
                self._supply.stop()
            case "freed":
                self._outlet.freed(message.freed.slot)
            case "done":
                self._left = True
            case other:
                raise InvalidRequestError(f"{other} comes first, once")

    def _stretch(self, again: pb.Again) -> Stretch:
        """A run that was sent before."""
        start, stop, layers = again.start, again.start + again.count, len(self._house.layouts)
        sound = again.layer < layers and self._have <= start < stop <= self._until
        if not sound or count_runs(Stretch(0, start, stop), self._house.block_size) != 1:
            raise InvalidRequestError(
                f"positions {start}..{stop - 1} of layer {again.layer} are no run that was sent"
            )
        if len(self._again) >= MOST_MISSING:
            raise InvalidRequestError(f"more than {MOST_MISSING} runs are to be sent again")
        return Stretch(again.layer, start, stop)
