"""Several ranks in one process, without a model, and drafts for null executors."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from moeserve.comm.control.local_mesh import local_meshes
from moeserve.comm.dispatcher import DispatchStats
from moeserve.core import Counters, Event, Request, RequestId, StepPlan, StepResult
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.loop import Engine, EngineLock, Unobserved
from moeserve.engine.null import NullExecutor, draw, extend
from moeserve.engine.policies.choices import Drafter
from moeserve.engine.policies.ngrams import NgramDrafts
from moeserve.engine.policies.speculation import Speculation
from moeserve.engine.ranks.front import Front
from moeserve.engine.ranks.homes import HomePolicy
from moeserve.engine.ranks.instance import Instance
from moeserve.engine.ranks.load_report import SchedulerLoad
from moeserve.engine.ranks.loads import LoadsOfRound, RankLoads, surplus
from moeserve.engine.ranks.lock_step import LockStep
from moeserve.engine.ranks.microbatches import FixedMicrobatches, MicrobatchPolicy
from moeserve.engine.ranks.rank_links import LocalLink
from moeserve.engine.ranks.rank_view import Doors
from moeserve.engine.ranks.records import RECORD_BYTES
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.sequence import SequenceState
from moeserve.engine.step_cost import DecodeCost

WAIT_S = 20.0
BLOCK, VOCAB = 4, 50


@contextlib.contextmanager
def event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """One that runs on a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(WAIT_S)
        loop.close()


def on_loop(loop: asyncio.AbstractEventLoop, make: Callable[[], Any]) -> Any:
    """What ``make`` gives, called on the loop's thread."""

    async def call() -> Any:
        made = make()
        return await made if isinstance(made, Awaitable) else made

    return asyncio.run_coroutine_threadsafe(call(), loop).result(WAIT_S)


class Ranked:
    """A null executor as a rank's, which meets the others as an exchange would; ``before`` may
    spoil a step."""

    def __init__(
        self,
        blocks: int,
        barrier: threading.Barrier,
        before: Callable[[StepPlan], StepResult | None] = lambda plan: None,
    ) -> None:
        self.inner = NullExecutor(blocks, BLOCK, VOCAB)
        self.barrier = barrier
        self.before = before
        self.microbatches: list[int] = []
        self.steps: list[int] = []

    def run(self, plan: StepPlan, microbatches: int) -> StepResult:
        self.microbatches.append(microbatches)
        self.steps.append(plan.num_tokens)
        try:
            self.barrier.wait(WAIT_S)
        except threading.BrokenBarrierError:
            raise RuntimeError("the others did not come") from None
        try:
            return self.before(plan) or self.inner.run(plan)
        except Exception:
            self.barrier.abort()
            raise


@dataclass
class Answer:
    """What came for a request; a sink."""

    events: list[Event] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    begun: threading.Event = field(default_factory=threading.Event)

    def deliver(self, events: Sequence[Event]) -> None:
        for event in events:
            assert not self.ended.is_set(), "an event after the last"
            self.events.append(event)
            if event.token_ids:
                self.begun.set()
            if event.finish is not None:
                self.ended.set()

    @property
    def token_ids(self) -> list[int]:
        return [t for e in self.events for t in e.token_ids]

    @property
    def last(self) -> Event:
        assert self.ended.wait(WAIT_S), "no end came"
        return self.events[-1]


@dataclass
class NullRanks:
    """Ranks that are threads: engines in lock-step, and doors in front of all of them."""

    loop: asyncio.AbstractEventLoop
    executors: list[Ranked]
    schedulers: list[Scheduler]
    steps: list[LockStep]
    engines: list[Engine]
    meshes: list[Any]
    doors: dict[int, Instance] = field(default_factory=dict)
    homes: list[tuple[str, int]] = field(default_factory=list)

    def submit(self, request: Request, door: int = 0) -> Answer:
        answer = Answer()
        on_loop(self.loop, lambda: self.doors[door].submit(request, answer))
        return answer

    def abort(self, request_id: str, door: int = 0) -> None:
        on_loop(self.loop, lambda: self.doors[door].abort(RequestId(request_id)))

    def counters(self) -> list[Counters]:
        return [scheduler.counters for scheduler in self.schedulers]


class Noted:
    """A policy whose choices are kept."""

    def __init__(self, inner: HomePolicy, into: list[tuple[str, int]]) -> None:
        self._inner, self._into = inner, into

    def pick(self, request: Request, candidates: Any) -> int:
        rank = self._inner.pick(request, candidates)
        self._into.append((request.id, rank))
        return rank


