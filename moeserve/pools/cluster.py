"""The members of a cluster as one engine: what the doors of a gateway submit requests to.

For each request a router picks a member that decodes it, and perhaps members from which the KV of
its prompt can be had; it is submitted to the first, which fetches from the others and sends the
tokens. Where no member can have it now it waits, in order of arrival, no longer than its deadline.

A member that breaks its stream, says that it is stopping or full, or has left the cluster is lost
with what it ran: these requests go to other members, with the tokens that came, so that clients get
every position once and the same tokens (law 1). A request that is lost more than ``MOST_LOSSES``
times without a token in between ends with UNAVAILABLE, and with what the last member said. One that
a member gives back is routed anew. What runs at a member that drains moves to another one while it
runs, if that one gets hold of its KV.

All of it happens on the event loop's thread; ``stop`` is for any other.
"""

from __future__ import annotations

import asyncio
import bisect
import heapq
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from moeserve.core import Counters, Event, FinishReason, Request, RequestId
from moeserve.engine.loop import EngineLoad, EngineObserver
from moeserve.engine.ranks.door_requests import Return
from moeserve.engine.ranks.homes import ExpertUse
from moeserve.engine.request_state import EventSink, Gaps, Outbox, RequestState
from moeserve.engine.sequence import KvSource
from moeserve.errors import ExhaustedError, InvalidRequestError, UnavailableError
from moeserve.pools.cluster_links import MemberLinks, MembersNews, MembersSeen, PickedRoute, Router
from moeserve.pools.cluster_requests import (
    MOST_LOSSES,
    Attempt,
    ClusterCounts,
    RoutedRequest,
    SetAside,
)
from moeserve.pools.members import Member

log = logging.getLogger(__name__)

# How often it is looked whether a request that waits can go somewhere.
LOOK_S = 0.05
# Beyond the deadline that it is given, what a member gets to end a request.
LATE_S = 2.0
# Of what is moved off a crowded member: tokens that may still come at least, and how long one that
# was moved stays.
WORTH_TOKENS, SETTLE_S = 16, 5.0


