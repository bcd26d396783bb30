"""The members of a cluster as one engine: what the doors of a gateway submit requests to.

For each request a router picks a member that decodes it, and perhaps members from which the KV of
its prompt can be had; it is submitted to the first, which fetches from the others and sends the
tokens. Where no member can have it now it waits, in order of arrival, no longer than its deadline.

A member that breaks its stream, says that it is stopping or full, or has left the cluster is lost
with what it ran: these requests go to other members, with the tokens that came, so that clients get
every position once and the same tokens (law 1). A request that is lost ``MOST_LOSSES`` times
without a token in between and once more ends with UNAVAILABLE, and with what the last member said.
One that a member gives back is routed anew.

All of it happens on the event loop's thread; ``stop`` is for any other.
"""

from __future__ import annotations

import asyncio
import bisect
import heapq
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from moeserve.core import Counters, Event, FinishReason, Request, RequestId
from moeserve.engine.loop import EngineLoad, EngineObserver
from moeserve.engine.ranks.door_requests import Return
from moeserve.engine.ranks.homes import ExpertUse
from moeserve.engine.ranks.rank_links import RankListener
from moeserve.engine.request_state import EventSink, Gaps, Outbox, RequestState
from moeserve.engine.sequence import History, KvSource
from moeserve.errors import ExhaustedError, InvalidRequestError, UnavailableError
from moeserve.pools.cluster_requests import Attempt, RoutedRequest, SetAside
from moeserve.pools.members import Member, Report

log = logging.getLogger(__name__)

# How often it is looked whether a request that waits can go somewhere.
LOOK_S = 0.05
# Beyond the deadline that it is given, what a member gets to end a request.
LATE_S = 2.0
CANCELLED = "the request was cancelled"


class MemberLink(Protocol):
    """One member, such as ``RemoteLink``. The listener is never called from within."""

    def submit(self, request: Request, history: History) -> None: ...

    def end(self, request_id: RequestId, reason: FinishReason) -> None: ...

    async def close(self) -> None:
        """Ends what is there: the listener hears of every request."""
        ...


class MembersSeen(Protocol):
    """Who is in the cluster, as far as this gateway knows (``registry.view``)."""

    def members(self) -> tuple[Report, ...]: ...

    def get(self, member_id: str, /) -> Report | None: ...


class PickedRoute(Protocol):
    """Who decodes a request, who prefills it if that is another, and who could instead."""

    @property
    def decode(self) -> Member: ...

    @property
    def prefill(self) -> Member | None: ...

    @property
    def alternates(self) -> tuple[Member, ...]: ...


class Router(Protocol):
    """Picks a route for ``request``, which has made ``made`` tokens, over members that are not in
    ``exclude``. None where there is none now."""

    def __call__(
        self, request: Request, made: int, exclude: frozenset[str], now: float, /
    ) -> PickedRoute | None: ...


@dataclass(slots=True)
class ClusterCounts:
    """Counted where it happens: requests sent to members, of these with KV from another; losses of
    requests with a member, those that ended for it, and returns; members that were set aside; and
    events of former attempts, which were dropped."""

    sent: int = 0
    sent_with_sources: int = 0
    lost: int = 0
    given_up: int = 0
    returned: int = 0
    late_events: int = 0