@contextlib.contextmanager
def null_ranks(
    world: int,
    blocks: int = 64,
    config: SchedulerConfig | None = None,
    *,
    doors: Sequence[int] = (0,),
    homes: Callable[[], HomePolicy] | None = None,
    microbatches: Callable[[], MicrobatchPolicy] = lambda: FixedMicrobatches(1),
    before: Callable[[int], Callable[[StepPlan], StepResult | None]] | None = None,
    drafter: Drafter | None = None,
    turns: Sequence[Any] | None = None,
) -> Iterator[NullRanks]:
    config = config or SchedulerConfig(64, max_num_seqs=3, max_num_batched_tokens=10)
    barrier = threading.Barrier(world)
    meshes = local_meshes(world, RECORD_BYTES, WAIT_S)
    with event_loop() as loop:
        ranks = NullRanks(loop, [], [], [], [], meshes)
        loads: list[SchedulerLoad] = []
        for rank in range(world):
            counters, lock = Counters(), EngineLock()
            pool = BlockPool(blocks, BLOCK, counters)
            scheduler = Scheduler(config, pool, counters, drafter=drafter, rank=rank)
            spoil = (lambda plan: None) if before is None else before(rank)
            executor = Ranked(blocks, barrier, spoil)
            load = SchedulerLoad(scheduler, lock)
            step = LockStep(
                executor, meshes[rank], load, microbatches(), DispatchStats(),
                deadline_s=WAIT_S, turns=None if turns is None else turns[rank],
            )  # fmt: skip
            engine = Engine(scheduler, step, Unobserved(), pace=step, lock=lock)
            ranks.executors.append(executor)
            ranks.schedulers.append(scheduler)
            ranks.steps.append(step)
            ranks.engines.append(engine)
            loads.append(load)
        for rank in doors:
            ranks.doors[rank] = on_loop(loop, lambda r=rank: open_door(ranks, r, doors, homes))
            loads[rank].queued = lambda r=rank: ranks.doors[r].queued
        for rank in range(world):
            ranks.steps[rank].on_loads = lambda n, loads, r=rank: spread(ranks, r, n, loads)
            ranks.engines[rank].start()
        try:
            yield ranks
        finally:
            stopping = [threading.Thread(target=e.stop, args=(WAIT_S,)) for e in ranks.engines]
            for thread in stopping:
                thread.start()
            for thread in stopping:
                thread.join(WAIT_S)
            assert not any(engine.alive for engine in ranks.engines), "an engine goes on"


def open_door(
    ranks: NullRanks, rank: int, doors: Sequence[int], homes: Callable[[], HomePolicy] | None
) -> Instance:
    scheduler = ranks.schedulers[rank]
    world = len(ranks.engines)
    links: list[LocalLink] = []
    loads = RankLoads.idle(np.full(world, scheduler.pool.num_blocks, np.int64))
    front = Front(
        scheduler.config,
        BLOCK,
        loads,
        scheduler.check,
        homes=None if homes is None else Noted(homes(), ranks.homes),
        doors=Doors(tuple(doors), rank),
        prefix_keys=1 << 10,
    )
    instance = Instance(
        ranks.engines[rank],
        front,
        links,
        Unobserved(),
        loads,
        suffix=f" at door {rank}",  # type: ignore[arg-type]
    )
    for other in range(world):
        links.append(
            LocalLink(other, ranks.engines[other], ranks.steps[other].next_round, instance)
        )
    return instance


def spread(ranks: NullRanks, rank: int, waiting: int, loads: LoadsOfRound) -> None:
    """What a rank does with the loads of all."""
    count = int(surplus(loads(), ranks.schedulers[rank].config)[rank])
    assert waiting or not count
    if count:
        ranks.engines[rank].give_back(count)
    if rank in ranks.doors:
        ranks.doors[rank].publish(loads)


@pytest.fixture(scope="session")
def ranks_of() -> Callable[..., Any]:
    """``null_ranks``."""
    return null_ranks


@dataclass(frozen=True)
class Guesser(Drafter):
    """Drafts ``count`` of the tokens that a null executor will make; at every ``errs``-th position
    another one, none if that is 0."""

    vocab: int
    count: int
    errs: int = 0

    def propose(self, seqs: Sequence[SequenceState], beside: int) -> Sequence[Sequence[int]]:
        return [self.guess(seq.request, seq.output_ids) for seq in seqs]

    def guess(self, request: Request, output_ids: Sequence[int]) -> Sequence[int]:
        history, digest = [*request.prompt_ids, *output_ids], b""
        for token in history:
            digest = extend(digest, token)
        for _ in range(self.count):
            token = draw(digest, request.params.seed, self.vocab)
            if self.errs and len(history) % self.errs == 0:
                token = (token + 1) % self.vocab
            history.append(token)
            digest = extend(digest, token)
        return history[len(history) - self.count :]


@pytest.fixture(scope="session")
def guessers() -> Callable[..., Drafter]:
    """By vocabulary, number of drafts, and how often they are wrong. A negative number of drafts is
    a real drafter, which looks tokens up and takes whatever is at all likely."""
    return guesser


def guesser(vocab: int, count: int, errs: int = 0) -> Drafter:
    if count >= 0:
        return Guesser(vocab, count, errs)
    decodes = DecodeCost()
    decodes.note(1, 1.0)
    decodes.note(16, 1.0)
    return Speculation(NgramDrafts(most_entries=60), decodes, FlatLine(), most=-count)


class FlatLine:
    """However many tokens a step has, it takes the same time."""

    line = (1.0, 0.0)