class ClusterEngine:
    """A ``ServingEngine``, and the listener of its links; ``on_change`` is told of members.

    ``name`` tells the requests of this gateway from those of others. ``max_queue`` bounds the
    requests that wait here. ``on_answer`` is told how many tokens an answer had that ended well.
    """

    def __init__(
        self,
        view: MembersSeen,
        route: Router,
        links: MemberLinks,
        observer: EngineObserver,
        *,
        name: str,
        max_queue: int = 1024,
        clock: Callable[[], float] = time.monotonic,
        on_answer: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        self.counts = ClusterCounts()
        self._view = view
        self._route = route
        self._links = links
        self._observer = observer
        self._name = name
        self._max_queue = max_queue
        self._clock = clock
        self._on_answer = on_answer
        self._loop = asyncio.get_running_loop()
        self._counters = Counters()
        self._requests: dict[RequestId, RoutedRequest] = {}
        self._sent: dict[RequestId, tuple[RoutedRequest, Attempt]] = {}  # by ``Attempt.inner``
        self._waiting: list[RoutedRequest] = []  # by arrival
        self._deadlines: list[tuple[float, int, RequestId]] = []
        self._aside = SetAside()
        self._draining: set[str] = set()
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
        if not routed.attempts:
            self._end(routed, reason, _said(reason))
        for attempt in routed.attempts:
            self._links.to(attempt.member, self).end(attempt.inner, reason)

    def load(self) -> EngineLoad:
        """What runs and waits is of this gateway; blocks are of all members that decode."""
        reports = [r for r in self._view.members() if r.member.role.decodes]
        return EngineLoad(
            running=len(self._requests) - len(self._waiting),
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
        await self._links.close()

    def on_change(self, change: MembersNews) -> None:
        """Of members: what was with those that have left is lost, what is with those that now
        drain moves."""
        gone = set(change.gone)
        if gone:
            self._draining -= gone
            lost = [(r, a) for r, a in self._sent.values() if a.member.id in gone]
            for routed, attempt in lost:
                del self._sent[attempt.inner]
                self._lose(routed, attempt, f"{called(attempt.member)} has left the cluster")
            self._links.drop(gone)
            for member_id in gone:
                self._aside.forget(member_id)
        draining = {r.member.id for r in change.put if r.load.draining}
        if fresh := draining - self._draining:
            self._draining |= fresh
            for routed, attempt in list(self._sent.values()):
                if attempt.member.id in fresh:
                    self.move(routed.request.id)
        self._place()

    def move_from(self, source: str, target: str) -> bool:
        """``move`` one request from a member to another: whether one is moved. It is the shortest,
        for its KV is the soonest there, of those that go on for a while and have not just come."""
        now = self._clock()
        movable = (
            routed
            for routed, attempt in self._sent.values()
            if attempt.member.id == source
            and len(routed.attempts) == 1
            and routed.output_ids
            and routed.left >= WORTH_TOKENS
            and now - routed.moved_at >= SETTLE_S
        )
        routed = min(movable, key=_length, default=None)
        if routed is None:
            return False
        others = frozenset(r.member.id for r in self._view.members()) - {target}
        return self.move(routed.request.id, others)

    def move(self, request_id: RequestId, others: frozenset[str] = frozenset()) -> bool:
        """Let another member, which is none of ``others``, take over a request that runs; whether
        one tries to. Until it has, the first one goes on. Not before its first token: it would be
        as well to begin anew."""
        routed = self._requests.get(request_id)
        if routed is None or len(routed.attempts) != 1 or not routed.output_ids:
            return False
        (attempt,), now = routed.attempts, self._clock()
        exclude = self._aside.members(now) | {attempt.member.id} | others
        if routed.ending is not None:
            return False
        picked = self._route(routed.request, len(routed.output_ids), exclude, now)
        if picked is None:
            return False
        self.counts.moves += 1
        routed.moved_at = now
        member = attempt.member
        source = KvSource(member.address, member.server_name, running=attempt.inner)
        self._send(routed, picked.decode, (source,))
        return True

    def on_events(self, rank: int, events: Sequence[Event]) -> None:
        outbox, now = Outbox(), self._clock()
        gaps = Gaps(now)
        lost: list[tuple[RoutedRequest, Attempt, str]] = []
        for event in events:
            routed, attempt = self._sent.get(event.request_id, (None, None))
            if routed is None or attempt is None:
                self.counts.late_events += 1
                continue
            self._take(outbox, gaps, routed, attempt, event)
            if event.finish is FinishReason.UNAVAILABLE:
                lost.append((routed, attempt, event.error))
        if seconds := gaps.seconds():
            self._observer.on_gaps(seconds)
        for error, found in outbox.send():
            log.error("a sink of %d events failed", len(found), exc_info=error)
            for event in found:
                self.abort(event.request_id)
        for routed, attempt, why in lost:
            self._aside.failed(attempt.member.id, now)
            self._lose(routed, attempt, f"{called(attempt.member)}: {why}")
        if self._waiting:
            self._place()

    def on_taken(self, rank: int, request_ids: Sequence[RequestId], round_: int) -> None: ...

    def on_returned(self, rank: int, returned: Return) -> None:
        """A member has no room for a request that another could run, or another has taken it
        over."""
        routed, attempt = self._sent.pop(returned.request_id, (None, None))
        if routed is None or attempt is None:
            return
        routed.attempts.remove(attempt)
        routed.moved = True
        if routed.attempts:
            self.counts.moved += 1
            return
        self.counts.returned += 1
        self._wait_again(routed)
        self._place()

    def on_uses(self, uses: Sequence[ExpertUse]) -> None: ...

    def _take(
        self, outbox: Outbox, gaps: Gaps, routed: RoutedRequest, attempt: Attempt, event: Event
    ) -> None:
        """What a member made, to the client; but not that the member is lost."""
        state = routed.state
        event = routed.take(attempt, event)
        if event.token_ids:
            self._aside.worked(attempt.member.id)
            self._counters.generated_tokens += len(event.token_ids)
            if gaps.count(state, event):
                self._observer.on_first_token(state.timing(state.last_token))
        if event.finish is FinishReason.UNAVAILABLE:
            del self._sent[attempt.inner]
            event = event._replace(finish=None, error="")
        elif event.finish is not None:
            if event.finish in (FinishReason.STOP, FinishReason.LENGTH):
                self._on_answer(len(routed.output_ids))
            self._forget(routed, event.finish, ended=attempt)
        if event.token_ids or event.prompt_logprobs or event.finish is not None:
            event = event._replace(
                request_id=state.request.id, cached_tokens=state.cached, queue_s=state.queue_s
            )
            outbox.add(state.sink, event)

    def _lose(self, routed: RoutedRequest, attempt: Attempt, why: str) -> None:
        """A member that has it is lost, and says nothing of it any more."""
        routed.attempts.remove(attempt)
        self.counts.lost += 1
        if routed.attempts:  # the other one goes on
            return
        routed.moved = True
        routed.losses += 1
        if routed.losses <= MOST_LOSSES:
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
            self._end(routed, routed.ending, _said(routed.ending))

    def _wait(self, routed: RoutedRequest) -> None:
        bisect.insort(self._waiting, routed, key=_arrival)

    def _place(self) -> None:
        """Send what waits, in order, until the next one can go nowhere."""
        now = self._clock()
        self._expire(now)
        while self._waiting:
            routed = self._waiting[0]
            if routed.late(now):
                self._end(routed, FinishReason.DEADLINE, _said(FinishReason.DEADLINE))
                continue
            made, exclude = len(routed.output_ids), self._aside.members(now)
            picked = self._route(routed.request, made, exclude, now)
            if picked is None:
                break
            del self._waiting[0]
            if routed.state.scheduled is None:
                routed.state.scheduled = now
            self._send(routed, picked.decode, _sources(picked))
        self._arm()

    def _send(self, routed: RoutedRequest, member: Member, sources: tuple[KvSource, ...]) -> None:
        self._attempts += 1
        inner = RequestId(f"{routed.request.id} at {self._name} {self._attempts}")
        attempt = Attempt(inner, member, len(routed.output_ids))
        routed.attempts.append(attempt)
        self._sent[inner] = routed, attempt
        self.counts.sent += 1
        self.counts.sent_with_sources += bool(sources)
        request = replace(routed.request, id=inner)
        self._links.to(member, self).submit(request, routed.history(sources))

    def _expire(self, now: float) -> None:
        """End what waits here beyond its deadline; and what is with a member, if that does not do
        so by itself soon after."""
        while self._deadlines and self._deadlines[0][0] <= now:
            due, arrival, request_id = heapq.heappop(self._deadlines)
            routed = self._requests.get(request_id)
            if routed is None or routed.arrival != arrival:
                continue
            if routed.attempts and due == routed.request.deadline:
                heapq.heappush(self._deadlines, (due + LATE_S, arrival, request_id))
                continue
            self._end(routed, FinishReason.DEADLINE, _said(FinishReason.DEADLINE))

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
        """The last event of one whose members are not waited for."""
        if not routed.attempts and routed in self._waiting:
            self._waiting.remove(routed)
        self._forget(routed, reason)
        routed.state.sink.deliver([routed.state.end(reason, error)])

    def _forget(
        self, routed: RoutedRequest, reason: FinishReason, ended: Attempt | None = None
    ) -> None:
        """It is over; members that have it still, other than the one where it ``ended``, are to
        end it."""
        for attempt in routed.attempts:
            if self._sent.pop(attempt.inner, None) is not None and attempt is not ended:
                self._links.to(attempt.member, self).end(attempt.inner, FinishReason.ABORT)
        del self._requests[routed.request.id]
        finished = self._counters.finished
        finished[reason] = finished.get(reason, 0) + 1
        self._observer.on_finish(reason, routed.state.timing(self._clock()))


def called(member: Member) -> str:
    """As operators know it."""
    return member.instance if member.ranks == 1 else f"{member.instance} (rank {member.rank})"


def _sources(picked: PickedRoute) -> tuple[KvSource, ...]:
    if picked.prefill is None:
        return ()
    return tuple(KvSource(m.address, m.server_name) for m in (picked.prefill, *picked.alternates))


def _said(reason: FinishReason) -> str:
    """What the last event says of a request that ends here."""
    if reason is FinishReason.STOP:
        return ""
    if reason is FinishReason.DEADLINE:
        return "the deadline passed"
    return "the request was cancelled"


def _arrival(routed: RoutedRequest) -> int:
    return routed.arrival


def _length(routed: RoutedRequest) -> int:
    return len(routed.request.prompt_ids) + len(routed.output_ids)
