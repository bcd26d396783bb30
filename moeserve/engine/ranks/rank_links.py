"""The ranks as a door reaches them: its own process's engine by calls, others over gRPC.

On the event loop's thread. A link to another rank has one stream, opened by the first request for
it, which stays as long as it can: keepalive, not a deadline, finds out that the rank is dead or cut
off; or, where the rank sends beats, that it has been silent (``silent_s``), in time in which this
process has listened. Should it break, the requests there end with UNAVAILABLE and with what the
ranks say of it, and the next request opens another. Every request that was submitted gets a last
event, also if this end closes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import grpc

from moeserve.comm.control.rpc import reason
from moeserve.core import Event, FinishReason, Request, RequestId
from moeserve.engine.ranks.door_requests import DoorRequests, RankEngine, Return
from moeserve.engine.ranks.homes import ExpertUse
from moeserve.engine.ranks.messages import parse, read_news, read_use
from moeserve.engine.ranks.outgoing import Outgoing
from moeserve.engine.ranks.rank_server import MOST_NEWS, SERVICE
from moeserve.engine.sequence import History
from moeserve.errors import InvalidRequestError, MoeserveError, UnavailableError
from moeserve.pb import rank_pb2 as pb

log = logging.getLogger(__name__)

# How long a link that broke waits for the ranks to say who is lost.
MOMENT_S, LOOK_S = 1.0, 0.02
# How often a silent rank is looked at until it is lost.
SILENT_LOOKS = 5


class RankListener(Protocol):
    """Who hears of the ranks: the instance. On the event loop's thread."""

    def on_events(self, rank: int, events: Sequence[Event]) -> None: ...

    def on_taken(self, rank: int, request_ids: Sequence[RequestId], round_: int) -> None:
        """Loads show these requests from that round on."""
        ...

    def on_returned(self, rank: int, returned: Return) -> None:
        """The rank gives it back; all tokens it made there have come before."""
        ...

    def on_uses(self, uses: Sequence[ExpertUse]) -> None: ...


class RankLink(Protocol):
    """One rank. On the event loop's thread; the listener is never called from within."""

    def submit(self, request: Request, history: History) -> None: ...

    def end(self, request_id: RequestId, reason: FinishReason) -> None: ...


class LocalLink:
    """The rank of this process. Its listener hears of what it takes in at once."""

    def __init__(
        self,
        rank: int,
        engine: RankEngine,
        next_round: Callable[[], int],
        listener: RankListener,
        take_uses: Callable[[], Sequence[ExpertUse]] = tuple,
    ) -> None:
        self._rank = rank
        self._next_round = next_round
        self._listener = listener
        self._take_uses = take_uses
        self._requests = DoorRequests(engine, self._hand_over)

    def submit(self, request: Request, history: History) -> None:
        if self._requests.submit(request, history):
            self._listener.on_taken(self._rank, [request.id], self._next_round())

    def end(self, request_id: RequestId, reason: FinishReason) -> None:
        self._requests.end(request_id, reason)

    def _hand_over(self) -> None:
        events: list[Event] = []
        for news in self._requests.take(MOST_NEWS):
            if isinstance(news, Event):
                events.append(news)
                continue
            if events:
                self._listener.on_events(self._rank, events)
                events = []
            self._listener.on_returned(self._rank, news)
        if events:
            self._listener.on_events(self._rank, events)
        if uses := self._take_uses():
            self._listener.on_uses(uses)


