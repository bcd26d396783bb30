"""Which rank runs which request: one scheduler per rank behind one queue.

A request has no home while it waits: it gets one when a rank has room for it, so none waits beside
a rank that is free. Of the ranks with room, a ``HomePolicy`` picks. The request that waits longest
is placed first, and no later one before it; preempted requests stand before those that never ran,
and may get another home, for they are computed anew anyway. Bounds of ``SchedulerConfig`` hold for
each rank, but for ``max_queue``, which is of all.

Pure, like ``scheduler``.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Sequence
from itertools import chain

import numpy as np

from moeserve.core import (
    Counters,
    FinishReason,
    Request,
    RequestId,
    StepPlan,
    StepResult,
    TokenOut,
)
from moeserve.engine.blocks import BlockCounts, BlockPool
from moeserve.engine.bounds import SchedulerConfig, refuse_duplicate, refuse_when_full
from moeserve.engine.policies.choices import Drafter
from moeserve.engine.ranks.homes import Candidates, HomePolicy, LeastWork
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.sequence import SequenceState
from moeserve.engine.step_builder import StepBuilder


class Fleet:
    """A scheduler of several ranks; ``pools[r]`` has the blocks of rank r."""

    def __init__(
        self,
        config: SchedulerConfig,
        pools: Sequence[BlockPool],
        counters: Counters,
        homes: HomePolicy | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        self.config = config
        self.counters = counters
        self.ranks = tuple(
            Scheduler(config, pool, counters, drafter=drafter, rank=rank)
            for rank, pool in enumerate(pools)
        )
        self._homes = homes or LeastWork()
        self._again: list[SequenceState] = []  # preempted, by arrival
        self._fresh: OrderedDict[RequestId, SequenceState] = OrderedDict()
        self._arrivals = 0
        self._ended: list[RequestId] = []

    @property
    def num_waiting(self) -> int:
        return len(self._again) + len(self._fresh)

    @property
    def num_running(self) -> int:
        return sum(rank.num_running for rank in self.ranks)

    @property
    def has_work(self) -> bool:
        return self.num_waiting > 0 or any(rank.has_work for rank in self.ranks)

    @property
    def blocks(self) -> BlockCounts:
        """Of all ranks together."""
        counts = [rank.blocks for rank in self.ranks]
        return BlockCounts(
            sum(c.total for c in counts),
            sum(c.free for c in counts),
            sum(c.cached for c in counts),
            counts[0].size,
        )

    def check(self, request: Request) -> None:
        """Refuse what some rank could never run."""
        min(self.ranks, key=lambda rank: rank.pool.num_blocks).check(request)

    def owns(self, request_id: RequestId) -> bool:
        here = self._waiting(request_id) is not None
        return here or any(rank.owns(request_id) for rank in self.ranks)

    def add(self, request: Request) -> None:
        """Queue a request, or refuse it."""
        self.check(request)
        refuse_duplicate(request, self.owns(request.id))
        refuse_when_full(self.num_waiting, self.config)
        self._arrivals += 1
        self._fresh[request.id] = SequenceState(request, arrival=self._arrivals)
        self.counters.prompt_tokens += len(request.prompt_ids)

    def abort(self, request_id: RequestId, reason: FinishReason) -> bool:
        """End a request and free its blocks; False if there is no such request."""
        seq = self._waiting(request_id)
        if seq is not None:
            self._drop(seq, reason)
            return True
        return any(rank.abort(request_id, reason) for rank in self.ranks)

    def detach(self, request_id: RequestId) -> SequenceState | None:
        """Let go of one that has a home, with its blocks."""
        found = (rank.detach(request_id) for rank in self.ranks)
        return next((seq for seq in found if seq is not None), None)

    def plan(self, now: float) -> StepPlan:
        """The next step of all ranks, their chunks in order of ranks."""
        late = [seq for seq in chain(self._again, self._fresh.values()) if seq.late(now)]
        for seq in late:
            self._drop(seq, FinishReason.DEADLINE)
        builders = [rank.begin(now) for rank in self.ranks]
        for rank in self.ranks:
            for seq in rank.withdraw():
                bisect.insort(self._again, seq, key=_arrival)
        self._place(builders)
        for rank in self.ranks:
            self._ended += rank.take_ended()
        plans = [
            rank.commit(builder, ()) for rank, builder in zip(self.ranks, builders, strict=True)
        ]
        chunks = tuple(chain.from_iterable(plan.chunks for plan in plans))
        ended = tuple(self._ended) if chunks else ()
        del self._ended[: len(ended)]
        return StepPlan(
            chunks,
            (*(seq.request.id for seq in late), *chain.from_iterable(p.expired for p in plans)),
            tuple(chain.from_iterable(p.preempted for p in plans)),
            ended,
        )

    def apply(self, result: StepResult) -> list[TokenOut]:
        """Take note of what the planned step computed and sampled."""
        self.counters.steps += 1
        sampled = {s.request_id: s for s in result.sampled}
        return [out for rank in self.ranks for out in rank.settle(sampled)]

    def drop(self) -> None:
        """There is no result of the planned step, whose requests have been aborted."""
        for rank in self.ranks:
            rank.drop()

    def _place(self, builders: Sequence[StepBuilder]) -> None:
        """Give homes, in order, until the next request fits nowhere."""
        if not self.num_waiting:
            return
        tokens = [rank.num_tokens for rank in self.ranks]
        while (seq := self._next()) is not None:
            rows = [
                (at.rank, at.num_running, tokens[at.rank], at.cached_tokens(seq))
                for at, builder in zip(self.ranks, builders, strict=True)
                if at.has_room(builder, seq)
            ]
            if not rows:
                return
            home = self._homes.pick(seq.request, Candidates(*np.array(rows, np.int64).T))
            self._unqueue(seq)
            self.ranks[home].admit(builders[home], seq)
            tokens[home] += len(seq)

    def _next(self) -> SequenceState | None:
        return self._again[0] if self._again else next(iter(self._fresh.values()), None)

    def _unqueue(self, seq: SequenceState) -> None:
        if self._fresh.pop(seq.request.id, None) is None:
            self._again.remove(seq)

    def _drop(self, seq: SequenceState, reason: FinishReason) -> None:
        """End a request that waits."""
        self._unqueue(seq)
        seq.finish = reason
        self._ended.append(seq.request.id)
        self.counters.finished[reason] = self.counters.finished.get(reason, 0) + 1

    def _waiting(self, request_id: RequestId) -> SequenceState | None:
        again = (seq for seq in self._again if seq.request.id == request_id)
        return self._fresh.get(request_id) or next(again, None)


def _arrival(seq: SequenceState) -> int:
    return seq.arrival
