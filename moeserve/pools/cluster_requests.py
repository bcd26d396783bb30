"""A client's request on its way through the members of a cluster, and the members that just failed.

A request waits at the gateway, or is with a member (``Attempt``); while it moves, another one has
it too. Members know it by an id that no other attempt has, so what a former one sends late is
nobody's. Tokens count by their position: a client gets each once, whoever is first to send it, and
who has the request next goes on behind those that came.

Pure: time is an argument.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from moeserve.core import Event, FinishReason, Request, RequestId
from moeserve.engine.request_state import RequestState
from moeserve.engine.sequence import History, KvSource
from moeserve.pools.members import Member

# How often a request is lost without a token in between before its client is told.
MOST_LOSSES = 3
# How long a member that failed gets nothing: doubled with every failure after it, up to the most.
# So who is gone for good is tried three times at most until its lease has ended.
ASIDE_S, MOST_ASIDE_S = 1.0, 8.0


@dataclass(slots=True)
class Attempt:
    """A member has the request, which it knows as ``inner``; its next token is that of position
    ``at`` of the answer."""

    inner: RequestId
    member: Member
    at: int


@dataclass(slots=True)
class RoutedRequest:
    """``arrival`` orders requests; ``scored`` log-probabilities of the prompt have come. ``losses``
    counts members that were lost with it since its last token, ``ending`` says why its members were
    asked to end it. The first of ``attempts`` has it, a second one takes it over, since
    ``moved_at`` at the soonest.
    """

    state: RequestState
    arrival: int
    output_ids: list[int] = field(default_factory=list)
    scored: int = 0
    attempts: list[Attempt] = field(default_factory=list)
    moved: bool = False
    moved_at: float = -math.inf
    losses: int = 0
    ending: FinishReason | None = None

    @property
    def left(self) -> int:
        """Tokens that may still come."""
        return self.request.params.max_tokens - len(self.output_ids)

    @property
    def request(self) -> Request:
        return self.state.request

    def late(self, now: float) -> bool:
        """Whether its deadline has come."""
        return self.request.deadline is not None and self.request.deadline <= now

    def take(self, attempt: Attempt, event: Event) -> Event:
        """What is new of what a member made."""
        skip = len(self.output_ids) - attempt.at
        assert skip >= 0, f"{attempt.inner}: position {attempt.at} after {len(self.output_ids)}"
        attempt.at += len(event.token_ids)
        if skip:
            event = event._replace(token_ids=event.token_ids[skip:], logprobs=event.logprobs[skip:])
        if event.token_ids:
            self.output_ids += event.token_ids
            self.losses = 0
        self.scored += len(event.prompt_logprobs)
        return event

    def history(self, sources: Sequence[KvSource] = ()) -> History:
        """What the next member is told: of the prompt's tokens those below ``reached`` are scored
        already, and everything computed is computed again, if the KV is not found."""
        made = len(self.output_ids)
        reached = len(self.request.prompt_ids) + made - 1 if made else self.scored
        return History(tuple(self.output_ids), reached, self.moved, tuple(sources))


class SetAside:
    """Members that failed lately, by id."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}
        self._waits: dict[str, float] = {}

    def failed(self, member: str, now: float) -> None:
        """It gets nothing for a while."""
        if self._until.get(member, 0.0) > now:
            return  # the same failure, as another request sees it
        wait = self._waits.get(member, ASIDE_S)
        self._until[member] = now + wait
        self._waits[member] = min(2 * wait, MOST_ASIDE_S)

    def worked(self, member: str) -> None:
        """It has made something."""
        if member in self._waits:
            self.forget(member)

    def forget(self, member: str) -> None:
        """It has left the cluster."""
        self._until.pop(member, None)
        self._waits.pop(member, None)

    def members(self, now: float) -> frozenset[str]:
        """Those that get nothing now."""
        return frozenset(member for member, until in self._until.items() if until > now)


@dataclass(slots=True)
class ClusterCounts:
    """Counted where it happens: requests sent to members, of these with KV from another; requests
    whose member was lost, of these that ended for it; that a member gave back; that moved while
    they ran, of these that did arrive; and events of former attempts, which were dropped."""

    sent: int = 0
    sent_with_sources: int = 0
    lost: int = 0
    given_up: int = 0
    returned: int = 0
    moves: int = 0
    moved: int = 0
    late_events: int = 0
