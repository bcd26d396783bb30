"""Runs a planned step over all ranks, from rank 0, which is one of them.

Every rank gets its part of the plan, also where that is nothing; all run theirs in lock-step, for
each MoE layer is an exchange between all of them; each samples its own rows and reports. Rank 0
chooses the number of microbatches for all.

What goes wrong around a rank's part of a step ends the requests it touches (see ``model_runner``).
What goes wrong in the exchange or on the way ends the run: lock-step is lost, every rank is sent
the reason, and no further step is run. Carrying on without a rank would begin here.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from moeserve.comm.dispatcher import DispatchStats
from moeserve.comm.exchange.base import DEADLINE_S
from moeserve.core import Chunk, RequestId, Sampled, StepPlan, StepResult
from moeserve.engine.executor import RankExecutor
from moeserve.engine.ranks.homes import ExpertUse, ExpertUseSource
from moeserve.engine.ranks.messages import StepEncoder, read_uses, read_work
from moeserve.engine.ranks.microbatches import FixedMicrobatches, MicrobatchPolicy, StepShape
from moeserve.errors import InternalError, LateRankError, MoeserveError, UnavailableError
from moeserve.pb import step_pb2 as pb

NOTHING = StepPlan(())


class LeaderChannel(Protocol):
    """Rank 0's end of the control channel (``comm.control.channels.Leader``)."""

    def send(self, rank: int, message: bytes) -> None: ...

    def receive(self, rank: int, timeout_s: float) -> bytes:
        """LateRankError names who did not report, or what the alarm was."""
        ...

    def alarm(self) -> LateRankError | None: ...

    def fail(self, error: MoeserveError) -> None:
        """All other ranks are to end, with this reason."""
        ...


class LeaderNotes(Protocol):
    """Rank 0's end of notes that travel with orders and reports; theirs is
    ``follower.FollowerNotes``."""

    def outgoing(self) -> Mapping[int, bytes]:
        """Before a step: notes to the other ranks, which read them before they run it. Rank 0
        does what its own says now."""
        ...

    def collect(self, rank: int, note: bytes) -> None:
        """A rank's answer."""
        ...

    @property
    def pending(self) -> bool:
        """Whether a step would be welcome though there is nothing to run."""
        ...


class DistributedExecutor:
    """``work[r]`` is what rank r has counted so far, ``chosen`` steps by number of microbatches.

    ``learn`` is called with which ranks' experts prompts used, rank 0's own from ``uses``.
    """

    def __init__(
        self,
        executor: RankExecutor,
        channel: LeaderChannel,
        world: int,
        *,
        stats: DispatchStats | None = None,
        microbatches: MicrobatchPolicy | None = None,
        notes: LeaderNotes | None = None,
        uses: ExpertUseSource | None = None,
        learn: Callable[[ExpertUse], None] = lambda use: None,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self.work = [
            stats or DispatchStats(world),
            *(DispatchStats(world) for _ in range(1, world)),
        ]
        self.chosen: Counter[int] = Counter()
        self._executor = executor
        self._channel = channel
        self._world = world
        self._microbatches = microbatches or FixedMicrobatches(1)
        self._notes = notes
        self._uses = uses
        self._learn = learn
        self._deadline_s = deadline_s
        self._encoders = {rank: StepEncoder() for rank in range(1, world)}
        self._home: dict[RequestId, int] = {}
        self._step = 0
        self._lost: UnavailableError | None = None

    def run(self, plan: StepPlan) -> StepResult:
        if self._lost is not None:
            raise self._lost
        try:
            return self._run(plan)
        except Exception as error:
            self._lost = lost = _as_unavailable(error)
            self._channel.fail(lost)
            if lost is error:
                raise
            raise lost from error

    def idle(self) -> None:
        """While there is nothing to run: raises the alarm, and lets notes travel."""
        if self._lost is not None:
            raise self._lost
        alarm = self._channel.alarm()
        if alarm is not None:
            raise alarm
        if self._notes is not None and self._notes.pending:
            self.run(NOTHING)

    def _run(self, plan: StepPlan) -> StepResult:
        parts = [[c for c in plan.chunks if c.rank == rank] for rank in range(self._world)]
        shape = step_shape(parts)
        count = self._microbatches.choose(shape)
        waited = [stats.waited_s for stats in self.work]
        began = time.perf_counter()
        self._send(plan, parts, count)
        mine = StepPlan(tuple(parts[0]), preempted=plan.preempted, ended=plan.ended)
        results = [self._executor.run(mine, count)]
        results += [self._receive(rank, parts[rank]) for rank in range(1, self._world)]
        seconds = time.perf_counter() - began
        for use in () if self._uses is None else self._uses.take():
            self._learn(use)
        self.chosen[count] += 1
        least = min(m.waited_s - w for m, w in zip(self.work, waited, strict=True))
        self._microbatches.learn(shape, count, seconds, least)
        return merge(plan, results)

    def _send(self, plan: StepPlan, parts: Sequence[Sequence[Chunk]], count: int) -> None:
        self._step += 1
        ended = self._ended_on(plan)
        outgoing = {} if self._notes is None else self._notes.outgoing()
        for rank, encoder in self._encoders.items():
            order = encoder.order(
                self._step, count, parts[rank], ended.get(rank, ()), plan.preempted
            )
            if rank in outgoing:
                order.note = outgoing[rank]
            self._channel.send(rank, order.SerializeToString())

    def _ended_on(self, plan: StepPlan) -> dict[int, list[RequestId]]:
        """By rank, the requests that it can forget: they ended, or run elsewhere from now on."""
        ended: dict[int, list[RequestId]] = {}
        for request_id in plan.ended:
            home = self._home.pop(request_id, None)
            if home is not None:
                ended.setdefault(home, []).append(request_id)
        for chunk in plan.chunks:
            home = self._home.get(chunk.request.id)
            if home != chunk.rank:
                self._home[chunk.request.id] = chunk.rank
                if home is not None:
                    ended.setdefault(home, []).append(chunk.request.id)
        return ended

    def _receive(self, rank: int, chunks: Sequence[Chunk]) -> StepResult:
        report = pb.StepReport.FromString(self._channel.receive(rank, self._deadline_s))
        if report.step != self._step:
            raise InternalError(f"rank {rank} reports step {report.step} after {self._step}")
        if report.HasField("work"):
            self.work[rank] = read_work(report.work, self._world)
        for use in read_uses(report):
            self._learn(use)
        if self._notes is not None and report.note:
            self._notes.collect(rank, report.note)
        return self._encoders[rank].result(chunks, report)


def step_shape(parts: Sequence[Sequence[Chunk]]) -> StepShape:
    """``parts`` by rank."""
    tokens = max(sum(len(c.token_ids) for c in part) for part in parts)
    return StepShape(tokens, all(len(c.token_ids) == 1 for part in parts for c in part))


def merge(plan: StepPlan, results: Sequence[StepResult]) -> StepResult:
    """In the plan's order."""
    sampled: dict[RequestId, Sampled] = {}
    failed: dict[RequestId, str] = {}
    for result in results:
        sampled.update((s.request_id, s) for s in result.sampled)
        failed.update(result.failed)
    ids = [c.request.id for c in plan.chunks]
    return StepResult(
        tuple(sampled[i] for i in ids if i in sampled),
        tuple((i, failed[i]) for i in ids if i in failed),
    )


def _as_unavailable(error: Exception) -> UnavailableError:
    if isinstance(error, UnavailableError):
        return error
    return UnavailableError(f"rank 0 fell out of step ({type(error).__name__}: {error})")
