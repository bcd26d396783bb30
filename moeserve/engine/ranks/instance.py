"""The ranks of a run as one engine: what a door submits requests to.

A request waits in the door's ``Front``, which decides by the ranks' published loads; it is sent to
its home rank, and its tokens come back from there. While it waits at a rank it may be asked back,
because another rank has room. All of it happens on the event loop's thread; ``publish`` alone is
called by the engine's thread, once per round.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from moeserve.core import Counters, Event, FinishReason, Request, RequestId
from moeserve.engine.loop import Engine, EngineLoad, EngineObserver
from moeserve.engine.ranks.door_requests import Return
from moeserve.engine.ranks.front import Front
from moeserve.engine.ranks.homes import ExpertUse
from moeserve.engine.ranks.loads import LoadsOfRound, RankLoads
from moeserve.engine.ranks.rank_links import LinkTable
from moeserve.engine.request_state import EventSink, Gaps, Outbox, RequestState
from moeserve.engine.sequence import History
from moeserve.errors import UnavailableError


@dataclass(slots=True)
class _Held:
    """A request of this door, and what it has made so far; its times are the door's."""

    state: RequestState
    output_ids: list[int] = field(default_factory=list)
    reached: int = 0
    moved: bool = False
    ending: FinishReason = FinishReason.ABORT


log = logging.getLogger("moeserve.engine")
CANCELLED = "the request was cancelled"


