"""This rank as those see it who fetch KV from it (``kv.proto``).

What a caller says is not believed: it is refused with a status that says why, and holds nothing
here afterwards. A call ends in time whatever the other side does (``limits``): with UNAVAILABLE
where another member may do better, INVALID_ARGUMENT where none would, or the two can exchange no
KV, DATA_LOSS where a message did not arrive whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from moeserve.core import Request, RequestId
from moeserve.engine.ranks.messages import read_submission
from moeserve.engine.sequence import History
from moeserve.errors import (
    DataLossError,
    ExhaustedError,
    InvalidRequestError,
    MoeserveError,
    UnavailableError,
)
from moeserve.pb import kv_pb2 as pb
from moeserve.pools.kv.counters import KvCounters
from moeserve.pools.kv.digests import RunDigests, geometry_of
from moeserve.pools.kv.exporter import KvExporter
from moeserve.pools.kv.flow import flow_bytes
from moeserve.pools.kv.house import KvHouse
from moeserve.pools.kv.limits import FetchLimits
from moeserve.pools.kv.memory import OpenedMemories
from moeserve.pools.kv.messages import Reader
from moeserve.pools.kv.mooncake import Mooncake
from moeserve.pools.kv.mover import Mover
from moeserve.pools.kv.outlet import MessageOutlet, Outlet
from moeserve.pools.kv.runs import ALIGNMENT
from moeserve.pools.kv.source_call import SourceCall
from moeserve.pools.kv.source_messages import Context, FrameWriter
from moeserve.pools.kv.supply import KvSupply, PrefillSupply, RunningSupply
from moeserve.pools.members import ServedTerms

SERVICE = "moeserve.kv.KvService"


class KvServer:
    """Answers calls of ``kv.proto`` on the event loop that runs when it is made. ``terms`` are
    those of the model that ``house`` has the KV of. Close it when its server has stopped, and
    before ``mooncake``."""

    def __init__(
        self,
        house: KvHouse,
        terms: ServedTerms,
        counters: KvCounters,
        limits: FetchLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
        mooncake: Mooncake | None = None,
    ) -> None:
        self._mooncake = mooncake
        self._house = house
        self._terms = terms
        self._counters = counters
        self._limits = limits or FetchLimits()
        self._clock = clock
        self._geometry = geometry_of(house.layouts)
        self._frames = asyncio.Semaphore(self._limits.frames)
        self._loop = asyncio.get_running_loop()
        self._mover = Mover("kv-source")
        self._memories = OpenedMemories()

    def handlers(self) -> grpc.GenericRpcHandler:
        methods: dict[str, Any] = {"Fetch": grpc.stream_stream_rpc_method_handler(self._fetch)}
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    def close(self) -> None:
        """What calls held is given back when this returns."""
        self._mover.close()
        self._memories.close()

    async def _fetch(self, requests: AsyncIterator[bytes], context: Context) -> None:
        # It is over before the caller is told so, who perhaps takes nothing any more.
        try:
            self._counters.add("serving")
            try:
                await self._serve(requests, context)
            finally:
                self._counters.add("serving", -1)
        except DataLossError as error:
            self._counters.add("bad_frames")
            await context.abort(grpc.StatusCode.DATA_LOSS, error.message)
        except MoeserveError as error:
            await context.abort(grpc.StatusCode[error.code], error.message)

    async def _serve(self, requests: AsyncIterator[bytes], context: Context) -> None:
        limits = self._limits
        if self._counters.serving > limits.calls:
            raise ExhaustedError(f"{limits.calls} members fetch KV here, as many as may")
        reader = Reader()
        try:
            frame = await asyncio.wait_for(anext(requests, None), limits.first_s)
        except TimeoutError as error:
            raise UnavailableError("nothing was asked for") from error
        if frame is None:
            raise InvalidRequestError("nothing was asked for")
        wanted = reader.read(frame)[0].wanted
        call = self._open(wanted, context)
        until = asyncio.timeout(limits.whole_s)
        try:
            async with until:
                stop = self._house.on_step(lambda: self._tell(call))
                try:
                    await call.run(requests, reader)
                finally:
                    stop()
        except TimeoutError as error:
            raise UnavailableError(f"it took more than {limits.whole_s:.0f} s") from error

    def _tell(self, call: SourceCall) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits
            self._loop.call_soon_threadsafe(call.tell)

    def _open(self, wanted: pb.Wanted, context: Context) -> SourceCall:
        """Refuses what cannot be had here."""
        self._require_same(wanted)
        now = self._clock()
        request, history = read_submission(wanted.submission, now, self._terms.vocab)
        known = len(request.prompt_ids) + len(history.output_ids)
        if not wanted.have < known:
            raise InvalidRequestError(f"{wanted.have} of {known} tokens are there: none is left")
        tokens = request.prompt_ids + history.output_ids
        digests = RunDigests(self._terms.compute_id, self._house.layouts, request.scope, tokens)
        made: list[SourceCall] = []  # the supply tells the call, which has the supply
        supply = self._supply(wanted.running, request, history, lambda: self._tell(made[0]))
        call = SourceCall(
            self._house,
            supply,
            KvExporter(self._house, digests),
            self._outlet(wanted),
            FrameWriter(context, self._limits.stalled_s),
            self._mover,
            self._counters,
            self._limits,
            wanted.have,
        )
        made.append(call)
        return call

    def _supply(
        self, running: str, request: Request, history: History, tell: Callable[[], None]
    ) -> KvSupply:
        if running:
            return RunningSupply(self._house, RequestId(running), history.output_ids, tell)
        return PrefillSupply(self._house, request, history, tell)

    def _outlet(self, wanted: pb.Wanted) -> Outlet:
        limits = self._limits
        largest = max(layout.nbytes for layout in self._house.layouts) + ALIGNMENT
        if wanted.HasField("memory"):
            shared = self._memories.open(wanted.memory, largest, limits.stalled_s)
            if shared is not None:
                shared.frame_bytes = flow_bytes(self._house.layouts, shared.slot_bytes)
                return shared
        if wanted.HasField("registered") and self._mooncake is not None:
            written = self._mooncake.outlet(wanted.registered, largest, limits.stalled_s)
            if written is not None:
                return written
        return MessageOutlet(self._frames, max(limits.frame_bytes, largest), limits.stalled_s)

    def _require_same(self, wanted: pb.Wanted) -> None:
        own = self._terms.compute_id
        if not own or wanted.compute_id != own or wanted.geometry != self._geometry:
            raise InvalidRequestError(
                f"KV of {wanted.compute_id[:80]!r} is wanted, and there is {own!r} here: members "
                "of one checkpoint and of equal settings that change numbers exchange KV"
            )
