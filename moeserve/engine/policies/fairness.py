"""Who is next of several tenants: the one that has been served least (VTC).

The virtual token counter of "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024):
a tenant's counter grows by the tokens of the prompts that start for it, and by twice the tokens of
its answers, as they are made; of the tenants whose requests wait, the one with the lowest is next.
A tenant that comes back after none of its requests waited or ran has its counter lifted to the
least of those that were there: nobody saves up service. So two tenants that both have requests
waiting are served alike, however many the requests of one are, to within what runs at once.

Priorities come first: tenants are compared among those of the lowest. Whoever has a higher one does
not starve: where nobody of a priority has started for ``TURN_S``, one of it is next.

Which of a tenant's requests is next, and whether there is room for it, others say: the queue, and
the admission inside. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from moeserve.core import RequestId
from moeserve.engine.blocks import BlockPool
from moeserve.engine.policies.choices import Admission
from moeserve.engine.sequence import SequenceState
from moeserve.engine.step_builder import StepBuilder
from moeserve.engine.waiting import WaitingQueue

PROMPT_WEIGHT, OUTPUT_WEIGHT = 1, 2
# A priority that nobody started of for so long has a turn.
TURN_S = 10.0
# Counters of tenants that are not there are kept up to this many.
MOST_TENANTS = 1024


class ServiceCounters:
    """By tenant; those that are there are told of."""

    def __init__(self) -> None:
        self.service: dict[str, int] = {}
        self.present: frozenset[str] = frozenset()
        self._least = 0  # of those that were there last

    def charge(self, tenant: str, service: int) -> None:
        self.service[tenant] = self.service.get(tenant, self._least) + service

    def come(self, present: frozenset[str]) -> None:
        """All that are there now: who was not, is lifted."""
        if present == self.present:
            return
        stayed = [self.service.get(tenant, self._least) for tenant in present & self.present]
        least = min(stayed, default=self._least)
        for tenant in present - self.present:
            self.service[tenant] = max(self.service.get(tenant, 0), least)
        self.present, self._least = present, max(self._least, least)
        if len(self.service) > MOST_TENANTS + len(present):
            away = sorted(self.service.keys() - present, key=self.service.__getitem__)
            for tenant in away[: len(self.service) - MOST_TENANTS]:
                del self.service[tenant]


@dataclass(slots=True)
class _Served:
    """A request that has started, and how much of its answer is charged."""

    seq: SequenceState
    made: int


class FairTenants:
    """An ``Admission`` around another one. One tenant alone, of one priority, costs nothing and
    changes nothing."""

    def __init__(self, inner: Admission) -> None:
        self.counters = ServiceCounters()
        self._inner = inner
        self._running: Collection[SequenceState] = ()
        self._served: dict[RequestId, _Served] = {}
        self._turns: dict[int, float] = {}  # by priority that waits, when one of it started last
        self._picked: SequenceState | None = None

    @property
    def spare(self) -> int:
        return self._inner.spare

    def begin(
        self,
        builder: StepBuilder,
        running: Collection[SequenceState],
        waiting: Mapping[RequestId, SequenceState],
        pool: BlockPool,
    ) -> None:
        self._running = running
        self._inner.begin(builder, running, waiting, pool)

    def pick(self, waiting: WaitingQueue, now: float) -> SequenceState | None:
        """The next one of the tenant that is next, where the inner admission would start it."""
        heads = waiting.heads()
        if len(heads) < 2 and len(self.counters.present) < 2:
            self._turns.clear()
            return self._inner.pick(waiting, now)
        self._charge(waiting)
        running = {seq.request.tenant for seq in self._running}
        self.counters.come(frozenset(running.union(seq.request.tenant for seq in heads)))
        if self._picked is not None and self._picked.request.id not in waiting:
            self._turns[self._picked.request.priority] = now
        self._picked = None
        if not heads:
            return self._inner.pick(waiting, now)
        one, self._picked = WaitingQueue(), self._next(heads, now)
        one.put(self._picked)
        return self._inner.pick(one, now)

    def victim(self, running: Collection[SequenceState]) -> SequenceState:
        return self._inner.victim(running)

    def _next(self, heads: Sequence[SequenceState], now: float) -> SequenceState:
        """Of the first ones of each tenant and priority."""
        there = {seq.request.priority for seq in heads}
        before = self._turns if len(there) > 1 else {}  # who is alone waits for nobody
        self._turns = {p: before.get(p, now) for p in there}
        waits = min(self._turns, key=self._turns.__getitem__)
        overdue = now - self._turns[waits] >= TURN_S
        chosen = waits if overdue else min(self._turns)
        service = self.counters.service
        return min(
            (seq for seq in heads if seq.request.priority == chosen),
            key=lambda seq: (service.get(seq.request.tenant, 0), seq.request.arrival),
        )

    def _charge(self, waiting: Mapping[RequestId, SequenceState]) -> None:
        """What was computed and made since the last call, for those that run or did so then."""
        before, served = self._served, {}
        for seq in self._running:
            found = before.pop(seq.request.id, None)
            if found is None or found.seq is not seq:
                found = self._start(seq)
            self._charge_answer(found)
            served[seq.request.id] = found
        for request_id, found in before.items():  # these have left, or wait again
            self._charge_answer(found)
            if waiting.get(request_id) is found.seq:
                served[request_id] = found
        self._served = served

    def _start(self, seq: SequenceState) -> _Served:
        """Its prompt counts. What other ranks did for it counts there."""
        if seq.admissions > 1:
            return _Served(seq, len(seq.output_ids))
        prompt = PROMPT_WEIGHT * len(seq.request.prompt_ids)
        self.counters.charge(seq.request.tenant, prompt)
        return _Served(seq, 0)

    def _charge_answer(self, served: _Served) -> None:
        more = len(served.seq.output_ids) - served.made
        if more:
            self.counters.charge(served.seq.request.tenant, OUTPUT_WEIGHT * more)
            served.made += more