class ClusterEngine:
    """A ``ServingEngine``, and the listener of its links.

    ``connect`` makes the link to a member when it is first used; ``name`` tells the requests of
    this gateway from those of others. ``max_queue`` bounds the requests that wait here.
    """

    def __init__(
        self,
        view: MembersSeen,
        route: Router,
        connect: Callable[[Member, RankListener], MemberLink],
        observer: EngineObserver,
        *,
        name: str,
        max_queue: int = 1024,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counts = ClusterCounts()
        self._view = view
        self._route = route
        self._connect = connect
        self._observer = observer
        self._name = name
        self._max_queue = max_queue
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._counters = Counters()
        self._requests: dict[RequestId, RoutedRequest] = {}
        self._sent: dict[RequestId, RoutedRequest] = {}  # by what their member calls them
        self._waiting: list[RoutedRequest] = []  # by arrival
        self._deadlines: list[tuple[float, int, RequestId]] = []
        self._links: dict[str, MemberLink] = {}
        self._aside = SetAside()
        self._closing: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._arrivals = 0
        self._attempts = 0
        self._stopped = False

    @property
    def counters(self) -> Counters:
        """Of this gateway's requests."""
        return self._counters

    @property
    def alive(self) -> bool:
        return not self._stopped

    def submit(self, request: Request, sink: EventSink) -> None:
        """Queue a request, or raise why it cannot be served."""
        if self._stopped:
            raise UnavailableError("the gateway is stopping or stopped: retry elsewhere")
        if request.id in self._requests:
            raise InvalidRequestError(
                f"request id {request.id!r} is in use: choose another", param="request_id"
            )
        if len(self._waiting) >= self._max_queue:
            raise ExhaustedError(
                f"{len(self._waiting)} requests are waiting, as many as may: try again later"
            )
        self._arrivals += 1
        routed = RoutedRequest(RequestState(request, sink, self._clock()), self._arrivals)
        self._requests[request.id] = routed
        self._counters.prompt_tokens += len(request.prompt_ids)
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, routed.arrival, request.id))
        self._wait(routed)
        self._place()

    def abort(self, request_id: RequestId, reason: FinishReason = FinishReason.ABORT) -> None:
        """End a request; ended ones are left alone."""
        routed = self._requests.get(request_id)
        if routed is None:
            return
        routed.ending = reason
        if routed.attempt is None:
            self._end(routed, reason, "" if reason is FinishReason.STOP else CANCELLED)
        else:
            self._links[routed.attempt.member.id].end(routed.attempt.inner, reason)

    def load(self) -> EngineLoad:
        """What runs and waits is of this gateway; blocks are of all members that decode."""
        reports = [r for r in self._view.members() if r.member.role.decodes]
        return EngineLoad(
            running=len(self._sent),
            waiting=len(self._waiting),
            total_blocks=sum(r.load.total_blocks for r in reports),
            free_blocks=sum(r.load.free_blocks for r in reports),
            cached_blocks=0,
            block_size=max((r.member.terms.block_size for r in reports), default=0),
            accepting=not self._stopped,
        )

    def stop(self, timeout: float = 30.0) -> bool:
        """End every request and close every link; False if that took longer."""
        closing = asyncio.run_coroutine_threadsafe(self.close(), self._loop)
        try:
            closing.result(timeout)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """``stop``, on the loop."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
        for routed in list(self._requests.values()):
            self._end(routed, FinishReason.UNAVAILABLE, "the gateway stopped: retry elsewhere")
        for member_id in list(self._links):
            self._close_link(member_id)
        if self._closing:
            await asyncio.wait(self._closing)

    def look(self) -> None:
        """The members may have changed: what was with those that left is lost."""
        gone = [member_id for member_id in self._links if self._view.get(member_id) is None]
        for member_id in gone:
            self._close_link(member_id)
            self._aside.forget(member_id)
        if gone:
            lost = [
                routed
                for routed in self._sent.values()
                if routed.attempt is not None and routed.attempt.member.id in gone
            ]
            for routed in lost:
                assert routed.attempt is not None
                self._lose(routed, f"{called(routed.attempt.member)} has left the cluster")
        self._place()

    def on_events(self, rank: int, events: Sequence[Event]) -> None:
        outbox, now = Outbox(), self._clock()
        gaps = Gaps(now)
        lost: list[tuple[RoutedRequest, Member, str]] = []
        for event in events:
            routed = self._sent.get(event.request_id)
            if routed is None or routed.attempt is None:
                self.counts.late_events += 1
                continue
            self._take(outbox, gaps, routed, event, now)
            if event.finish is FinishReason.UNAVAILABLE:
                lost.append((routed, routed.attempt.member, event.error))
        if seconds := gaps.seconds():
            self._observer.on_gaps(seconds)
        for error, found in outbox.send():
            log.error("a sink of %d events failed", len(found), exc_info=error)
            for event in found:
                self.abort(event.request_id)
        for routed, member, why in lost:
            self._aside.failed(member.id, now)
            self._lose(routed, f"{called(member)}: {why}")
        if self._waiting:
            self._place()

    def on_taken(self, rank: int, request_ids: Sequence[RequestId], round_: int) -> None: ...

    def on_returned(self, rank: int, returned: Return) -> None:
        """A member has no room for a request that another could run."""
        routed = self._sent.pop(returned.request_id, None)
        if routed is None:
            return
        self.counts.returned += 1
        routed.attempt, routed.moved = None, True
        self._wait_again(routed)
        self._place()

    def on_uses(self, uses: Sequence[ExpertUse]) -> None: ...

    def _take(
        self, outbox: Outbox, gaps: Gaps, routed: RoutedRequest, event: Event, now: float
    ) -> None:
        """What a member made, to the client; but not that the member is lost."""
        state, attempt = routed.state, routed.attempt
        assert attempt is not None
        routed.take(event)
        if event.token_ids:
            self._aside.worked(attempt.member.id)
            self._counters.generated_tokens += len(event.token_ids)
            if gaps.count(state, event):
                self._observer.on_first_token(state.timing(now))
        if event.finish is FinishReason.UNAVAILABLE:
            del self._sent[attempt.inner]
            event = event._replace(finish=None, error="")
        elif event.finish is not None:
            del self._sent[attempt.inner]
            self._forget(routed, event.finish, now)
        if event.token_ids or event.prompt_logprobs or event.finish is not None:
            outbox.add(state.sink, self._outer(routed, event))

    def _outer(self, routed: RoutedRequest, event: Event) -> Event:
        """As the client's request has it."""
        state = routed.state
        return event._replace(
            request_id=state.request.id, cached_tokens=state.cached, queue_s=state.queue_s
        )

    def _lose(self, routed: RoutedRequest, why: str) -> None:
        """The member that has it is lost."""
        if routed.attempt is not None:
            self._sent.pop(routed.attempt.inner, None)
        self.counts.lost += 1
        if routed.lose(why):
            log.warning("request %s goes to another member: %s", routed.request.id, why)
            self._wait_again(routed)
            return
        self.counts.given_up += 1
        text = f"{routed.losses} members were lost with this request, the last one: {why}: retry"
        self._end(routed, routed.ending or FinishReason.UNAVAILABLE, text)

    def _wait_again(self, routed: RoutedRequest) -> None:
        if routed.ending is None:
            self._wait(routed)
        else:
            text = "" if routed.ending is FinishReason.STOP else CANCELLED
            self._end(routed, routed.ending, text)

    def _wait(self, routed: RoutedRequest) -> None:
        bisect.insort(self._waiting, routed, key=_arrival)

    def _place(self) -> None:
        """Send what waits, in order, until the next one can go nowhere."""
        now = self._clock()
        self._expire(now)
        while self._waiting:
            routed = self._waiting[0]
            if routed.late(now):
                self._end(routed, FinishReason.DEADLINE, "the deadline passed")
                continue
            made, exclude = len(routed.output_ids), self._aside.members(now)
            picked = self._route(routed.request, made, exclude, now)
            if picked is None:
                break
            del self._waiting[0]
            self._send(routed, picked, now)
        self._arm()

    def _send(self, routed: RoutedRequest, picked: PickedRoute, now: float) -> None:
        member = picked.decode
        self._attempts += 1
        inner = RequestId(f"{routed.request.id} at {self._name} {self._attempts}")
        routed.attempt = Attempt(inner, member)
        if routed.state.scheduled is None:
            routed.state.scheduled = now
        sources: tuple[KvSource, ...] = ()
        if picked.prefill is not None:
            others = (picked.prefill, *picked.alternates)
            sources = tuple(KvSource(m.address, m.server_name) for m in others)
        self.counts.sent += 1
        self.counts.sent_with_sources += bool(sources)
        self._sent[inner] = routed
        if member.id not in self._links:
            self._links[member.id] = self._connect(member, self)
        request = replace(routed.request, id=inner)
        self._links[member.id].submit(request, routed.history(sources))

    def _expire(self, now: float) -> None:
        """End what waits here beyond its deadline; and what is with a member, if that does not do
        so by itself soon after."""
        while self._deadlines and self._deadlines[0][0] <= now:
            due, arrival, request_id = heapq.heappop(self._deadlines)
            routed = self._requests.get(request_id)
            if routed is None or routed.arrival != arrival:
                continue
            if routed.attempt is not None and due == routed.request.deadline:
                heapq.heappush(self._deadlines, (due + LATE_S, arrival, request_id))
                continue
            if routed.attempt is not None:
                self.abort(request_id, FinishReason.DEADLINE)
            self._end(routed, FinishReason.DEADLINE, "the deadline passed")

    def _arm(self) -> None:
        """Look again while something waits, and when a deadline comes."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._stopped or not (self._waiting or self._deadlines):
            return
        wait_s = LOOK_S
        if not self._waiting:
            wait_s = max(LOOK_S, self._deadlines[0][0] - self._clock())
        self._timer = self._loop.call_later(wait_s, self._wake)

    def _wake(self) -> None:
        self._timer = None
        self._place()

    def _end(self, routed: RoutedRequest, reason: FinishReason, error: str) -> None:
        """The last event of one whose member will send none, or none that is waited for."""
        if routed.attempt is not None:
            self._sent.pop(routed.attempt.inner, None)
        elif routed in self._waiting:
            self._waiting.remove(routed)
        self._forget(routed, reason, self._clock())
        routed.state.sink.deliver([routed.state.end(reason, error)])

    def _forget(self, routed: RoutedRequest, reason: FinishReason, now: float) -> None:
        del self._requests[routed.request.id]
        finished = self._counters.finished
        finished[reason] = finished.get(reason, 0) + 1
        self._observer.on_finish(reason, routed.state.timing(now))

    def _close_link(self, member_id: str) -> None:
        task = self._loop.create_task(self._links.pop(member_id).close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


def called(member: Member) -> str:
    """As operators know it."""
    return member.instance if member.ranks == 1 else f"{member.instance} (rank {member.rank})"


def _arrival(routed: RoutedRequest) -> int:
    return routed.arrival
