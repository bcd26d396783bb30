"""Which rank runs which request, decided at a door from the loads that ranks publish.

A request waits here, without a home, until the newest table (``loads.RankLoads``) shows a rank with
room for it, less what this door has sent and the table does not show yet. Of those ranks a
``HomePolicy`` picks. Requests leave by priority, then in order of arrival, and none overtakes
another: where the first fits nowhere, all wait. ``ahead`` requests more than can run may be sent to
a rank whose slots are the only thing missing: a slot that falls free is then taken in the very next
step, not when a table has shown it. Should another rank be free sooner, ranks give back who waits
there (``loads.surplus``), and so they do with preempted requests; those stand before all others of
their priority.

Several doors have a front each and do not talk. All see one table, so they divide what it shows:
where more requests wait at doors than there are slots, each door has a share of the slots by what
waits at it; where fewer do, each still prefers other ranks than the rest.

::

    add -> place -> (sent to its home) -> taken -> finished
            ^-------- returned <-------------'

Pure: no clock, no messages. Letters at the end of names are shapes: R ranks. Of one thread.
"""

from __future__ import annotations

import bisect
import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from moeserve.core import Request, RequestId
from moeserve.engine.blocks import BlockKey
from moeserve.engine.bounds import SchedulerConfig, refuse_duplicate, refuse_when_full
from moeserve.engine.policies.fairness import OUTPUT_WEIGHT, PROMPT_WEIGHT, ServiceCounters
from moeserve.engine.ranks.homes import Candidates, HomePolicy, LeastWork
from moeserve.engine.ranks.loads import RankLoads
from moeserve.engine.ranks.prefixes import PrefixIndex
from moeserve.engine.ranks.rank_view import Doors, RankView
from moeserve.engine.sequence import SequenceState
from moeserve.engine.waiting import WaitingQueue


@dataclass(frozen=True, slots=True)
class Placement:
    """A request to be sent to its home now, with the tokens it has made elsewhere."""

    request: Request
    output_ids: tuple[int, ...]
    rank: int


@dataclass(slots=True)
class _Entry:
    """A request of this door. ``rank`` is None while it waits here; ``ending`` if its home is asked
    to end it."""

    seq: SequenceState
    rank: int | None = None
    ending: bool = False