class RemoteLink:
    """Another process's rank, over ``channel``; ``metadata`` goes with the call. ``alarm`` is what
    ranks know to be lost, if anybody does. ``silent_s`` is for ranks that beat."""

    def __init__(
        self,
        rank: int,
        channel: grpc.aio.Channel,
        metadata: Sequence[tuple[str, str]],
        listener: RankListener,
        alarm: Callable[[], MoeserveError | None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        silent_s: float | None = None,
    ) -> None:
        self._alarm = alarm
        self._silent_s = silent_s
        self._heard = 0  # messages
        self._silent = False
        self._rank = rank
        self._channel = channel
        self._metadata = tuple(metadata)
        self._listener = listener
        self._clock = clock
        self._running: set[RequestId] = set()
        self._outgoing: Outgoing | None = None  # of the stream that is open
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def submit(self, request: Request, history: History) -> None:
        if self._closed:
            self._refuse(request.id, FinishReason.UNAVAILABLE, self._left())
            return
        try:
            self._stream().submit(request, history, self._clock())
        except ValueError as error:
            text = f"the request cannot be sent to rank {self._rank}: {error}"
            self._refuse(request.id, FinishReason.ERROR, text)
        else:
            self._running.add(request.id)

    def end(self, request_id: RequestId, reason: FinishReason) -> None:
        if self._outgoing is not None and request_id in self._running:
            self._outgoing.end(request_id, reason)

    async def close(self) -> None:
        """End the stream, and with it all requests there."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._channel.close()

    async def call(self, method: str, request: bytes, timeout_s: float) -> bytes:
        """One of the unary calls of ``rank.proto``; UnavailableError if it fails."""
        if self._closed:
            raise UnavailableError(self._left())
        asked: Any = self._channel.unary_unary(f"/{SERVICE}/{method}")
        call = asked(request, timeout=timeout_s, metadata=self._metadata)
        try:
            reply: bytes = await call
        except grpc.aio.AioRpcError as error:
            raise UnavailableError(f"rank {self._rank}, {method}: {reason(error)}") from error
        except asyncio.CancelledError as error:
            if not self._closed:
                raise
            raise UnavailableError(self._left()) from error
        return reply

    def _left(self) -> str:
        return f"rank {self._rank} is not reached: this process leaves the run: retry elsewhere"

    def _refuse(self, request_id: RequestId, why: FinishReason, error: str) -> None:
        event = Event(request_id, finish=why, error=error)
        loop = asyncio.get_running_loop()
        loop.call_soon(self._listener.on_events, self._rank, [event])

    def _stream(self) -> Outgoing:
        if self._outgoing is None:
            self._outgoing = Outgoing()
            task = asyncio.get_running_loop().create_task(self._attach(self._outgoing))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return self._outgoing

    async def _attach(self, outgoing: Outgoing) -> None:
        lost: set[RequestId] = set()
        text = self._left()
        try:
            try:
                why = await self._exchange(outgoing)
            finally:
                lost, self._running, self._outgoing = self._running, set(), None
            if lost:
                text = await self._reason(why)
        finally:
            if lost:
                log.warning("%d requests are lost: %s", len(lost), text)
                events = [Event(i, finish=FinishReason.UNAVAILABLE, error=text) for i in lost]
                self._listener.on_events(self._rank, events)

    async def _exchange(self, outgoing: Outgoing) -> str:
        """Send and read until the stream ends; why it did."""
        attached: Any = self._channel.stream_stream(f"/{SERVICE}/Attach")
        call = attached(outgoing.messages(), metadata=self._metadata)
        self._silent = False
        watching = asyncio.create_task(self._watch(call))
        try:
            async for reply in call:
                self._heard += 1
                self._read(parse(pb.FromRank, reply))
        except grpc.aio.AioRpcError as error:
            return reason(error)
        except asyncio.CancelledError:
            if not self._silent:
                raise
            return f"it has said nothing for {self._silent_s:g} s"
        except InvalidRequestError as error:
            return f"it sent {error.message}"
        except Exception:  # a bug of ours ends this rank's requests, and no other's
            log.exception("what rank %d sent cannot be passed on", self._rank)
            return "internal error: the server's log has the cause"
        finally:
            watching.cancel()
            call.cancel()
        return "it ended the stream"

    async def _watch(self, call: Any) -> None:
        """Ends a call that brings nothing while requests are there. Looks several times in
        ``silent_s``: a process that was busy or stopped itself has listened no longer than one of
        these."""
        if self._silent_s is None:
            return
        silent = 0
        while silent < SILENT_LOOKS:
            heard = self._heard
            await asyncio.sleep(self._silent_s / SILENT_LOOKS)
            silent = silent + 1 if self._running and heard == self._heard else 0
        self._silent = True
        call.cancel()

    async def _reason(self, why: str) -> str:
        """What ended the stream; what the ranks say of it, if they do within a moment."""
        looks = 0 if self._alarm is None else int(MOMENT_S / LOOK_S)
        for _ in range(looks):
            if self._alarm is not None and (alarm := self._alarm()) is not None:
                return alarm.message
            await asyncio.sleep(LOOK_S)
        return f"rank {self._rank} is not reached any more ({why}): retry"

    def _read(self, reply: pb.FromRank) -> None:
        """Of requests that are not there any more, or never were, nothing is passed on."""
        listener, rank, running = self._listener, self._rank, self._running
        if taken := [RequestId(i) for i in reply.taken if i in running]:
            listener.on_taken(rank, taken, reply.round)
        if events := list(self._events(reply.news)):
            listener.on_events(rank, events)
        for returned in reply.returned:
            request_id = RequestId(returned.id)
            if request_id in running:
                running.remove(request_id)
                listener.on_returned(rank, Return(request_id, returned.reached))
        if reply.uses:
            listener.on_uses([read_use(use) for use in reply.uses])

    def _events(self, all_news: Iterable[pb.News]) -> Iterable[Event]:
        for news in all_news:
            if news.id in self._running:
                event = read_news(news)
                if event.finish is not None:
                    self._running.remove(event.request_id)
                yield event


class LinkTable:
    """The links of this process, each made when it is first asked for. ``connect(r, listener)``
    makes one to another rank. On the event loop's thread."""

    def __init__(self, own: int, connect: Callable[[int, RankListener], RemoteLink]) -> None:
        self._own = own
        self._connect = connect
        self._listener: RankListener = Unheard()
        self._local: LocalLink | None = None
        self._remote: dict[int, RemoteLink] = {}
        self._closed = False

    def begin(
        self,
        engine: RankEngine,
        next_round: Callable[[], int],
        listener: RankListener,
        take_uses: Callable[[], Sequence[ExpertUse]] = tuple,
    ) -> None:
        """A door is there, which hears of its requests. Before any link is asked for."""
        assert not self._remote, "links were made that tell nobody"
        self._listener = listener
        self._local = LocalLink(self._own, engine, next_round, listener, take_uses)

    def __getitem__(self, rank: int) -> RankLink:
        if rank == self._own:
            assert self._local is not None, "no door has begun"
            return self._local
        return self.remote(rank)

    def remote(self, rank: int) -> RemoteLink:
        if rank not in self._remote:
            if self._closed:
                raise UnavailableError(f"rank {rank}: this process leaves the run: retry elsewhere")
            self._remote[rank] = self._connect(rank, self._listener)
        return self._remote[rank]

    async def close(self) -> None:
        """Close all links; none is made afterwards."""
        self._closed = True
        await asyncio.gather(*(link.close() for link in self._remote.values()))


class Unheard:
    """The listener of a process without a door, which has no requests at other ranks."""

    def on_events(self, rank: int, events: Sequence[Event]) -> None: ...

    def on_taken(self, rank: int, request_ids: Sequence[RequestId], round_: int) -> None: ...

    def on_returned(self, rank: int, returned: Return) -> None: ...

    def on_uses(self, uses: Sequence[ExpertUse]) -> None: ...
