"""Requests that come to a rank with the names of members that have their KV.

``Arrivals`` stands between the rank's server and its engine, as a ``RankEngine``. A request without
sources goes on at once. For one with sources blocks are borrowed, the KV is fetched into them, and
the engine gets the request with what has come: all of it, or a part, or nothing, where sources were
late or wrong. What is missing is computed here. So a source that fails costs time, never a token.

Whoever asks for a request gets all events in order: those that a source's engine made, and those of
the engine here. The tokens of a request that ran at another member and was handed over are told
again without log-probabilities, for they were told there; one that wants log-probabilities makes
them anew.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from moeserve.core import FinishReason, Request, RequestId
from moeserve.engine.bounds import refuse_duplicate
from moeserve.engine.request_state import RankSink
from moeserve.engine.sequence import NEW, History
from moeserve.errors import ExhaustedError, UnavailableError
from moeserve.observe.spans import RequestSpans
from moeserve.pools.kv.arrival import Arrival, ArrivalRoom
from moeserve.pools.kv.channels import ChannelPool
from moeserve.pools.kv.counters import KvCounters
from moeserve.pools.kv.fetch import Fetcher
from moeserve.pools.kv.house import KvHouse
from moeserve.pools.kv.limits import FetchLimits
from moeserve.pools.kv.mooncake import Mooncake
from moeserve.pools.kv.mover import Mover
from moeserve.pools.members import ServedTerms


class Arrivals:
    """A ``RankEngine``, on the thread of the event loop that runs when it is made. ``terms`` are
    those of the model here; ``channels`` lead to other members. Close it before the engine."""

    def __init__(
        self,
        house: KvHouse,
        terms: ServedTerms,
        channels: ChannelPool,
        counters: KvCounters,
        limits: FetchLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
        spans: RequestSpans | None = None,
        mooncake: Mooncake | None = None,
    ) -> None:
        self._limits = limits or FetchLimits()
        self._house = house
        self._counters = counters
        self._mover = Mover("kv-arrivals")
        self._fetcher = fetcher = Fetcher(
            house, terms.compute_id, channels, self._mover, counters, self._limits, clock, mooncake
        )
        self._room = ArrivalRoom(
            house, terms, fetcher, self._mover, counters, self._limits, clock, spans
        )
        self._arriving: dict[RequestId, tuple[Arrival, asyncio.Task[None]]] = {}
        self._closed = False

    @property
    def arriving(self) -> int:
        """Requests that the engine does not have yet."""
        return len(self._arriving)

    def submit(self, request: Request, sink: RankSink, history: History = NEW) -> None:
        """As an engine's; with sources, what the engine says of it comes as an event."""
        refuse_duplicate(request, request.id in self._arriving)
        if not history.sources:
            self._house.submit(request, sink, history)
            return
        if self._closed:
            raise UnavailableError("the server is stopping or stopped: retry elsewhere")
        if len(self._arriving) >= self._limits.arriving:
            raise ExhaustedError(
                f"{len(self._arriving)} requests wait for their KV, as many as may: try later"
            )
        arrival = Arrival(self._room, request, sink, history)
        task = asyncio.get_running_loop().create_task(self._run(arrival))
        self._arriving[request.id] = (arrival, task)

    def abort(self, request_id: RequestId, reason: FinishReason = FinishReason.ABORT) -> None:
        found = self._arriving.get(request_id)
        # The engine may have it, although it is still told there that all has come.
        if found is None or not self._end(*found, reason):
            self._house.abort(request_id, reason)

    async def close(self) -> None:
        """Ends what the engine does not have yet; all that was borrowed for it is given back when
        this returns."""
        self._closed = True
        pending = list(self._arriving.values())
        for arrival, task in pending:
            self._end(arrival, task, FinishReason.UNAVAILABLE)
        if pending:
            await asyncio.wait([task for _, task in pending])
        await asyncio.to_thread(self._mover.close)
        self._fetcher.close()

    def _end(self, arrival: Arrival, task: asyncio.Task[None], reason: FinishReason) -> bool:
        """Whether it had not ended."""
        ends = arrival.end_with(reason)
        # Behind its first step: what is cancelled before that is never run, and tells nobody.
        asyncio.get_running_loop().call_soon(task.cancel)
        return ends

    async def _run(self, arrival: Arrival) -> None:
        try:
            await arrival.run()
        finally:
            del self._arriving[arrival.request.id]