class Instance:
    """``links[r]`` reaches rank r; ``engine`` is this process's own, ``loads`` those before the
    first step. ``queued`` requests wait in the front; any thread may read it.

    Ids are the door's own: where there are several doors, ranks know a request by its id and
    ``suffix``, so that two doors may use the same.
    """

    def __init__(
        self,
        engine: Engine,
        front: Front,
        links: LinkTable,
        observer: EngineObserver,
        loads: RankLoads,
        *,
        suffix: str = "",
        learn: Callable[[ExpertUse], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._front = front
        self._links = links
        self._observer = observer
        self._learn = learn
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        engine.on_end = self._lose_engine
        self._held: dict[RequestId, _Held] = {}
        self.queued = 0
        self._loads: LoadsOfRound = lambda: loads
        self._seen = self._loads
        self._total_blocks = int(loads.free_blocks_R.sum())
        self._suffix = suffix
        self._awake = False

    @property
    def counters(self) -> Counters:
        """Of this process's rank."""
        return self._engine.counters

    @property
    def alive(self) -> bool:
        return self._engine.alive

    def submit(self, request: Request, sink: EventSink) -> None:
        """Queue a request, or raise why it cannot be served."""
        if not self._engine.alive:
            raise UnavailableError("the server is stopping or stopped: retry elsewhere")
        inner = replace(request, id=self._inner(request.id)) if self._suffix else request
        self._look()
        self._front.add(inner)
        self._held[inner.id] = _Held(RequestState(request, sink, self._clock()))
        self._place()

    def abort(self, request_id: RequestId, reason: FinishReason = FinishReason.ABORT) -> None:
        """End a request; ended ones are left alone."""
        inner = self._inner(request_id)
        held = self._held.get(inner)
        if held is None:
            return
        held.ending = reason
        rank = self._front.abort(inner)
        if rank is None:
            self._end(inner, reason, CANCELLED)
        else:
            self._links[rank].end(inner, reason)

    def load(self) -> EngineLoad:
        """Of all ranks together; blocks that are cached are counted on this rank alone."""
        own, loads = self._engine.load(), self._loads()
        return EngineLoad(
            running=int(loads.running_R.sum()),
            waiting=int(loads.waiting_R.sum()) + self._front.num_waiting,
            total_blocks=self._total_blocks,
            free_blocks=int(loads.free_blocks_R.sum()),
            cached_blocks=own.cached_blocks,
            block_size=own.block_size,
            accepting=own.accepting,
        )

    def stop(self, timeout: float = 30.0) -> bool:
        """This process's rank leaves, when all ranks do; False if that took longer."""
        return self._engine.stop(timeout)

    def publish(self, loads: LoadsOfRound) -> None:
        """On the engine's thread: the newest loads. They are looked at on the loop's, when a
        request comes or is returned, and at once where some wait."""
        self._loads = loads
        # Read after the store: whoever saw True takes it up at the wake-up that is still due. Who
        # begins to wait now asks for another round.
        if not self._awake and self.queued:
            self._awake = True
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits
                self._loop.call_soon_threadsafe(self._take_up)

    def on_events(self, rank: int, events: Sequence[Event]) -> None:
        outbox, now = Outbox(), self._clock()
        gaps = Gaps(now)
        for event in events:
            held = self._held.get(event.request_id)
            if held is None:
                continue
            state = held.state
            if event.token_ids:
                held.output_ids += event.token_ids
                self._front.made(event.request_id, len(event.token_ids))
                if gaps.count(state, event):
                    self._observer.on_first_token(state.timing(now))
            if event.finish is not None:
                del self._held[event.request_id]
                self._front.finished(event.request_id)
                self._observer.on_finish(event.finish, state.timing(now))
            first = state.made == len(event.token_ids)
            if self._suffix or first or event.cached_tokens != state.cached:
                event = event._replace(
                    request_id=state.request.id,
                    cached_tokens=state.cached,
                    queue_s=state.queue_s,
                )
            outbox.add(state.sink, event)
        if seconds := gaps.seconds():
            self._observer.on_gaps(seconds)
        for error, found in outbox.send():
            log.error("a sink of %d events failed", len(found), exc_info=error)
            for event in found:
                self.abort(event.request_id)

    def on_taken(self, rank: int, request_ids: Sequence[RequestId], round_: int) -> None:
        for request_id in request_ids:
            self._front.taken(request_id, round_)

    def on_returned(self, rank: int, returned: Return) -> None:
        held = self._held.get(returned.request_id)
        if held is None:
            return
        held.reached, held.moved = returned.reached, True
        if not self._front.returned(returned.request_id, held.output_ids):
            self._end(returned.request_id, held.ending, CANCELLED)
        self._place()

    def on_uses(self, uses: Sequence[ExpertUse]) -> None:
        if self._learn is not None:
            for use in uses:
                self._learn(use)

    def _lose_engine(self, reason: str) -> None:
        """On the engine's thread, which ends: what waits here will get no home."""
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits
            self._loop.call_soon_threadsafe(self._end_waiting, reason)

    def _end_waiting(self, reason: str) -> None:
        for request_id in [i for i in self._held if self._front.home_of(i) is None]:
            self._front.abort(request_id)
            self._end(request_id, FinishReason.UNAVAILABLE, reason)

    def _inner(self, request_id: RequestId) -> RequestId:
        """What ranks call it."""
        return RequestId(request_id + self._suffix)

    def _take_up(self) -> None:
        self._awake = False
        self._place()

    def _look(self) -> None:
        if self._loads is not self._seen:
            self._seen = self._loads
            self._front.publish(self._seen())

    def _place(self) -> None:
        self._look()
        for request_id in self._front.expire(self._clock()):
            self._end(request_id, FinishReason.DEADLINE, "the deadline passed")
        for placement in self._front.place():
            held = self._held[placement.request.id]
            if held.state.scheduled is None:
                held.state.scheduled = self._clock()
            history = History(tuple(held.output_ids), held.reached, held.moved)
            self._links[placement.rank].submit(placement.request, history)
        self.queued = self._front.num_waiting
        if self.queued:
            self._engine.wake()  # so that there is another round, and newer loads

    def _end(self, request_id: RequestId, reason: FinishReason, error: str) -> None:
        """One that waits here."""
        state = self._held.pop(request_id).state
        self._engine.count_end(reason)
        self._observer.on_finish(reason, state.timing(self._clock()))
        state.sink.deliver([state.end(reason, error)])
