"""Experts change ranks while tokens are made: the same tokens, nothing left behind, counted reads.

Ranks are threads with tiny real decoders; segments and notes go through queues.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from moeserve.comm.build import parallel_over
from moeserve.comm.dispatcher import FlatDispatcher
from moeserve.comm.exchange.base import Exchange
from moeserve.comm.group import Topology
from moeserve.comm.layout import layouts, own_experts
from moeserve.comm.pipeline import ParallelLayerRunner
from moeserve.core import Counters, Request, RequestId, SamplingParams
from moeserve.engine.blocks import BlockPool
from moeserve.engine.model_runner import ModelRunner
from moeserve.engine.ranks.fleet import Fleet
from moeserve.engine.ranks.follower import follow
from moeserve.engine.ranks.leader import DistributedExecutor
from moeserve.engine.replan.coordinator import PlanCoordinator
from moeserve.engine.replan.swapper import ExpertSwapper
from moeserve.engine.scheduler import SchedulerConfig
from moeserve.errors import CheckpointError, LateRankError, MoeserveError
from moeserve.kernels.ops import Ops
from moeserve.models.decoder import load_decoder
from moeserve.models.expert_source import ExpertSource, open_experts
from moeserve.observe.progress import Progress
from moeserve.placement.plan import Plan

WORLD, BLOCK, WAIT_S = 2, 8, 60.0
LAYERS, EXPERTS = (0, 2, 3), 8
OLD = Plan(np.array([[0, 1, 2, 3, 4, 5, 6, 7, 0, 1]] * 3, np.int32), EXPERTS, WORLD, 1, LAYERS)
NEW_ROWS = [
    [7, 6, 5, 4, 3, 2, 1, 0, 3, 3],
    [0, 1, 2, 3, 4, 5, 6, 7, 0, 1],
    [0, 1, 2, 3, 4, 1, 0, 7, 6, 5],
]
NEW = Plan(np.array(NEW_ROWS, np.int32), EXPERTS, WORLD, 1, LAYERS)
# The exchange of (name, rank, world) in one group of threads.
Post = Callable[[str, int, int], Exchange]


@dataclass
class Channel:
    """Both ends of the control channel to rank 1."""

    down: queue.Queue[bytes | None] = field(default_factory=queue.Queue)
    up: queue.Queue[bytes] = field(default_factory=queue.Queue)
    failed: MoeserveError | None = None

    def fail(self, error: MoeserveError) -> None:
        self.failed = error

    def alarm(self) -> LateRankError | None:
        return None


class LeaderEnd(Channel):
    def send(self, rank: int, message: bytes) -> None:
        assert rank == 1
        self.down.put(message)

    def receive(self, rank: int, timeout_s: float) -> bytes:
        assert rank == 1
        return self.up.get(timeout=WAIT_S)


@dataclass
class FollowerEnd:
    ends: LeaderEnd

    def send(self, message: bytes) -> None:
        self.ends.up.put(message)

    def receive(self, timeout_s: float | None = None) -> bytes | None:
        return self.ends.down.get(timeout=WAIT_S)

    def fail(self, error: MoeserveError) -> None:
        self.ends.fail(error)


@dataclass
class Member:
    executor: ModelRunner[object]
    parallel: ParallelLayerRunner
    swapper: ExpertSwapper


def member(path: Path, ops: Ops, rank: int, exchange: Exchange, hold: Hold) -> Member:
    where = layouts(OLD, LAYERS, EXPERTS, WORLD)
    decoder = load_decoder(path, ops=ops, experts=own_experts(where, rank))
    moves = FlatDispatcher(ops, exchange, Topology((0,) * WORLD), Progress())
    parallel = parallel_over(ops, decoder.stack.layers, where, moves, Progress())
    routers = {
        layer: mlp[0]
        for layer in LAYERS
        if isinstance(mlp := decoder.stack.layers[layer].mlp, tuple)
    }

    def opened() -> ExpertSource:
        hold.before_reading(rank)
        return open_experts(path, ops=ops)

    swapper = ExpertSwapper(rank, ops, parallel, routers, opened)
    return Member(ModelRunner(decoder.over(parallel), 64, BLOCK), parallel, swapper)


@dataclass
class Hold:
    """When ranks may read, and whether one fails to."""

    go: threading.Event = field(default_factory=threading.Event)
    fails: int | None = None

    def before_reading(self, rank: int) -> None:
        assert self.go.wait(WAIT_S)
        if rank == self.fails:
            raise CheckpointError("the folder is gone")


@dataclass
class Group:
    executor: DistributedExecutor
    coordinator: PlanCoordinator
    members: list[Member]
    hold: Hold


@contextlib.contextmanager
def group(path: Path, ops: Ops, post: Post) -> Iterator[Group]:
    hold, ends = Hold(), LeaderEnd()
    ranks = [member(path, ops, r, post("all", r, WORLD), hold) for r in range(WORLD)]
    coordinator = PlanCoordinator(OLD, ranks[0].swapper)
    executor = DistributedExecutor(ranks[0].executor, ends, WORLD, notes=coordinator)
    follower = threading.Thread(
        target=follow,
        args=(FollowerEnd(ends), ranks[1].executor, 1),
        kwargs={"notes": ranks[1].swapper},
    )
    follower.start()
    try:
        yield Group(executor, coordinator, ranks, hold)
    finally:
        hold.go.set()
        ends.down.put(None)
        follower.join(WAIT_S)
        for rank in ranks:
            rank.swapper.close()
        assert not follower.is_alive()
        assert ends.failed is None


def serve(
    group: Group, names: Sequence[str], each_step: Callable[[int], None] = lambda step: None
) -> dict[str, list[int]]:
    """Tokens of one request per name, whose letters are its prompt."""
    counters = Counters()
    pools = [BlockPool(64, BLOCK, counters) for _ in range(WORLD)]
    fleet = Fleet(SchedulerConfig(128, max_num_seqs=8, max_num_batched_tokens=16), pools, counters)
    tokens: dict[str, list[int]] = {name: [] for name in names}
    for name in names:
        params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
        fleet.add(Request(RequestId(name), tuple(name.encode()), params))
    step = 0
    while fleet.has_work:
        each_step(step)
        for out in fleet.apply(group.executor.run(fleet.plan(0.0))):
            tokens[out.request_id].append(out.token_id)
        step += 1
    return tokens


def until(done: Callable[[], bool], group: Group) -> None:
    ends = time.monotonic() + WAIT_S
    while not done():
        assert time.monotonic() < ends
        group.executor.idle()
        time.sleep(0.002)


@pytest.fixture
def path(tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint("qwen2_moe")


NAMES = ["first prompt", "another", "x"]


def memory_of(group: Group) -> list[weakref.ref[Tensor]]:
    """Of the packed experts that the new plan replaces."""
    found = []
    for rank in group.members:
        for layer in (0, 3):
            sharded = rank.parallel.sharded[layer]
            assert sharded is not None
            found.append(weakref.ref(sharded.part.weights.experts.data.gate_up.memory[0]))
    return found


def test_tokens_are_the_same_before_during_and_after(
    path: Path, ops: Ops, new_post: Callable[[], Post]
) -> None:
    with group(path, ops, new_post()) as ranks:
        before = serve(ranks, NAMES)
        if ops.name == "cpu":
            old = memory_of(ranks)
        seen: list[int] = []

        def each_step(step: int) -> None:
            if step == 2:
                ranks.coordinator.propose(NEW)
            if step == 6:
                ranks.hold.go.set()
            rows = ranks.coordinator.plan.expert_LS
            seen.append(int((rows == NEW.expert_LS).all(axis=1).sum()))

        during = serve(ranks, NAMES, each_step)
        until(lambda: not ranks.coordinator.changing, ranks)
        after = serve(ranks, NAMES)

        assert before == during == after
        assert seen[:7] == [1] * 7  # only layer 2, which does not change
        assert ranks.coordinator.plan.expert_LS.tolist() == NEW_ROWS
        for rank, member in enumerate(ranks.members):
            held = own_experts(layouts(NEW, LAYERS, EXPERTS, WORLD), rank)
            for layer in LAYERS:
                sharded = member.parallel.sharded[layer]
                assert sharded is not None
                assert sharded.layout.of_rank(rank) == held[layer]
        if ops.name == "cpu":
            del member, sharded
            gc.collect()
            assert [ref() is None for ref in old] == [True, False, True, True]
        (change,) = ranks.coordinator.changes
        assert (change.layers, change.switched, change.error) == (2, 2, "")
        # Layer 0 on both ranks; of layer 3 rank 0's experts stay as they were.
        expert = 3 * 32 * 64 * 4
        assert change.bytes_read == (5 + 4 + 5) * expert
        assert 0 < change.pause_s <= change.paused_s


def test_a_rank_that_cannot_read_keeps_the_old_plan_and_serves_on(
    path: Path, ops: Ops, new_post: Callable[[], Post], caplog: pytest.LogCaptureFixture
) -> None:
    with group(path, ops, new_post()) as ranks:
        before = serve(ranks, NAMES)
        ranks.hold.fails = 1
        ranks.hold.go.set()
        with caplog.at_level(logging.CRITICAL, "moeserve.plan"):
            ranks.coordinator.propose(NEW)
            during = serve(ranks, NAMES)
            until(lambda: not ranks.coordinator.changing, ranks)
            until(lambda: not ranks.coordinator.pending, ranks)
        assert before == during == serve(ranks, NAMES)
        assert ranks.coordinator.plan.expert_LS.tolist() == OLD.expert_LS.tolist()
        (change,) = ranks.coordinator.changes
        assert change.error == "rank 1, layer 0: the folder is gone"

        ranks.hold.fails = None
        ranks.coordinator.propose(NEW)
        until(lambda: ranks.coordinator.changes[-1].switched == 2, ranks)
        assert serve(ranks, NAMES) == before


def test_a_plan_of_other_slots_is_refused_in_the_log(
    path: Path, ops: Ops, new_post: Callable[[], Post], caplog: pytest.LogCaptureFixture
) -> None:
    wider = Plan(np.array([[*range(8), *range(4)]] * 3, np.int32), EXPERTS, WORLD, 1, LAYERS)
    with group(path, ops, new_post()) as ranks:
        ranks.coordinator.propose(wider)
        until(lambda: not ranks.coordinator.pending, ranks)
        assert "start again" in caplog.text
        assert ranks.coordinator.changes == []
