"""An instance without a model: production schedulers in lock-step, in simulated time.

``ExactInstance`` has one queue for all ranks, which sees their state as it is when a step is
planned (``Fleet``). ``FrontedInstance`` has doors, each with a ``Front``, which see what ranks
publish: the row of a rank describes it when it has planned a step, doors have the table ``age - 1``
steps later, while that step runs, and what they send is there when the next one is planned. Tokens
are made up; answers are as long as the trace says, and ``known_ends`` of them reach their greatest
length, so that a rank knows their end when it plans their last step; the others end by surprise.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from moeserve.core import Counters, Request, RequestId, Sampled, StepPlan, StepResult
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.ranks.fleet import Fleet
from moeserve.engine.ranks.front import Front, Placement
from moeserve.engine.ranks.homes import HomePolicy
from moeserve.engine.ranks.loads import RankLoads, surplus
from moeserve.engine.ranks.rank_view import Doors
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.sequence import History


@dataclass(frozen=True, slots=True)
class RankSize:
    """What every rank is given; ``config`` bounds each."""

    config: SchedulerConfig
    num_blocks: int
    block_size: int


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """``busiest`` tokens are those of the rank with most; ``started`` requests run for the first
    time."""

    busiest: int
    started: tuple[RequestId, ...]


class Instance(Protocol):
    """Requests arrive while a step runs; they are there when the next one is planned."""

    counters: Counters

    @property
    def has_work(self) -> bool: ...

    def arrive(self, request: Request) -> None: ...

    def plan(self) -> PlannedStep: ...

    def apply(self) -> list[RequestId]:
        """The step is over: requests that ended with it."""
        ...


class ExactInstance:
    """One queue, and a home when a rank has room."""

    def __init__(self, size: RankSize, ranks: int, homes: HomePolicy) -> None:
        self.counters = Counters()
        pools = [BlockPool(size.num_blocks, size.block_size, self.counters) for _ in range(ranks)]
        self._fleet = Fleet(size.config, pools, self.counters, homes)
        self._started: set[RequestId] = set()
        self._plan = StepPlan(())

    @property
    def has_work(self) -> bool:
        return self._fleet.has_work

    def arrive(self, request: Request) -> None:
        self._fleet.add(request)

    def plan(self) -> PlannedStep:
        self._plan = plan = self._fleet.plan(0.0)
        tokens_R = np.zeros(len(self._fleet.ranks), np.int64)
        for chunk in plan.chunks:
            tokens_R[chunk.rank] += len(chunk.token_ids)
        return PlannedStep(int(tokens_R.max()), newly_started(plan, self._started))

    def apply(self) -> list[RequestId]:
        outs = self._fleet.apply(made_up(self._plan))
        return [out.request_id for out in outs if out.finish is not None]


class FrontedInstance:
    """Doors on the first ``doors`` ranks; request after request comes to another one."""

    def __init__(
        self,
        size: RankSize,
        ranks: int,
        homes: Sequence[HomePolicy],
        *,
        age: int = 1,
        ahead: int = 1,
        prefix_keys: int = 0,
        known_ends: float = 0.0,
    ) -> None:
        self.counters = Counters()
        self.given_back = 0
        self._known_ends = known_ends
        self._config = size.config
        self._ranks = [
            Scheduler(
                size.config,
                BlockPool(size.num_blocks, size.block_size, self.counters),
                self.counters,
                rank=rank,
            )
            for rank in range(ranks)
        ]
        idle = RankLoads.idle(np.full(ranks, size.num_blocks, np.int64))
        at = tuple(range(len(homes)))
        self.fronts = [
            Front(
                size.config,
                size.block_size,
                idle,
                self._ranks[0].check,
                homes=policy,
                doors=Doors(at, door),
                ahead=ahead,
                prefix_keys=prefix_keys,
            )
            for door, policy in enumerate(homes)
        ]
        self._tables = deque([idle] * age, maxlen=age)
        self._door_of: dict[RequestId, int] = {}
        self._arrivals = 0
        self._sent: list[Placement] = []
        self._started: set[RequestId] = set()
        self._plans: list[StepPlan] = []
        self._step = 0

    @property
    def has_work(self) -> bool:
        return bool(self._door_of)

    def arrive(self, request: Request) -> None:
        self._arrivals += 1
        door = self._arrivals % len(self.fronts)
        self._door_of[request.id] = door
        self.fronts[door].add(request)
        self._sent += self.fronts[door].place()

    def plan(self) -> PlannedStep:
        """Once all ranks have planned, doors get a table, and send who waited for it."""
        self._step += 1
        for placement in self._sent:
            request_id = placement.request.id
            self._ranks[placement.rank].add(
                placement.request, History(placement.output_ids, moved=bool(placement.output_ids))
            )
            self.fronts[self._door_of[request_id]].taken(request_id, self._step)
        self._sent = []
        self._plans = [rank.plan(0.0) for rank in self._ranks]
        self._tables.append(self._loads())
        self._publish(self._tables[0])
        started = [newly_started(plan, self._started) for plan in self._plans]
        return PlannedStep(
            max(plan.num_tokens for plan in self._plans), tuple(r for some in started for r in some)
        )

    def apply(self) -> list[RequestId]:
        ended = []
        for rank, plan in zip(self._ranks, self._plans, strict=True):
            if plan.chunks:
                outs = rank.apply(made_up(plan))
                ended += [out.request_id for out in outs if out.finish is not None]
        for request_id in ended:
            self.fronts[self._door_of.pop(request_id)].finished(request_id)
        return ended

    def _publish(self, loads: RankLoads) -> None:
        for front in self.fronts:
            front.publish(loads)
        for rank, count in enumerate(surplus(loads, self._config)):
            for seq in self._ranks[rank].withdraw(int(count)):
                self.given_back += 1
                request_id = seq.request.id
                self.fronts[self._door_of[request_id]].returned(request_id, seq.output_ids)
        for front in self.fronts:
            self._sent += front.place()

    def _loads(self) -> RankLoads:
        rows = [
            (
                rank.num_running - self._ending(plan),
                rank.num_waiting,
                rank.num_tokens,
                rank.num_foreseen,
                rank.pool.num_free,
            )
            for rank, plan in zip(self._ranks, self._plans, strict=True)
        ]
        queued_R = np.zeros(len(rows), np.int64)
        queued_R[: len(self.fronts)] = [front.num_waiting for front in self.fronts]
        return RankLoads(self._step, *np.array(rows, np.int64).T, queued_R)

    def _ending(self, plan: StepPlan) -> int:
        """Requests that are known to end with this step: of all that do, some ids in a thousand."""
        return sum(
            int(chunk.request.id) * 617 % 1000 < self._known_ends * 1000
            for chunk in plan.chunks
            if chunk.samples and len(chunk.output_ids) + 1 == chunk.request.params.max_tokens
        )


def made_up(plan: StepPlan) -> StepResult:
    return StepResult(tuple(Sampled(c.request.id, (1,)) for c in plan.chunks if c.samples))


def newly_started(plan: StepPlan, started: set[RequestId]) -> tuple[RequestId, ...]:
    fresh = tuple(c.request.id for c in plan.chunks if c.request.id not in started)
    started.update(fresh)
    return fresh