class Front:
    """The requests of one door, from ``add`` until ``finished``.

    ``check`` refuses what no rank could ever run (``Scheduler.check`` of any of them).
    ``prefix_keys`` bounds what is remembered of prompts that were sent (``prefixes``); 0 for none.
    With ``service`` the next request of a priority is of the tenant that this door has served
    least (``policies.fairness``).
    """

    def __init__(
        self,
        config: SchedulerConfig,
        block_size: int,
        loads: RankLoads,
        check: Callable[[Request], None],
        *,
        homes: HomePolicy | None = None,
        doors: Doors | None = None,
        ahead: int = 1,
        prefix_keys: int = 0,
        service: ServiceCounters | None = None,
    ) -> None:
        self.config = config
        self._block_size = block_size
        self._check = check
        self._homes = homes or LeastWork()
        self._doors = doors or Doors()
        self._view = RankView(config, loads, self._doors, ahead=ahead)
        ranks = len(loads.running_R)
        self._prefixes = PrefixIndex(ranks, prefix_keys) if prefix_keys else None
        self._nothing_R = np.zeros(ranks, np.int64)
        self._requests: dict[RequestId, _Entry] = {}
        self._service = service
        self._tenants: Counter[str] = Counter()  # of the requests
        self._again: list[SequenceState] = []  # given back, by priority and arrival
        self._fresh = WaitingQueue()
        self._deadlines: list[tuple[float, int, RequestId]] = []
        self._arrivals = 0
        self._elsewhere = 0  # requests that wait at ranks and at other doors

    @property
    def num_waiting(self) -> int:
        """Requests without a home: this rank's ``queued``."""
        return len(self._again) + len(self._fresh)

    def home_of(self, request_id: RequestId) -> int | None:
        """Where a request was sent; None where it waits here, or is not of this door."""
        entry = self._requests.get(request_id)
        return None if entry is None else entry.rank

    def add(self, request: Request) -> None:
        """Queue a request, or refuse it. ``max_queue`` bounds all that wait, by the last table."""
        self._check(request)
        refuse_duplicate(request, request.id in self._requests)
        refuse_when_full(self.num_waiting + self._elsewhere, self.config)
        self._arrivals += 1
        seq = SequenceState(request, arrival=self._arrivals)
        self._requests[request.id] = _Entry(seq)
        self._tenants[request.tenant] += 1
        self._tell_tenants(changed=self._tenants[request.tenant] == 1)
        self._fresh.put(seq)
        self._watch_deadline(seq)

    def publish(self, loads: RankLoads) -> None:
        """The newest table."""
        queued = int(loads.queued_R.sum() - loads.queued_R[self._doors.own])
        self._elsewhere = int(loads.waiting_R.sum()) + queued
        self._view.publish(loads)

    def place(self) -> list[Placement]:
        """Give homes, in order, until the next request fits nowhere."""
        placed = []
        while (seq := self._next()) is not None:
            rank = self._choose(seq)
            if rank is None:
                break
            self._unqueue(seq)
            self._requests[seq.request.id].rank = rank
            if self._service is not None and not seq.output_ids:
                self._service.charge(seq.request.tenant, PROMPT_WEIGHT * len(seq))
            placed.append(Placement(seq.request, tuple(seq.output_ids), rank))
        return placed

    def made(self, request_id: RequestId, tokens: int) -> None:
        """Its home has made so many more."""
        if self._service is not None and len(self._tenants) > 1:
            tenant = self._requests[request_id].seq.request.tenant
            self._service.charge(tenant, OUTPUT_WEIGHT * tokens)

    def taken(self, request_id: RequestId, step: int) -> None:
        """Its home has it: tables of this step and later ones count it."""
        self._view.taken(request_id, step)

    def returned(self, request_id: RequestId, output_ids: Sequence[int]) -> bool:
        """Its home gives it back, with all the tokens it has made; it waits here again.

        False where it was to end: it has ended now.
        """
        entry = self._requests[request_id]
        assert entry.rank is not None, f"request {request_id} is returned but waits here"
        self._view.forget(request_id)
        if entry.ending:
            self._drop(request_id)
            return False
        entry.rank = None
        entry.seq.output_ids[:] = output_ids
        bisect.insort(self._again, entry.seq, key=_place)
        self._watch_deadline(entry.seq)
        return True

    def finished(self, request_id: RequestId) -> None:
        """It ended at its home, or could not be sent there."""
        entry = self._drop(request_id)
        assert entry.rank is not None, f"request {request_id} finished but waits here"
        self._view.forget(request_id, only_untaken=True)

    def abort(self, request_id: RequestId) -> int | None:
        """End a request. None where that is done, for it waited here or is none of this door's;
        else its home, which is to end it: ``finished`` follows, or ``returned`` if that was under
        way."""
        entry = self._requests.get(request_id)
        if entry is None:
            return None
        if entry.rank is not None:
            entry.ending = True
            return entry.rank
        self._unqueue(entry.seq)
        self._drop(request_id)
        return None

    def expire(self, now: float) -> list[RequestId]:
        """End those that wait here beyond their deadline."""
        late = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, arrival, request_id = heapq.heappop(self._deadlines)
            entry = self._requests.get(request_id)
            if entry is not None and entry.rank is None and entry.seq.arrival == arrival:
                self.abort(request_id)
                late.append(request_id)
        return late

    def _choose(self, seq: SequenceState) -> int | None:
        """A home for a request, which then counts there; None where it fits nowhere."""
        blocks = -(-len(seq) // self._block_size)
        ranks = self._view.ranks_with_room(blocks)
        if not len(ranks):
            return None
        keys, cached_R = self._cached(seq)
        candidates = Candidates(
            ranks, self._view.running_R[ranks], self._view.tokens_of(ranks), cached_R[ranks]
        )
        rank = self._homes.pick(seq.request, candidates)
        if self._prefixes is not None:
            self._prefixes.record(keys, rank)
        uncomputed = len(seq) - int(cached_R[rank])
        self._view.send(seq.request.id, rank, tokens=len(seq), uncomputed=uncomputed, blocks=blocks)
        return rank

    def _cached(self, seq: SequenceState) -> tuple[list[BlockKey], NDArray[np.int64]]:
        """The keys of a request's full blocks, and by rank how many of its tokens are probably
        there."""
        if self._prefixes is None:
            return [], self._nothing_R
        usable = (len(seq) - 1) // self._block_size  # one token must be left to compute
        keys = seq.full_keys(self._block_size)
        if seq.request.params.prompt_logprobs is not None:  # every token is computed
            return keys, self._nothing_R
        return keys, self._prefixes.cached_blocks(keys[:usable]) * self._block_size

    def _next(self) -> SequenceState | None:
        heads = [*self._again[:1], *islice(self._fresh.values(), 1)]
        service = self._service
        if service is None or len(self._tenants) < 2 or not self._fresh:
            return min(heads, key=lambda seq: seq.request.priority, default=None)
        heads[-1] = min(
            self._fresh.heads(),
            key=lambda seq: (
                seq.request.priority,
                service.service.get(seq.request.tenant, 0),
                seq.arrival,
            ),
        )
        return min(heads, key=lambda seq: seq.request.priority)

    def _drop(self, request_id: RequestId) -> _Entry:
        """It is this door's no longer."""
        entry = self._requests.pop(request_id)
        tenant = entry.seq.request.tenant
        self._tenants[tenant] -= 1
        if not self._tenants[tenant]:
            del self._tenants[tenant]
            self._tell_tenants(changed=True)
        return entry

    def _tell_tenants(self, *, changed: bool) -> None:
        if changed and self._service is not None:
            self._service.come(frozenset(self._tenants))

    def _unqueue(self, seq: SequenceState) -> None:
        if self._fresh.take(seq.request.id) is None:
            self._again.remove(seq)

    def _watch_deadline(self, seq: SequenceState) -> None:
        if seq.request.deadline is not None:
            heapq.heappush(self._deadlines, (seq.request.deadline, seq.arrival, seq.request.id))


def _place(seq: SequenceState) -> tuple[int, int]:
    return seq.request.priority, seq.arrival
